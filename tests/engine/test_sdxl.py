"""SDXL against diffusers' own pipeline on the same random weights, and what must not pass for it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from comfyui_mend.engine import inpaint, sampling
from comfyui_mend.engine.crop import around
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models import ldm, sdxl
from comfyui_mend.engine.models.detect import CONFIGS, recognise
from comfyui_mend.engine.models.family import LoadOptions, SizeConditioning
from comfyui_mend.engine.models.load import find_parts, load_model
from comfyui_mend.engine.models.protocol import Canvas, Conditioning, Place, PromptSyntax
from comfyui_mend.engine.models.weight_files import read_json
from comfyui_mend.engine.prompts import TextLayer
from comfyui_mend.engine.types import Box, Compat, Crop, InpaintRequest, InputError, ModelFileError, Size
from headers import write_header
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import photo_and_mask, relative
from tiny_sdxl import (
    clip_state,
    original_sdxl,
    save_sdxl_configs,
    save_sdxl_file,
    save_tiny_sdxl,
    sdxl_engine_model,
    tiny_sdxl,
)
from tiny_single_file import original_unet, original_vae

SCHEDULERS = {
    "K_EULER": "EulerDiscreteScheduler",
    "DDIM": "DDIMScheduler",
    "DPMSolverMultistep": "DPMSolverMultistepScheduler",
}
STEPS, SCALE, SEED, SIDE = 8, 7.5, 7, 128
GATE = 1e-5


@pytest.fixture(scope="module")
def nine():
    return tiny_sdxl(in_channels=9)


@pytest.fixture(scope="module")
def four():
    return tiny_sdxl(in_channels=4)


@pytest.fixture(params=["nine", "four"], ids=["9-channel", "4-channel"])
def pipeline(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def folder(nine, tmp_path_factory):
    """A diffusers folder; tests that change it copy it."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("saved") / "tiny", nine)


@pytest.fixture
def changed(folder, tmp_path):
    """(part, settings) -> the folder with another config."""

    def change(part, **settings):
        copy = shutil.copytree(folder, tmp_path / "tiny")
        path = copy / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return copy

    return change


@pytest.fixture
def host():
    return LocalHost(device=torch.device("cpu"))


def reference(pipeline, scheduler="K_EULER", strength=1.0, negative="", **options):
    """Latents of StableDiffusionXLInpaintPipeline."""
    import diffusers

    pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipeline.scheduler.config)
    image, mask = photo_and_mask()
    return pipeline(
        prompt="a cat on a mat",
        negative_prompt=negative,
        image=Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()),
        mask_image=Image.fromarray((mask[0] * 255).round().to(torch.uint8).numpy()),
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        strength=strength,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **options,
    ).images


def request_of(scheduler="K_EULER", strength=1.0, **options):
    image, mask = photo_and_mask()
    return InpaintRequest(
        image=image,
        mask=mask,
        prompt="a cat on a mat",
        scheduler=scheduler,
        steps=STEPS,
        guidance_scale=SCALE,
        strength=strength,
        seed=SEED,
        width=SIDE,
        height=SIDE,
        **{"compat": Compat.DIFFUSERS, **options},
    )


def ours(pipeline, scheduler="K_EULER", strength=1.0, model=None, **options):
    """Latents of the engine, caught where they are decoded."""
    model = model or sdxl_engine_model(pipeline)
    caught = []
    decode = model.decode
    model.decode = lambda latents: (caught.append(latents), decode(latents))[1]
    inpaint.inpaint(request_of(scheduler, strength, **options), model, LocalHost(torch.device("cpu")))
    return caught[0]


@pytest.mark.parametrize(
    ("scheduler", "strength"),
    [("K_EULER", 1.0), ("K_EULER", 0.9999), ("K_EULER", 0.6), ("DDIM", 1.0), ("DPMSolverMultistep", 0.6)],
)
def test_compat_reproduces_the_pipeline(pipeline, scheduler, strength):
    assert relative(reference(pipeline, scheduler, strength), ours(pipeline, scheduler, strength)) <= GATE


def test_compat_reproduces_a_negative_of_zeros(pipeline):
    assert relative(reference(pipeline, negative=None), ours(pipeline, zero_negative=True)) <= GATE


