"""Stable Diffusion 3 with diffusers' modules: ``compat="diffusers"`` against its own pipeline, the VAE's shift it
forgets, and the text encoders.

Random networks give latents of any size, so differences are relative to the largest latent.
"""

import diffusers
import pytest
import torch
from comfyui_mend.engine import compat_flow, schedulers
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models import sd3
from comfyui_mend.engine.models.detect import CONFIGS, recognise, recognise_folder
from comfyui_mend.engine.models.load import check_folder, find_parts, load_model
from comfyui_mend.engine.models.modules import assemble
from comfyui_mend.engine.models.protocol import Conditioning, PromptSyntax
from comfyui_mend.engine.models.sdxl import PENULTIMATE
from comfyui_mend.engine.models.weight_files import read_json
from comfyui_mend.engine.types import Compat, Crop, InputError, ModelFileError
from headers import write_header
from safetensors.torch import save_file
from tiny import as_pil, photo_and_mask, relative
from tiny_flow import latents_and_images, make_model, tiny_sd3
from tiny_single_file import original_vae, save_configs

STEPS, SCALE, SEED, SIDE, PROMPT, NEGATIVE = 8, 5.0, 7, 128, "a red cat on the mat", "dog"
LATENT_GATE, IMAGE_GATE = 1e-5, 5e-5
HOST = LocalHost(torch.device("cpu"))


@pytest.fixture(scope="module")
def medium():
    return tiny_sd3()


@pytest.fixture(scope="module")
def dual():
    """Attention as in 3.5 Medium, and no T5."""
    return tiny_sd3(t5=False, dual=True)


def reference(pipeline, strength=1.0, count=1, guidance_scale=SCALE):
    """(latents, images) of StableDiffusion3InpaintPipeline."""
    image, mask = as_pil(*photo_and_mask())
    options = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "image": image,
        "mask_image": mask,
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
        "strength": strength,
        "num_images_per_prompt": count,
    }
    results = []
    for kind in ("latent", "pt"):
        with torch.no_grad():
            results.append(pipeline(**options, generator=torch.Generator().manual_seed(SEED), output_type=kind).images)
    return latents_of(results[0], pipeline), results[1].permute(0, 2, 3, 1)


def latents_of(images, pipeline):
    """The pipeline hands latents through its image processor, which leaves them as they are."""
    assert images.shape[1] == pipeline.vae.config.latent_channels
    return images


def ours(pipeline, model=None, **options):
    """(latents, images) of the engine."""
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": SCALE, "seed": SEED}
    return latents_and_images(model or make_model(sd3, pipeline), **common | {"width": SIDE, "height": SIDE} | options)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("variant", ["medium", "dual"])
def test_compat_reproduces_the_pipeline(variant, strength, request):
    pipeline = request.getfixturevalue(variant)
    theirs, mine = reference(pipeline, strength), ours(pipeline, strength=strength)
    assert relative(theirs[0], mine[0]) <= LATENT_GATE
    assert float((theirs[1] - mine[1]).abs().max()) <= IMAGE_GATE


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_compat_reproduces_a_batch(medium, guidance_scale):
    theirs = reference(medium, 0.7, count=2, guidance_scale=guidance_scale)
    mine = ours(medium, strength=0.7, count=2, guidance_scale=guidance_scale)
    assert mine[0].shape[0] == 2
    assert relative(theirs[0], mine[0]) <= LATENT_GATE


# --- the VAE's shift


