"""FLUX with diffusers' modules: ``compat="diffusers"`` against its own pipelines, and what the default does better.

Random networks give latents of any size, so differences are relative to the largest latent.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comfyui_mend.engine import compat_flow, inpaint, schedulers
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models import flux
from comfyui_mend.engine.models.detect import CONFIGS, recognise, recognise_folder
from comfyui_mend.engine.models.load import check_folder, find_parts, load_model
from comfyui_mend.engine.models.modules import assemble
from comfyui_mend.engine.models.protocol import Conditioning, Posterior, PromptSyntax
from comfyui_mend.engine.models.weight_files import read_json
from comfyui_mend.engine.sampling import make_schedule
from comfyui_mend.engine.types import Compat, Crop, InpaintRequest, InputError, ModelFileError, Size
from headers import write_header
from safetensors.torch import save_file
from tiny import as_pil, photo_and_mask, relative
from tiny_flow import components, latents_and_images, make_model, tiny_flux, tiny_t5, tiny_t5_tokenizer
from tiny_single_file import original_vae, save_configs

STEPS, SCALE, SEED, SIDE, PROMPT = 8, 30.0, 7, 128, "a red cat on the mat"
LATENT_GATE, IMAGE_GATE = 1e-5, 5e-5
HOST = LocalHost(torch.device("cpu"))


@pytest.fixture(scope="module")
def fill():
    return tiny_flux("fill")


@pytest.fixture(scope="module")
def dev():
    return tiny_flux("dev")


@pytest.fixture(scope="module")
def schnell():
    return tiny_flux("schnell")


def reference(pipeline, strength=1.0, count=1, guidance_scale=SCALE, steps=STEPS):
    """(latents, images) of diffusers' pipeline."""
    image, mask = as_pil(*photo_and_mask())
    with torch.no_grad():
        packed = pipeline(
            prompt=PROMPT,
            image=image,
            mask_image=mask,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            strength=strength,
            num_images_per_prompt=count,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images
        latents = pipeline._unpack_latents(packed, SIDE, SIDE, 8)
        config = pipeline.vae.config
        decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    return latents, (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def ours(pipeline, model=None, **options):
    """(latents, images) of the engine."""
    common = {"prompt": PROMPT, "steps": STEPS, "guidance_scale": SCALE, "seed": SEED}
    return latents_and_images(model or make_model(flux, pipeline), **common | {"width": SIDE, "height": SIDE} | options)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("variant", ["fill", "dev", "schnell"])
def test_compat_reproduces_the_pipeline(variant, strength, request):
    pipeline = request.getfixturevalue(variant)
    theirs, mine = reference(pipeline, strength), ours(pipeline, strength=strength)
    assert relative(theirs[0], mine[0]) <= LATENT_GATE
    assert float((theirs[1] - mine[1]).abs().max()) <= IMAGE_GATE


@pytest.mark.parametrize("variant", ["fill", "dev"])
def test_compat_reproduces_a_batch(variant, request):
    pipeline = request.getfixturevalue(variant)
    theirs, mine = (
        reference(pipeline, 0.7, count=2, guidance_scale=3.5),
        ours(pipeline, strength=0.7, count=2, guidance_scale=3.5),
    )
    assert mine[0].shape[0] == 2
    assert relative(theirs[0], mine[0]) <= LATENT_GATE


def test_compat_runs_with_eulers_solver_alone(fill):
    with pytest.raises(InputError, match="run with K_EULER"):
        ours(fill, scheduler="DPMSolverMultistep")


def test_compat_takes_sizes_of_whole_tokens(fill):
    with pytest.raises(InputError, match="multiples of 16"):
        ours(fill, width=136)


# Negative controls: each is a plausible way to get it wrong, and the gate must see it by a wide margin.


def rejected(theirs, mine, least=50 * LATENT_GATE):
    return relative(theirs[0], mine[0]) > least


def test_gate_rejects_half_of_t5s_padding(fill, monkeypatch):
    monkeypatch.setattr(flux, "T5_TOKENS", 256)
    assert rejected(reference(fill), ours(fill), least=2e-3)


def test_gate_rejects_another_guidance(fill):
    assert rejected(reference(fill), ours(fill, guidance_scale=3.5), least=1e-2)


def test_gate_rejects_a_grey_mask(fill, monkeypatch):
    channels = flux.mask_channels
    monkeypatch.setattr(flux, "mask_channels", lambda hole, downscale: channels(hole * 0.6, downscale))
    assert rejected(reference(fill), ours(fill), least=1e-2)


def test_gate_rejects_a_mask_of_latent_cells(fill, monkeypatch):
    def whole_cells(hole, downscale):
        return F.max_pool2d(hole, downscale).expand(-1, downscale**2, -1, -1)

    monkeypatch.setattr(flux, "mask_channels", whole_cells)
    assert rejected(reference(fill), ours(fill))


@pytest.mark.parametrize("mu", [0.5, 1.15], ids=["shift of 256x256", "shift of 1024x1024"])
def test_gate_rejects_another_shift(fill, monkeypatch, mu):
    original = compat_flow.default_schedule

    def other(request, model, canvas):
        facts = replace(model.facts, scheduler_config={**model.facts.scheduler_config, "mu": mu})
        return original(request, type("Other", (), {"facts": facts})(), canvas)

    monkeypatch.setattr(compat_flow, "default_schedule", other)
    assert rejected(reference(fill), ours(fill))


def test_gate_rejects_a_vae_without_shift(fill):
    model = make_model(flux, fill)
    model._shift_factor *= 0
    assert rejected(reference(fill), ours(fill, model))


def test_gate_rejects_the_posterior_mean(fill, monkeypatch):
    def mean(self, generator):
        torch.randn(self.mean.shape, generator=generator)
        return self.mean

    monkeypatch.setattr(Posterior, "sample", mean)
    assert rejected(reference(fill), ours(fill))


def test_gate_rejects_a_start_that_draws_no_posterior(fill, monkeypatch):
    plan = compat_flow.make_schedule

    def from_noise(request, model, canvas):
        schedule = plan(request, model, canvas)
        schedule.from_noise = request.strength == 1
        return schedule

    monkeypatch.setattr(compat_flow, "make_schedule", from_noise)
    assert rejected(reference(fill), ours(fill))


def test_gate_rejects_steps_rounded_down(fill, monkeypatch):
    from comfyui_mend.engine import flow

    monkeypatch.setattr(flow, "_running_steps", lambda steps, strength: int(steps * strength))
    assert rejected(reference(fill, 0.6), ours(fill, strength=0.6))


def test_gate_rejects_kept_cells_that_are_not_masked_again(dev, monkeypatch):
    monkeypatch.setattr(schedulers.Schedule, "renoise", lambda self, clean, noise, index: clean)
    assert rejected(reference(dev), ours(dev))


# --- the default


def painted(pipeline, **options):
    defaults = {"compat": Compat.OFF, "width": 0, "height": 0, "crop": Crop.OFF, "color_match": 0.0}
    return ours(pipeline, **defaults | options)


@pytest.mark.parametrize("scheduler", ["K_EULER", "DPMSolverMultistep", "UniPC", "DEIS"])
@pytest.mark.parametrize("variant", ["fill", "dev", "schnell"])
def test_what_is_not_masked_stays_bit_identical(variant, scheduler, request):
    image, mask = photo_and_mask()
    _, result = painted(request.getfixturevalue(variant), scheduler=scheduler, strength=0.9, steps=4)
    assert torch.equal(result[mask == 0], image[mask == 0])
    assert (result - image)[mask == 1].abs().max() > 0.02


def test_the_default_differs_from_compat_by_what_it_does_better(fill):
    """The same sampling of the same canvas, but for the posterior's mean and the noise drawn without it before."""
    theirs, _ = reference(fill)
    mine, _ = ours(fill, compat=Compat.OFF, crop=Crop.OFF)
    assert mine.shape == theirs.shape
    assert 1e-3 < relative(theirs, mine) < 2


def test_a_soft_mask_stays_black_and_white_for_the_network(fill, monkeypatch):
    seen = []
    channels = flux.mask_channels
    monkeypatch.setattr(flux, "mask_channels", lambda hole, downscale: seen.append(hole) or channels(hole, downscale))
    _, mask = photo_and_mask()
    painted(fill, mask=mask * 0.5, soft=True, steps=4)
    assert set(torch.cat([hole.flatten() for hole in seen]).tolist()) == {0.0, 1.0}


def test_what_the_network_reads_is_told(fill, dev, schnell):
    for pipeline, conditioning in ((fill, Conditioning.CONCAT), (dev, Conditioning.REPLACE)):
        facts = make_model(flux, pipeline).facts
        assert facts.conditioning is conditioning
        assert facts.embedded_guidance
        assert (facts.native_size, facts.multiple, facts.latent_channels, facts.downscale) == (1024, 16, 16, 8)
        assert facts.prediction_type == "flow_prediction"
        assert facts.latent_format == "Flux"
    assert make_model(flux, schnell).facts.embedded_guidance
    assert make_model(flux, dev).t5.length == 512
    assert make_model(flux, schnell).t5.length == 256


@pytest.mark.parametrize(("guidance_scale", "told"), [(7.5, True), (14.9, True), (15.0, False), (30.0, False)])
def test_a_guidance_scale_that_is_not_fills_is_told(fill, guidance_scale, told):
    model = make_model(flux, fill)
    model.facts = replace(model.facts, native_size=64)
    image, mask = photo_and_mask(64, 64)
    request = InpaintRequest(
        image=image, mask=mask, steps=1, scheduler="K_EULER", guidance_scale=guidance_scale, crop=Crop.OFF
    )
    notices = inpaint.inpaint(request, model, HOST).notices
    assert any("about 30" in notice for notice in notices) is told


def test_the_shift_follows_the_canvas(fill, schnell):
    request = InpaintRequest(image=torch.zeros(1, 8, 8, 3), mask=torch.zeros(1, 8, 8), scheduler="K_EULER", steps=20)

    def middle(pipeline, side):
        return make_schedule(request, make_model(flux, pipeline), Size(side, side)).levels[10].noise

    for side, mu in ((256, 0.5), (1024, 1.15)):
        assert middle(fill, side) == pytest.approx(1 / (1 + math.exp(-mu)), abs=1e-5)
        assert middle(schnell, side) == pytest.approx(0.5)


def test_the_negative_prompt_is_not_read(dev):
    assert torch.equal(painted(dev, negative_prompt="dog")[0], painted(dev)[0])


def test_schnell_ignores_the_guidance_scale(schnell):
    assert torch.equal(painted(schnell, guidance_scale=3.5)[0], painted(schnell, guidance_scale=30)[0])


def test_rows_of_a_batch_are_each_their_own(fill):
    image, mask = photo_and_mask(width=96, height=96)
    images, masks = torch.cat([image, image.flip(2)]), torch.cat([mask, mask.flip(1)])
    options = {"prompt": PROMPT, "steps": 3, "scheduler": "K_EULER", "crop": Crop.OFF}
    model = make_model(flux, fill)
    together = inpaint.inpaint(InpaintRequest(image=images, mask=masks, seed=3, **options), model, HOST).images
    for row in range(2):
        one = InpaintRequest(image=images[row : row + 1], mask=masks[row : row + 1], seed=3 + row, **options)
        assert torch.allclose(inpaint.inpaint(one, model, HOST).images[0], together[row], atol=1e-5)


# --- packing


def test_packing_is_diffusers_own(fill):
    latents = torch.randn(2, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flux.pack(latents), fill._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(flux.unpack(flux.pack(latents), 6, 10), latents)
    places = fill._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(flux.token_places(6, 10), places)


def test_the_mask_has_a_channel_for_each_pixel_of_a_cell():
    hole = torch.zeros(1, 1, 16, 24)
    hole[0, 0, 8 + 3, 16 + 5] = 1  # row 3 and column 5 of the cell in row 1 and column 2
    channels = flux.mask_channels(hole, 8)
    assert channels.shape == (1, 64, 2, 3)
    assert channels.nonzero().tolist() == [[0, 3 * 8 + 5, 1, 2]]


# --- prompts


def encoded(pipeline, prompt, syntax=PromptSyntax.COMFY):
    with torch.no_grad():
        return make_model(flux, pipeline).encode_prompt([prompt], syntax)[0]


def test_a_plain_prompt_is_the_pipelines(fill):
    prompt = "a (red:1.3) cat " * 60
    with torch.no_grad():
        tokens, pooled, _ = fill.encode_prompt(prompt, None, device="cpu", max_sequence_length=512)
    mine = encoded(fill, prompt, PromptSyntax.PLAIN)
    assert relative(tokens, mine.tokens) <= LATENT_GATE
    assert relative(pooled, mine.pooled) <= LATENT_GATE


def test_a_prompt_without_emphasis_is_the_same_in_either_syntax(fill):
    one, other = (encoded(fill, PROMPT, syntax) for syntax in PromptSyntax)
    assert torch.allclose(one.tokens, other.tokens, atol=1e-5)
    assert torch.allclose(one.pooled, other.pooled, atol=1e-5)


def test_emphasis_moves_t5s_states_from_the_empty_prompts(fill):
    plain, empty, heavy = (encoded(fill, text).tokens for text in ("cat", "", "(cat:1.5)"))
    word = torch.tensor([id != 1 for id in fill.tokenizer_2("cat")["input_ids"]])
    count = int(word.sum())
    assert torch.allclose(heavy[:, :count], empty[:, :count] + 1.5 * (plain - empty)[:, :count], atol=1e-5)
    assert torch.equal(heavy[:, count:], plain[:, count:])


def test_emphasis_leaves_the_pooled_prompt_alone(fill):
    assert torch.equal(encoded(fill, "a cat").pooled, encoded(fill, "a (cat)").pooled)


def test_long_prompts_are_read_whole(fill):
    prompt = "a cat on the mat " * 200
    assert encoded(fill, prompt).tokens.shape[1] > 512
    assert encoded(fill, prompt, PromptSyntax.PLAIN).tokens.shape[1] == 512


def test_t5_knows_no_embeddings(fill):
    assert torch.equal(encoded(fill, "embedding:nothing cat").tokens, encoded(fill, "cat").tokens)


def test_a_file_without_tokenizer_is_refused_with_the_way_out(fill):
    with pytest.raises(ModelFileError, match=r"has no tokenizer for T5.*tiny-config"):
        flux.make(components(fill, name="tiny.safetensors"))


def test_the_hosts_t5_tokenizer_stands_in(fill, tmp_path):
    fill.tokenizer_2.save_pretrained(tmp_path)
    host = LocalHost(torch.device("cpu"), folders={"t5_tokenizer": [tmp_path]})
    with torch.no_grad():
        (mine,) = flux.make(components(fill, host=host)).encode_prompt([PROMPT], PromptSyntax.PLAIN)
        tokens, _, _ = fill.encode_prompt(PROMPT, None, device="cpu", max_sequence_length=512)
    assert relative(tokens, mine.tokens) <= LATENT_GATE


# --- files of the first release


def released(state, config):
    """diffusers' state dict as BFL's files have it: written as these are described, block by block."""
    result = {}

    def put(new, *old, swap=False):
        for kind in ("weight", "bias"):
            if f"{old[0]}.{kind}" in state:
                tensor = torch.cat([state.pop(f"{name}.{kind}") for name in old])
                result[f"{new}.{kind}"] = torch.cat(tensor.chunk(2)[::-1]) if swap else tensor

    def scale(new, old):
        result[f"{new}.scale"] = state.pop(f"{old}.weight")

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    embedders = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
    for new, old in embedders.items():
        put(f"{new}.in_layer", f"time_text_embed.{old}_embedder.linear_1")
        put(f"{new}.out_layer", f"time_text_embed.{old}_embedder.linear_2")
    for block in range(config["num_layers"]):
        new, old = f"double_blocks.{block}", f"transformer_blocks.{block}"
        put(f"{new}.img_mod.lin", f"{old}.norm1.linear")
        put(f"{new}.txt_mod.lin", f"{old}.norm1_context.linear")
        put(f"{new}.img_attn.qkv", *(f"{old}.attn.to_{part}" for part in "qkv"))
        put(f"{new}.txt_attn.qkv", *(f"{old}.attn.add_{part}_proj" for part in "qkv"))
        put(f"{new}.img_attn.proj", f"{old}.attn.to_out.0")
        put(f"{new}.txt_attn.proj", f"{old}.attn.to_add_out")
        for part in ("query", "key"):
            scale(f"{new}.img_attn.norm.{part}_norm", f"{old}.attn.norm_{part[0]}")
            scale(f"{new}.txt_attn.norm.{part}_norm", f"{old}.attn.norm_added_{part[0]}")
        for stream, mlp in (("img", "ff"), ("txt", "ff_context")):
            put(f"{new}.{stream}_mlp.0", f"{old}.{mlp}.net.0.proj")
            put(f"{new}.{stream}_mlp.2", f"{old}.{mlp}.net.2")
    for block in range(config["num_single_layers"]):
        new, old = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        put(f"{new}.modulation.lin", f"{old}.norm.linear")
        put(f"{new}.linear1", *(f"{old}.attn.to_{part}" for part in "qkv"), f"{old}.proj_mlp")
        put(f"{new}.linear2", f"{old}.proj_out")
        for part in ("query", "key"):
            scale(f"{new}.norm.{part}_norm", f"{old}.attn.norm_{part[0]}")
    put("final_layer.linear", "proj_out")
    put("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    assert not state, sorted(state)
    return result


@pytest.mark.parametrize("variant", ["fill", "schnell"])
def test_files_of_the_first_release_give_the_same_network(variant, request):
    transformer = request.getfixturevalue(variant).transformer
    config = dict(transformer.config)
    state = released(dict(transformer.state_dict()), config)
    read = flux.read_transformer(state, config)
    assert read.keys() == transformer.state_dict().keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in transformer.state_dict().items())
    weights = {key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in state.items()}
    assert flux.read_transformer(weights, config).keys() == read.keys()
    assert flux.read_transformer(read, config) == read
    assemble(lambda: flux.build_transformer(config), read, torch.float32, "tiny")


def test_the_map_covers_the_real_networks():
    """Names and shapes of the released sizes, without their weights."""
    config = {
        "in_channels": 384, "out_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }  # fmt: skip
    with torch.device("meta"):
        network = flux.build_transformer(config)
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    state = released(dict(network.state_dict()), config)
    assert state["single_blocks.37.linear1.weight"].shape == (3 * 3072 + 4 * 3072, 3072)
    read = flux.read_transformer(state, config)
    assert {key: tensor.shape for key, tensor in read.items()} == expected


def test_half_precision_is_brain_float():
    assert flux.TRANSFORMER.precision({}, torch.float16) == torch.bfloat16
    assert flux.T5.precision({}, torch.float16) == torch.bfloat16
    assert flux.T5.precision({}, torch.float32) == torch.float32


def test_a_whole_t5_gives_its_encoder(fill):
    encoder = fill.text_encoder_2
    state = {key: tensor for key, tensor in encoder.state_dict().items() if key != "encoder.embed_tokens.weight"}
    state |= {"decoder.embed_tokens.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    config = encoder.config.to_dict()
    module = assemble(lambda: flux.T5.build(config), flux.T5.read(state, config), torch.float32, "tiny")
    ids = torch.tensor([[5, 6, 1]])
    assert torch.allclose(module(ids)[0], encoder(ids)[0], atol=1e-6)
    assert module.shared is module.encoder.embed_tokens  # and not a second table of 260 MB


# --- loading


def split_files(pipeline, folder, prefix="", whole=False):
    """The pipeline as ComfyUI's users have it: BFL's file, clip_l, t5xxl and ae, or all of them in one."""
    config = dict(pipeline.transformer.config)
    transformer = released(dict(pipeline.transformer.state_dict()), config)
    clip = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in pipeline.text_encoder.state_dict().items()}
    clip |= {"logit_scale": torch.tensor(4.6), "text_projection.weight": torch.eye(32)}
    t5 = {key: v for key, v in pipeline.text_encoder_2.state_dict().items() if key != "encoder.embed_tokens.weight"}
    parts = {
        "flux": {prefix + key: value for key, value in transformer.items()},
        "clip_l": clip,
        "t5xxl": t5,
        "ae": original_vae(pipeline.vae, prefix="vae." if whole else ""),
    }
    if whole:
        parts["clip_l"] = {f"text_encoders.clip_l.transformer.{key}": value for key, value in clip.items()}
        parts["t5xxl"] = {f"text_encoders.t5xxl.transformer.{key}": value for key, value in t5.items()}
        parts = {"flux": {key: value for part in parts.values() for key, value in part.items()}}
    paths = {name: folder / f"{name}.safetensors" for name in parts}
    for name, state in parts.items():
        save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, paths[name])
    beside = save_configs(folder / "flux-config", pipeline, ("transformer", "vae", "text_encoder", "text_encoder_2"))
    pipeline.tokenizer_2.save_pretrained(beside / "tokenizer_2")
    return paths


def loads_the_same(pipeline, model):
    return relative(ours(pipeline)[0], ours(pipeline, model)[0]) <= LATENT_GATE


@pytest.mark.parametrize("variant", ["fill", "schnell"])
def test_a_folder_loads(variant, request, tmp_path):
    pipeline = request.getfixturevalue(variant)
    pipeline.save_pretrained(tmp_path / variant)
    found = recognise_folder(tmp_path / variant)
    assert (found.family, found.variant) == ("flux", variant)
    model = load_model(tmp_path / variant, HOST)
    assert loads_the_same(pipeline, model)
    assert model.t5.length == (256 if variant == "schnell" else 512)


def test_split_files_load(fill, tmp_path):
    paths = split_files(fill, tmp_path)
    texts = [paths["t5xxl"], paths["clip_l"]]
    assert loads_the_same(fill, load_model(paths["flux"], HOST, vae=paths["ae"], text_encoders=texts))
    for lacking in ({"vae": paths["ae"], "text_encoders": texts[1:]}, {"text_encoders": texts}):
        with pytest.raises(ModelFileError, match=r"holds a transformer but no (text encoder 2|VAE)"):
            load_model(paths["flux"], HOST, **lacking)


def test_one_file_of_everything_loads(fill, tmp_path):
    paths = split_files(fill, tmp_path, prefix="model.diffusion_model.", whole=True)
    assert loads_the_same(fill, load_model(paths["flux"], HOST))


def test_text_encoders_of_other_models_are_refused(fill, tmp_path):
    paths = split_files(fill, tmp_path)
    tiny_t5(48).save_pretrained(tmp_path / "other")
    wrong = tmp_path / "other" / "model.safetensors"
    with pytest.raises(ModelFileError, match=r"T5 text encoder of width 48, which FLUX\.1 .* does not read"):
        load_model(paths["flux"], HOST, vae=paths["ae"], text_encoders=[paths["clip_l"], wrong])


def test_files_of_full_size_are_told_and_load_unread(tmp_path):
    """Sparse files of zeros under the published names: 31 GiB that take no room and are never read."""
    folder = CONFIGS / "flux-fill"
    with torch.device("meta"):
        parts = {part.name: part.build(read_json(folder / part.name / "config.json")) for part in flux.FLUX.parts}
    config = dict(parts["transformer"].config)
    states = {
        "flux": released(dict(parts["transformer"].state_dict()), config),
        "ae": original_vae(parts["vae"], prefix=""),
        "clip_l": {
            f"text_model.{k.removeprefix('text_model.')}": v for k, v in parts["text_encoder"].state_dict().items()
        },
        "t5xxl": {k: v for k, v in parts["text_encoder_2"].state_dict().items() if k != "encoder.embed_tokens.weight"},
    }
    paths = {
        name: write_header(tmp_path / f"{name}.safetensors", {k: tuple(v.shape) for k, v in state.items()}, "BF16")
        for name, state in states.items()
    }
    found = recognise(paths["flux"])
    assert (found.family, found.variant) == ("flux", "fill")
    assert find_parts(paths["flux"]).folder == folder
    tiny_t5_tokenizer().save_pretrained(tmp_path / "t5")
    host = LocalHost(torch.device("cpu"), torch.bfloat16, folders={"t5_tokenizer": [tmp_path / "t5"]})
    model = load_model(paths["flux"], host, vae=paths["ae"], text_encoders=[paths["clip_l"], paths["t5xxl"]])
    assert model.facts.conditioning is Conditioning.CONCAT
    for managed, part in ((model.denoiser, "transformer"), (model.t5.encoder, "text_encoder_2"), (model.vae, "vae")):
        expected = {key: value.shape for key, value in parts[part].state_dict().items()}
        assert {key: value.shape for key, value in managed.module.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("variant", "millions", "dynamic"),
    [("dev", 11901.408, True), ("fill", 11902.391, True), ("schnell", 11891.179, False)],
)
def test_shipped_configs_have_the_published_sizes(variant, millions, dynamic):
    folder = CONFIGS / f"flux-{variant}"
    assert check_folder(folder) is flux.FLUX
    assert recognise_folder(folder).variant == variant
    with torch.device("meta"):
        network = flux.build_transformer(read_json(folder / "transformer" / "config.json"))
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert network.config.guidance_embeds == (variant != "schnell")
    assert read_json(folder / "scheduler" / "scheduler_config.json")["use_dynamic_shifting"] == dynamic
    vae = read_json(folder / "vae" / "config.json")
    assert (vae["scaling_factor"], vae["shift_factor"], vae["latent_channels"]) == (0.3611, 0.1159, 16)


def test_a_control_model_is_refused(fill, tmp_path):
    fill.save_pretrained(tmp_path / "control")
    path = tmp_path / "control" / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"in_channels": 384', '"in_channels": 128'))
    with pytest.raises(ModelFileError, match="FLUX canny or depth model"):
        load_model(tmp_path / "control", HOST)