def test_compat_reproduces_both_prompts_in_a_batch(nine):
    theirs = reference(nine, negative="a dog", num_images_per_prompt=2)
    mine = ours(nine, negative_prompt="a dog", zero_negative=True, count=2)
    assert theirs.shape[0] == mine.shape[0] == 2
    assert relative(theirs, mine) <= GATE


@pytest.mark.parametrize("settings", [{}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}], ids=str)
def test_v_prediction_is_reproduced(settings):
    from diffusers import EulerDiscreteScheduler

    pipeline = tiny_sdxl(in_channels=4, prediction_type="v_prediction")
    pipeline.scheduler = EulerDiscreteScheduler.from_config({**pipeline.scheduler.config, **settings})
    assert relative(reference(pipeline), ours(pipeline)) <= GATE


def test_strength_one_runs_every_step(nine):
    """The pipeline's own default is 0.9999, which leaves one step out and starts from the picture."""

    def evaluations(strength):
        request, model = request_of(strength=strength, compat=Compat.OFF), sdxl_engine_model(nine)
        return sampling.make_schedule(request, model, Size(SIDE, SIDE)).evaluations

    assert (evaluations(1.0), evaluations(0.9999)) == (STEPS, STEPS - 1)
    assert relative(reference(nine), reference(nine, strength=0.9999)) > 0.1


# Negative controls: each is a plausible way to get it wrong, and the gate must see it by a wide margin.


def test_gate_tells_zeros_from_the_empty_text(pipeline):
    assert relative(reference(pipeline, negative=None), ours(pipeline)) > 0.1


def test_gate_tells_another_size(pipeline, monkeypatch):
    """What ComfyUI's CLIPTextEncodeSDXL says unless told otherwise."""
    theirs = reference(pipeline)
    ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])
    monkeypatch.setattr(sdxl.SDXLModel, "_time_ids", lambda self, canvas: ids.expand(len(canvas.noise), -1))
    assert relative(theirs, ours(pipeline)) > 5e-3
    again = reference(pipeline, original_size=(1024, 1024), target_size=(1024, 1024))
    assert relative(again, ours(pipeline)) <= GATE


@pytest.mark.parametrize(
    "layer", [TextLayer(1, normed=False), TextLayer(2, normed=True), TextLayer(3, normed=False)], ids=str
)
def test_gate_tells_another_layer(nine, layer):
    model = sdxl_engine_model(nine)
    model.readers = tuple(replace(reader, layer=layer) for reader in model.readers)
    assert relative(reference(nine), ours(nine, model=model)) > 50 * GATE


def test_gate_tells_the_other_encoders_padding(nine):
    model = sdxl_engine_model(nine)
    model.readers = (model.readers[0], replace(model.readers[1], tokenizer=nine.tokenizer))
    assert relative(reference(nine), ours(nine, model=model)) > 50 * GATE


# --- prompts


@pytest.mark.parametrize("prompt", ["a cat on a mat", "", "word " * 90])
def test_plain_prompts_are_the_pipelines(nine, prompt):
    tokens, _, pooled, _ = nine.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    (found,) = sdxl_engine_model(nine).encode_prompt([prompt], PromptSyntax.PLAIN)
    torch.testing.assert_close(found.tokens, tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=1e-6)


def test_the_pooled_prompt_is_the_first_chunks_and_unweighted(nine):
    model = sdxl_engine_model(nine)
    long = "word " * 90
    weighted, bare, chunked, cut = model.encode_prompt(["a (cat:1.5)", "a cat", long, "word " * 75], PromptSyntax.COMFY)
    assert torch.allclose(weighted.pooled, bare.pooled, rtol=0, atol=1e-6)
    assert not torch.allclose(weighted.tokens, bare.tokens, atol=1e-3)
    assert chunked.tokens.shape == (1, 154, 80)
    assert torch.allclose(chunked.pooled, cut.pooled, rtol=0, atol=1e-6)