def test_the_default_decodes_with_the_shift_that_the_pipeline_forgets(medium):
    """The picture of the same latents: the pipeline's is darker or lighter by what the shift is worth to the VAE."""
    latents, theirs = reference(medium)
    config = medium.vae.config
    with torch.no_grad():
        right = medium.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        right = (right / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        mine = (make_model(sd3, medium).decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float((mine - right).abs().max()) <= IMAGE_GATE
    if compat_flow.pipeline_forgets_shift():
        assert float((theirs - right).abs().max()) > 1000 * IMAGE_GATE


def test_whether_the_pipeline_forgets_is_read_from_its_source(medium, monkeypatch):
    latents, theirs = reference(medium)
    config = medium.vae.config
    with torch.no_grad():
        bare = (medium.vae.decode(latents / config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (float((theirs - bare).abs().max()) <= IMAGE_GATE) == compat_flow.pipeline_forgets_shift()

    class Mended:
        def __call__(self, latents):
            return latents / self.scaling_factor + self.shift_factor

    monkeypatch.setattr(diffusers, "StableDiffusion3InpaintPipeline", Mended)
    assert not compat_flow.pipeline_forgets_shift.__wrapped__()


def test_gate_rejects_a_decoding_of_the_other_kind(medium, monkeypatch):
    forgets = compat_flow.pipeline_forgets_shift()
    theirs = reference(medium)
    monkeypatch.setattr(compat_flow, "pipeline_forgets_shift", lambda: not forgets)
    mine = ours(medium)
    assert relative(theirs[0], mine[0]) <= LATENT_GATE
    assert float((theirs[1] - mine[1]).abs().max()) > 1000 * IMAGE_GATE


# Negative controls: each is a plausible way to get it wrong, and the gate must see it by a wide margin.


def rejected(theirs, mine, least=50 * LATENT_GATE):
    return relative(theirs[0], mine[0]) > least


def test_gate_rejects_even_levels(medium, monkeypatch):
    facts = sd3.sd3_facts

    def trailing(components):
        made = facts(components)
        made.scheduler_config["timestep_spacing"] = "trailing"
        return made

    monkeypatch.setattr(sd3, "sd3_facts", trailing)
    assert rejected(reference(medium), ours(medium), least=1e-2)


def test_gate_rejects_levels_without_shift(medium):
    mine = ours(medium, make_model(sd3, medium, scheduler={"shift": 1.0}))
    assert rejected(reference(medium), mine, least=1e-2)


def test_gate_rejects_an_encoding_without_shift(medium):
    model = make_model(sd3, medium)
    model._shift_factor *= 0
    assert rejected(reference(medium), ours(medium, model), least=1e-3)


def test_gate_rejects_t5_of_77_tokens(medium, monkeypatch):
    monkeypatch.setattr(sd3, "T5_TOKENS", 77)
    assert rejected(reference(medium), ours(medium))


def test_gate_rejects_a_missing_t5_left_out(dual, monkeypatch):
    """Zeros are tokens, too: the pipeline's attention reads them."""
    monkeypatch.setattr(sd3, "pipeline_zeros", lambda: 0)
    assert rejected(reference(dual), ours(dual))


@pytest.mark.parametrize(
    "layer", [PENULTIMATE._replace(from_end=1), PENULTIMATE._replace(normed=True)], ids=["last layer", "final norm"]
)
def test_gate_rejects_another_layer_of_clip(medium, monkeypatch, layer):
    monkeypatch.setattr(sd3, "PENULTIMATE", layer)
    assert rejected(reference(medium), ours(medium))


def test_gate_rejects_kept_cells_that_are_not_masked_again(medium, monkeypatch):
    monkeypatch.setattr(schedulers.Schedule, "renoise", lambda self, clean, noise, index: clean)
    assert rejected(reference(medium), ours(medium))


# --- the default


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("scheduler", ["K_EULER", "DPMSolverMultistep", "UniPC", "DEIS"])
def test_what_is_not_masked_stays_bit_identical(medium, scheduler, strength):
    image, mask = photo_and_mask()
    options = {"compat": Compat.OFF, "width": 0, "height": 0, "crop": Crop.OFF, "scheduler": scheduler}
    _, result = ours(medium, steps=4, strength=strength, **options)
    assert torch.equal(result[mask == 0], image[mask == 0])
    assert (result - image)[mask == 1].abs().max() > 0.02


def test_prompts_of_different_length_are_guided_apart(medium):
    options = {"compat": Compat.OFF, "crop": Crop.OFF, "steps": 2}
    long = "a red cat on the mat " * 20
    one, _ = ours(medium, prompt=long, **options)
    assert torch.isfinite(one).all()
    assert not torch.equal(one, ours(medium, prompt=long[:50], **options)[0])


def test_what_the_network_reads_is_told(medium):
    facts = make_model(sd3, medium).facts
    assert facts.conditioning is Conditioning.REPLACE
    assert not facts.embedded_guidance
    assert (facts.native_size, facts.multiple, facts.latent_channels, facts.downscale) == (SIDE, 16, 16, 8)
    assert facts.prediction_type == "flow_prediction"
    assert facts.latent_format == "SD3"


def test_a_canvas_without_places_is_refused(medium):
    image, mask = photo_and_mask(width=400, height=64)
    with pytest.raises(InputError, match="places for 384 pixels a side"):
        ours(medium, image=image, mask=mask, compat=Compat.OFF, width=0, height=0, crop=Crop.OFF)


# --- prompts


@pytest.mark.parametrize("variant", ["medium", "dual"])
def test_a_plain_prompt_is_the_pipelines(variant, request):
    pipeline = request.getfixturevalue(variant)
    prompt = "a (red:1.3) cat " * 40
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, device="cpu", do_classifier_free_guidance=False
        )
    (mine,) = make_model(sd3, pipeline).encode_prompt([prompt], PromptSyntax.PLAIN)
    assert tokens.shape == mine.tokens.shape
    assert relative(tokens, mine.tokens) <= LATENT_GATE
    assert relative(pooled, mine.pooled) <= LATENT_GATE


def test_long_prompts_take_more_chunks_of_clip(medium):
    model = make_model(sd3, medium)
    (mine,) = model.encode_prompt(["a cat on the mat, " * 20], PromptSyntax.COMFY)
    chunks, rest = divmod(mine.tokens.shape[1] - 256, 77)
    assert chunks == 2
    assert rest == 0


# --- files of the first release


def released(state, config):
    """diffusers' state dict as Stability's files have it: written as these are described, block by block."""
    result = {}

    def put(new, *old, swap=False):
        for kind in ("weight", "bias"):
            if f"{old[0]}.{kind}" in state:
                tensor = torch.cat([state.pop(f"{name}.{kind}") for name in old])
                result[f"{new}.{kind}"] = torch.cat(tensor.chunk(2)[::-1]) if swap else tensor

    result["pos_embed"] = state.pop("pos_embed.pos_embed")
    put("x_embedder.proj", "pos_embed.proj")
    put("context_embedder", "context_embedder")
    for new, old in (("t_embedder", "timestep"), ("y_embedder", "text")):
        put(f"{new}.mlp.0", f"time_text_embed.{old}_embedder.linear_1")
        put(f"{new}.mlp.2", f"time_text_embed.{old}_embedder.linear_2")
    for block in range(config["num_layers"]):
        new, old = f"joint_blocks.{block}", f"transformer_blocks.{block}"
        last = block == config["num_layers"] - 1
        put(f"{new}.x_block.adaLN_modulation.1", f"{old}.norm1.linear")
        put(f"{new}.context_block.adaLN_modulation.1", f"{old}.norm1_context.linear", swap=last)
        put(f"{new}.x_block.attn.qkv", *(f"{old}.attn.to_{part}" for part in "qkv"))
        put(f"{new}.x_block.attn2.qkv", *(f"{old}.attn2.to_{part}" for part in "qkv"))
        put(f"{new}.context_block.attn.qkv", *(f"{old}.attn.add_{part}_proj" for part in "qkv"))
        put(f"{new}.x_block.attn.proj", f"{old}.attn.to_out.0")
        put(f"{new}.x_block.attn2.proj", f"{old}.attn2.to_out.0")
        put(f"{new}.context_block.attn.proj", f"{old}.attn.to_add_out")
        for part in "qk":
            put(f"{new}.x_block.attn.ln_{part}", f"{old}.attn.norm_{part}")
            put(f"{new}.x_block.attn2.ln_{part}", f"{old}.attn2.norm_{part}")
            put(f"{new}.context_block.attn.ln_{part}", f"{old}.attn.norm_added_{part}")
        for stream, mlp in (("x", "ff"), ("context", "ff_context")):
            put(f"{new}.{stream}_block.mlp.fc1", f"{old}.{mlp}.net.0.proj")
            put(f"{new}.{stream}_block.mlp.fc2", f"{old}.{mlp}.net.2")
    put("final_layer.linear", "proj_out")
    put("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    assert not state, sorted(state)
    return result


@pytest.mark.parametrize("variant", ["medium", "dual"])
def test_files_of_the_first_release_give_the_same_network(variant, request):
    transformer = request.getfixturevalue(variant).transformer
    config = dict(transformer.config)
    read = sd3.read_transformer(released(dict(transformer.state_dict()), config), config)
    assert read.keys() == transformer.state_dict().keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in transformer.state_dict().items())
    assert sd3.read_transformer(read, config) == read
    module = assemble(lambda: sd3.build_transformer(config), read, torch.float32, "tiny")
    latents, tokens, pooled = torch.randn(1, 16, 8, 8), torch.randn(1, 5, 80), torch.randn(1, 64)
    given = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": tokens, "pooled_projections": pooled}
    assert torch.allclose(module(latents, **given)[0], transformer(latents, **given)[0], atol=1e-5)


def test_the_converter_of_diffusers_reads_the_same(medium, dual):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    for pipeline in (medium, dual):
        transformer = pipeline.transformer
        config = dict(transformer.config)
        state = released(dict(transformer.state_dict()), config)
        theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(state))
        mine = sd3.read_transformer(state, config)
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[key], mine[key]) for key in theirs)