def test_no_prompt_is_zeros(nine):
    nothing, empty = sdxl_engine_model(nine).encode_prompt([None, ""], PromptSyntax.COMFY)
    assert nothing.tokens.shape == empty.tokens.shape and nothing.pooled.shape == empty.pooled.shape
    assert not nothing.tokens.any() and not nothing.pooled.any()
    assert empty.tokens.any() and empty.pooled.any()


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_counts_layers_from_the_last(nine, folder, host, skip):
    """diffusers counts from the last but one."""
    model = load_model(folder, host, options=LoadOptions(clip_skip=skip))
    tokens, _, pooled, _ = nine.encode_prompt(
        "a cat", device="cpu", do_classifier_free_guidance=False, clip_skip=skip - 2
    )
    (found,) = model.encode_prompt(["a cat"], PromptSyntax.PLAIN)
    torch.testing.assert_close(found.tokens, tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=1e-6)


def test_embeddings_have_vectors_for_each_encoder(folder, tmp_path):
    vectors = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(vectors, tmp_path / "style.safetensors")
    save_file({"emb_params": vectors["clip_l"]}, tmp_path / "old.safetensors")
    host = LocalHost(device=torch.device("cpu"), folders={"embeddings": [tmp_path]})
    model = load_model(folder, host)
    both, first, none = model.encode_prompt(
        ["a embedding:style cat", "a embedding:old cat", "a cat"], PromptSyntax.COMFY
    )

    def differs(one, other):
        return (one.tokens[..., :32] - other.tokens[..., :32]).abs().max() > 0.05, (
            one.tokens[..., 32:] - other.tokens[..., 32:]
        ).abs().max() > 0.05

    assert differs(both, none) == (True, True)
    # one made for SD 1 has nothing for the second encoder
    assert differs(first, none) == (True, False)


# --- size and place

SIZE = Size(128, 96)


def canvas_of(places, rows=1, size=SIZE):
    noise = torch.zeros(rows, 4, size.height // 8, size.width // 8)
    hole = torch.ones(1, 1, size.height, size.width)
    return Canvas(noise=noise, mask=noise[:1, :1], hole=hole, image=None, masked_image=noise, places=places)


def test_the_network_is_told_the_canvas(nine):
    model = sdxl_engine_model(nine)
    assert model._time_ids(canvas_of((), rows=2)).tolist() == [[96, 128, 0, 0, 96, 128]] * 2
    plan = around(Box(600, 400, 640, 432), Size(1000, 800), 128, 8)
    assert model._time_ids(canvas_of((Place(Size(1000, 800), plan),))).tolist() == [[96, 128, 0, 0, 96, 128]]


def test_the_network_can_be_told_of_the_picture(nine):
    model = sdxl_engine_model(nine, size_conditioning=SizeConditioning.PICTURE)
    picture = Size(1000, 800)
    plan = around(Box(600, 400, 720, 520), picture, 128, 8)
    scale = plan.canvas.width / plan.box.width
    (ids,) = model._time_ids(canvas_of((Place(picture, plan),), size=plan.canvas)).tolist()
    assert ids[:2] == [800, 1000] and ids[4:] == [plan.canvas.height, plan.canvas.width]
    assert ids[2:4] == pytest.approx([plan.box.top * scale, plan.box.left * scale], rel=0.02)
    # the whole picture on the canvas is where both ways agree, and compat has no place
    assert model._time_ids(canvas_of(())).tolist() == [[96, 128, 0, 0, 96, 128]]


def test_each_row_has_its_own_place(nine):
    model = sdxl_engine_model(nine, size_conditioning=SizeConditioning.PICTURE)
    seen = []
    unet = nine.unet
    hook = unet.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    image = torch.rand(1, 160, 600, 3)
    mask = torch.zeros(1, 160, 600)
    mask[0, 60:90, 20:50] = mask[0, 60:90, 500:530] = 1
    try:
        request = InpaintRequest(image=image, mask=mask, crop=Crop.EACH, steps=1, scheduler="K_EULER")
        inpaint.inpaint(request, model, LocalHost(torch.device("cpu")))
    finally:
        hook.remove()
    rows = [tuple(row) for row in torch.cat(seen).tolist()]
    assert len(set(rows)) == 2 and all(rows.count(row) == 2 for row in rows)
    assert {row[:2] for row in rows} == {(160.0, 600.0)}


# --- loading


def assert_same_weights(one, other):
    pairs = [(one.denoiser, other.denoiser), (one.vae, other.vae)]
    pairs += [(a.encoder, b.encoder) for a, b in zip(one.readers, other.readers, strict=True)]
    for found, expected in pairs:
        expected = expected.module.state_dict()
        assert found.module.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.module.state_dict().items())


def test_a_folder_and_a_single_file_paint_the_same(nine, folder, tmp_path, host):
    saved = load_model(folder, host)
    file = load_model(save_sdxl_file(tmp_path / "one.safetensors", nine), host)
    assert_same_weights(saved, sdxl_engine_model(nine))
    assert_same_weights(file, saved)
    for model in (saved, file):
        assert model.facts.conditioning is Conditioning.CONCAT
        assert model.facts.native_size == 128
        assert [reader.tokenizer.pad_token for reader in model.readers] == ["<|endoftext|>", "!"]
    assert torch.equal(ours(nine, model=saved), ours(nine, model=file))


def test_a_single_file_equals_what_diffusers_reads_from_it(nine, tmp_path, host):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    path = save_sdxl_file(tmp_path / "one.safetensors", nine)
    model = load_model(path, host)
    for managed, model_class, part in (
        (model.denoiser, UNet2DConditionModel, "unet"),
        (model.vae, AutoencoderKL, "vae"),
    ):
        theirs = model_class.from_single_file(
            str(path), config=str(tmp_path / "one-config"), subfolder=part, local_files_only=True
        ).state_dict()
        found = managed.module.state_dict()
        assert found.keys() == theirs.keys()
        assert all(torch.equal(found[key], value) for key, value in theirs.items())
    theirs = convert_open_clip_checkpoint(nine.text_encoder_2, load_file(path), ldm.SDXL_OPEN_CLIP_PREFIX)
    found = model.readers[1].encoder.module.state_dict()
    for key, value in found.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_split_files_load(nine, tmp_path, host, prefix, layout):
    """As ComfyUI keeps them: diffusion_models, text_encoders and vae."""
    if layout == "original":
        unet, vae = original_unet(nine.unet, prefix), original_vae(nine.vae, "")
        second = {key: value for key, value in original_sdxl(nine).items() if key.startswith("conditioner.embedders.1")}
        second = ldm.component(second, ldm.SDXL_OPEN_CLIP_PREFIX)
    else:
        unet = {prefix + key: value for key, value in nine.unet.state_dict().items()}
        vae, second = nine.vae.state_dict(), nine.text_encoder_2.state_dict()
    first = {f"text_model.{key}": value for key, value in clip_state(nine).items()}
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("unet", "vae", "clip_l", "clip_g")}
    for path, state in zip(paths.values(), (unet, vae, first, second), strict=True):
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    save_sdxl_configs(paths["unet"], nine)
    model = load_model(paths["unet"], host, vae=paths["vae"], text_encoders=[paths["clip_g"], paths["clip_l"]])
    assert_same_weights(model, sdxl_engine_model(nine))
    with pytest.raises(ModelFileError, match=r"unet.safetensors holds a UNet but no VAE: choose a VAE file"):
        load_model(paths["unet"], host, text_encoders=[paths["clip_g"], paths["clip_l"]])
    with pytest.raises(ModelFileError, match=r"holds a UNet but no text encoder 2: choose its file as a text encoder"):
        load_model(paths["unet"], host, vae=paths["vae"], text_encoders=[paths["clip_l"]])
    with pytest.raises(
        ModelFileError, match=r"clip_l.safetensors is a CLIP text encoder of width 32, which SDXL .* 48"
    ):
        load_model(paths["unet"], host, vae=paths["vae"], text_encoders=[paths["clip_l"]] * 2)
    with pytest.raises(ModelFileError, match=r"vae.safetensors is a VAE alone, where a text encoder"):
        load_model(paths["unet"], host, vae=paths["vae"], text_encoders=[paths["vae"]])


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        ((), {"prediction_type": "epsilon"}),
        (("v_pred",), {"prediction_type": "v_prediction"}),
        (("v_pred", "ztsnr"), {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
)
def test_markers_of_v_prediction_are_read(nine, tmp_path, host, markers, expected):
    extra = {marker: torch.zeros(0) for marker in markers}
    path = save_sdxl_file(tmp_path / "one.safetensors", nine, extra)
    facts = load_model(path, host).facts
    assert {key: facts.scheduler_config[key] for key in expected} == expected
    assert ("v_pred" in markers) == (facts.prediction_type == "v_prediction")
    chosen = load_model(path, host, prediction_type="epsilon").facts
    assert chosen.prediction_type == "epsilon"


@pytest.mark.parametrize(("force_upcast", "expected"), [(True, torch.float32), (False, torch.float16)])
def test_a_vae_that_overflows_in_half_precision_is_kept_whole(changed, force_upcast, expected):
    folder = changed("vae", force_upcast=force_upcast)
    model = load_model(folder, LocalHost(device=torch.device("cpu"), weights_dtype=torch.float16))
    assert model.vae.dtype == expected and model.denoiser.dtype == torch.float16
    bfloat = load_model(folder, LocalHost(device=torch.device("cpu"), weights_dtype=torch.bfloat16))
    assert bfloat.vae.dtype == torch.bfloat16


def test_the_refiner_is_refused_by_name(changed, host):
    with pytest.raises(ModelFileError, match="tiny is the SDXL refiner: choose an SDXL base or inpainting model"):
        load_model(changed("unet", cross_attention_dim=1280), host)


@pytest.mark.parametrize("skip", [-1, 25])
def test_clip_skip_has_a_range(skip):
    with pytest.raises(InputError, match=f"clip_skip is {skip}; give a value from 1 to 24, or 0"):
        LoadOptions(clip_skip=skip)


def test_clip_skip_stays_inside_the_text_encoder(folder, host):
    with pytest.raises(InputError, match="clip_skip is 5, and a text encoder of tiny has 4 layers"):
        load_model(folder, host, options=LoadOptions(clip_skip=5))


# --- the published sizes


@pytest.fixture(scope="module")
def published():
    """SDXL's networks in full size, without storage."""
    with torch.device("meta"):
        return {
            part.name: part.build(read_json(CONFIGS / "sdxl" / part.name / "config.json")) for part in sdxl.SDXL.parts
        }


def test_shipped_configs_have_the_published_sizes(published):
    millions = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in published.items()}
    assert millions["unet"] == pytest.approx(2567.463684, abs=1e-6)
    assert millions["vae"] == pytest.approx(83.6539, abs=0.0001)
    assert millions["text_encoder"] == pytest.approx(123.0604, abs=0.0001)
    assert millions["text_encoder_2"] == pytest.approx(694.6598, abs=0.0001)
    assert published["vae"].config.scaling_factor == 0.13025