# --- loading


def checkpoint(pipeline, path, clips=True):
    """All of a pipeline in one file, as the published ones are, and its configs beside it."""
    state = {
        f"model.diffusion_model.{key}": value
        for key, value in released(dict(pipeline.transformer.state_dict()), dict(pipeline.transformer.config)).items()
    }
    state |= original_vae(pipeline.vae)
    names = ["text_encoder", "text_encoder_2"]
    for name, key in zip(names, ("clip_l", "clip_g"), strict=True) if clips else ():
        tower = getattr(pipeline, name).state_dict()
        state |= {f"text_encoders.{key}.transformer.{inner}": value for inner, value in tower.items()}
    if pipeline.text_encoder_3 is not None:
        names.append("text_encoder_3")
        tower = pipeline.text_encoder_3.state_dict()
        tower.pop("encoder.embed_tokens.weight")
        state |= {f"text_encoders.t5xxl.transformer.{inner}": value for inner, value in tower.items()}
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, path)
    beside = save_configs(path.with_name(f"{path.stem}-config"), pipeline, ("transformer", "vae", *names))
    if pipeline.tokenizer_3 is not None:
        pipeline.tokenizer_3.save_pretrained(beside / "tokenizer_3")
    return path


def loads_the_same(pipeline, model):
    return relative(ours(pipeline)[0], ours(pipeline, model)[0]) <= LATENT_GATE