def test_the_inpainting_model_differs_by_its_first_layer():
    configs = {
        name: {part: read_json(CONFIGS / name / part / "config.json") for part in ("unet", "vae", "text_encoder_2")}
        for name in ("sdxl", "sdxl-inpaint")
    }
    configs["sdxl"]["unet"]["in_channels"] = 9
    assert configs["sdxl"] == configs["sdxl-inpaint"]


def test_a_single_file_of_full_size_is_told_and_loads_unread(tmp_path, published):
    """A sparse file of zeros under the published names: 7 GiB that take no room and are never read."""
    original = original_sdxl(type("Pipeline", (), published)())
    path = write_header(tmp_path / "sdxl.safetensors", {key: tuple(value.shape) for key, value in original.items()})
    found = recognise(path)
    assert (found.family, found.variant) == ("sdxl", "")
    assert find_parts(path).folder == CONFIGS / "sdxl"
    model = load_model(path, LocalHost(device=torch.device("cpu"), weights_dtype=torch.float16))
    assert model.facts.native_size == 1024
    for part, managed in (("unet", model.denoiser), ("text_encoder_2", model.readers[1].encoder)):
        expected = {key: value.shape for key, value in published[part].state_dict().items()}
        assert {key: value.shape for key, value in managed.module.state_dict().items()} == expected