@pytest.mark.parametrize("variant", ["medium", "dual"])
def test_a_folder_loads_with_t5_or_without(variant, request, tmp_path):
    pipeline = request.getfixturevalue(variant)
    pipeline.save_pretrained(tmp_path / variant)
    model = load_model(tmp_path / variant, HOST)
    assert (model.t5 is None) == (pipeline.text_encoder_3 is None)
    assert loads_the_same(pipeline, model)


@pytest.mark.parametrize("variant", ["medium", "dual"])
def test_one_file_loads_with_t5_or_without(variant, request, tmp_path):
    pipeline = request.getfixturevalue(variant)
    model = load_model(checkpoint(pipeline, tmp_path / "sd3.safetensors"), HOST)
    assert (model.t5 is None) == (pipeline.text_encoder_3 is None)
    assert loads_the_same(pipeline, model)


def test_text_encoders_may_be_files_of_their_own(dual, tmp_path):
    path = checkpoint(dual, tmp_path / "sd3.safetensors", clips=False)
    texts = []
    for name in ("text_encoder", "text_encoder_2"):
        texts.append(tmp_path / f"{name}.safetensors")
        save_file({key: value.detach().clone() for key, value in getattr(dual, name).state_dict().items()}, texts[-1])
    assert loads_the_same(dual, load_model(path, HOST, text_encoders=texts))
    with pytest.raises(ModelFileError, match="holds a transformer but no text encoder 2"):
        load_model(path, HOST, text_encoders=texts[:1])


@pytest.mark.parametrize(
    ("name", "variant", "millions", "largest"),
    [
        ("sd3-medium", "3-medium", 2028.328, 3072),
        ("sd35-medium", "3.5-medium", 2243.172, 6144),
        ("sd35-large", "3.5-large", 8056.628, 3072),
    ],
)
def test_shipped_configs_have_the_published_sizes(name, variant, millions, largest, tmp_path):
    folder = CONFIGS / name
    assert check_folder(folder) is sd3.SD3
    assert recognise_folder(folder).variant == variant
    with torch.device("meta"):
        network = sd3.build_transformer(read_json(folder / "transformer" / "config.json"))
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert network.config.pos_embed_max_size * 16 == largest
    state = released(dict(network.state_dict()), dict(network.config))
    path = write_header(tmp_path / "file.safetensors", {key: tuple(value.shape) for key, value in state.items()})
    assert recognise(path).variant == variant
    assert find_parts(path).folder == folder
    vae = read_json(folder / "vae" / "config.json")
    assert (vae["scaling_factor"], vae["shift_factor"], vae["latent_channels"]) == (1.5305, 0.0609, 16)
