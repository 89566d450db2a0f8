"""Qwen-Image and Qwen-Image-Edit with diffusers' modules: ``compat="diffusers"`` against its own pipelines, the places
of a picture's tokens that these miss, prompts, and files.

Random networks give latents of any size, so differences are relative to the largest latent.
"""

import inspect
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from comfyui_mend.engine import flow
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.memory import Form
from comfyui_mend.engine.models import qwen_image, qwen_text, wan_vae
from comfyui_mend.engine.models.detect import CONFIGS, recognise, recognise_folder
from comfyui_mend.engine.models.load import check_folder, find_parts, load_model
from comfyui_mend.engine.models.modules import assemble
from comfyui_mend.engine.models.protocol import Conditioning, PromptSyntax
from comfyui_mend.engine.models.qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_2509
from comfyui_mend.engine.models.qwen_text import Picture
from comfyui_mend.engine.models.weight_files import read_json
from comfyui_mend.engine.types import Compat, Crop, InputError, MendError, ModelFileError
from headers import write_header
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import as_pil, photo_and_mask, relative
from tiny_flow import latents_and_images, tiny_t5, tiny_vae
from tiny_qwen import (
    SCHEDULER,
    make_qwen_model,
    tiny_language_model,
    tiny_qwen_image,
    tiny_qwen_image_edit,
    write_qwen_tokenizer,
)
from tiny_qwen_files import save_folder, split_states
from tiny_single_file import save_configs

STEPS, SCALE, SEED, PROMPT, NEGATIVE = 6, 4.0, 7, "a red cat on the mat", "dog"
# whole patches of the network and whole tokens of the vision tower
WIDTH, HEIGHT = 224, 112
LATENT_GATE, IMAGE_GATE = 1e-5, 5e-5
HOST = LocalHost(torch.device("cpu"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_qwen_image(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    pytest.importorskip(EDITING, reason="diffusers before 0.36 has no pipeline that edits under a mask")
    return tiny_qwen_image_edit(tmp_path_factory.mktemp("edit"))


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """As 2511: it takes the picture that it edits for free of noise."""
    skip_unless_still()
    return tiny_qwen_image_edit(tmp_path_factory.mktemp("still"), zero_cond_t=True)


def skip_unless_still():
    from diffusers import QwenImageTransformer2DModel

    if "zero_cond_t" not in inspect.signature(QwenImageTransformer2DModel.__init__).parameters:
        pytest.skip("diffusers before 0.37 knows no such network")


EDITING = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_inpaint"
FAMILY = {"plain": QWEN_IMAGE, "edit": QWEN_IMAGE_EDIT, "still": QWEN_IMAGE_EDIT}


def scene():
    return photo_and_mask(WIDTH, HEIGHT)


def reference(pipeline, strength=1.0, count=1, guidance_scale=SCALE):
    """(latents, images) of the pipeline."""
    image, mask = as_pil(*scene())
    options = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "image": image,
        "mask_image": mask,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "true_cfg_scale": guidance_scale,
        "strength": strength,
        "num_images_per_prompt": count,
    }
    results = []
    for kind in ("latent", "pt"):
        # the editing pipelines paint no other size than one of 1024x1024 pixels in all
        edits = "Edit" in type(pipeline).__name__
        size = mock.patch(f"{EDITING}.calculate_dimensions", lambda *_: (WIDTH, HEIGHT, None))
        with torch.no_grad(), size if edits else nullcontext():
            results.append(pipeline(**options, generator=torch.Generator().manual_seed(SEED), output_type=kind).images)
    latents = pipeline._unpack_latents(results[0], HEIGHT, WIDTH, 8)[:, :, 0]
    return latents, results[1].permute(0, 2, 3, 1)


def ours(model, **options):
    """(latents, images) of the engine."""
    image, mask = scene()
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": SCALE, "seed": SEED}
    size = {"image": image, "mask": mask, "width": WIDTH, "height": HEIGHT}
    return latents_and_images(model, **common | size | options)


def as_it_is(**options):
    """Options of a run that is not squeezed to a size."""
    return {"compat": Compat.OFF, "width": 0, "height": 0, "crop": Crop.OFF} | options


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("variant", FAMILY)
def test_compat_reproduces_the_pipeline(variant, strength, request):
    pipeline = request.getfixturevalue(variant)
    theirs, mine = reference(pipeline, strength), ours(make_qwen_model(FAMILY[variant], pipeline), strength=strength)
    assert relative(theirs[0], mine[0]) <= LATENT_GATE
    assert float((theirs[1] - mine[1]).abs().max()) <= IMAGE_GATE


@pytest.mark.parametrize("variant", ["plain", "edit"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_compat_reproduces_a_batch(variant, guidance_scale, request):
    pipeline = request.getfixturevalue(variant)
    theirs = reference(pipeline, 0.7, count=2, guidance_scale=guidance_scale)
    model = make_qwen_model(FAMILY[variant], pipeline)
    mine = ours(model, strength=0.7, count=2, guidance_scale=guidance_scale)
    assert mine[0].shape[0] == 2
    assert relative(theirs[0], mine[0]) <= LATENT_GATE


# --- the places of a picture's tokens


def test_places_are_those_the_language_model_was_trained_with(edit):
    """By transformers' own computation, which its callers have to ask for."""
    language = edit.text_encoder.model
    picture_token = language.config.image_token_id
    ids = torch.tensor([[1, 2, *[picture_token] * 15, 3, 4, 5]])
    grid = torch.tensor([[1, 6, 10]])
    given = {"image_grid_thw": grid, "attention_mask": torch.ones_like(ids)}
    if qwen_text.pipelines_count_through():
        given["mm_token_type_ids"] = (ids == picture_token).int()
    theirs, _ = language.get_rope_index(ids, **given)
    assert torch.equal(qwen_text.places(ids.shape[1], 2, (3, 5)), theirs)


def test_the_default_gives_a_picture_its_places_where_the_pipelines_do_not(edit):
    """Pipelines that were written for transformers 4 hand version 5 too little to compute them."""
    model = make_qwen_model(QWEN_IMAGE_EDIT, edit)
    picture = Picture.of(scene()[0][0].permute(2, 0, 1) * 2 - 1)
    trained = model.reader.read_with(PROMPT, picture, PromptSyntax.COMFY)
    pipelines = model.reader.read_with(PROMPT, picture, PromptSyntax.PLAIN)
    if qwen_text.pipelines_count_through():
        assert relative(trained, pipelines) > 1e-2
    else:
        assert relative(trained, pipelines) <= LATENT_GATE


def test_gate_rejects_the_other_places(edit, monkeypatch):
    counts = qwen_text.pipelines_count_through()
    monkeypatch.setattr(qwen_text, "pipelines_count_through", lambda: not counts)
    assert rejected(reference(edit), ours(make_qwen_model(QWEN_IMAGE_EDIT, edit)), least=5e-4)


# Negative controls: each is a plausible way to get it wrong, and the gate must see it by a wide margin.


def rejected(theirs, mine, least=50 * LATENT_GATE):
    return relative(theirs[0], mine[0]) > least


@pytest.mark.parametrize(
    "norms",
    [lambda planes: torch.ones(()), lambda planes: planes.norm(dim=1, keepdim=True)],
    ids=["not kept", "of cells in the place of tokens"],
)
def test_gate_rejects_guidance_of_another_length(plain, monkeypatch, norms):
    monkeypatch.setattr(qwen_image, "token_norms", norms)
    assert rejected(reference(plain), ours(make_qwen_model(QWEN_IMAGE, plain)), least=1e-3)


@pytest.mark.parametrize("changes", [{"shift_terminal": None}, {"max_shift": 1.15}, {"use_dynamic_shifting": False}])
def test_gate_rejects_another_schedule(plain, changes):
    model = make_qwen_model(QWEN_IMAGE, plain, scheduler={**SCHEDULER, **changes})
    # between 256 tokens and fewer another end of the slope is little
    assert rejected(reference(plain), ours(model), least=5e-4)


def test_gate_rejects_states_of_the_chats_head(plain, monkeypatch):
    monkeypatch.setattr(qwen_text.Chat, "head", "<|im_start|>")
    assert rejected(reference(plain), ours(make_qwen_model(QWEN_IMAGE, plain)), least=1e-3)


def test_gate_rejects_a_picture_that_is_not_shown_again(edit, monkeypatch):
    monkeypatch.setattr(qwen_image.QwenImageEditModel, "_rows", lambda self, state, canvas: (state,))
    assert rejected(reference(edit), ours(make_qwen_model(QWEN_IMAGE_EDIT, edit)), least=1e-2)


def test_gate_rejects_a_language_model_that_sees_another_picture(edit, monkeypatch):
    monkeypatch.setattr(Picture, "of", lambda pixels: Picture.from_image(Image.new("RGB", (WIDTH, HEIGHT))))
    assert rejected(reference(edit), ours(make_qwen_model(QWEN_IMAGE_EDIT, edit)))


def test_gate_rejects_one_scale_for_all_channels(plain):
    model = make_qwen_model(QWEN_IMAGE, plain)
    model._scaling_factor = model._scaling_factor.mean().reshape(1, 1, 1, 1)
    assert rejected(reference(plain), ours(model), least=1e-2)


# --- the default


@pytest.mark.parametrize("scheduler", flow.FLOW_SCHEDULERS)
@pytest.mark.parametrize("variant", ["plain", "edit"])
def test_what_is_not_masked_stays_bit_identical(variant, scheduler, request):
    image, mask = scene()
    model = make_qwen_model(FAMILY[variant], request.getfixturevalue(variant))
    _, result = ours(model, **as_it_is(steps=4, strength=0.8, scheduler=scheduler))
    assert torch.equal(result[mask == 0], image[mask == 0])
    assert (result - image)[mask == 1].abs().max() > 0.02


def two_pictures():
    image, mask = scene()
    return torch.cat([image, image.flip(1)]), torch.cat([mask, mask])


def test_each_picture_of_a_batch_is_shown_with_the_prompt(edit):
    images, masks = two_pictures()
    together = ours(make_qwen_model(QWEN_IMAGE_EDIT, edit), **as_it_is(image=images, mask=masks))[0]
    for number in range(2):
        model = make_qwen_model(QWEN_IMAGE_EDIT, edit)
        one = {"image": images[number : number + 1], "mask": masks[:1], "seed": SEED + number}
        alone = ours(model, **as_it_is(**one))[0]
        assert relative(alone, together[number : number + 1]) <= LATENT_GATE


def test_rows_that_are_painted_apart_keep_their_own_pictures(edit, monkeypatch):
    images, masks = two_pictures()
    model = make_qwen_model(QWEN_IMAGE_EDIT, edit)
    options = as_it_is(image=images, mask=masks)
    together = ours(model, **options)[0]
    rows = []
    guided = qwen_image.QwenImageEditModel._guided

    def counted(self, part, *arguments, **options):
        rows.append(len(part[0]))
        return guided(self, part, *arguments, **options)

    monkeypatch.setattr(qwen_image.QwenImageEditModel, "_guided", counted)
    monkeypatch.setattr("comfyui_mend.engine.models.diffusers_model.halved", lambda rows: [Form(1)])
    assert relative(together, ours(model, **options)[0]) <= LATENT_GATE
    assert set(rows) == {1}


def test_a_prompt_and_its_picture_are_read_once(edit, monkeypatch):
    model = make_qwen_model(QWEN_IMAGE_EDIT, edit)
    monkeypatch.setattr("comfyui_mend.engine.models.diffusers_model.REMEMBERED_BYTES", 2000)
    states = mock.Mock(side_effect=lambda *_, **__: torch.zeros(1, 5, 32))
    monkeypatch.setattr(qwen_text.QwenReader, "_states", states)
    ours(model, **as_it_is(count=2))
    ours(model, **as_it_is(seed=3))
    assert states.call_count == 2
    images, masks = two_pictures()
    three = as_it_is(image=torch.cat([images, images[:1].flip(2)]), mask=masks[:1])
    for seed in range(3):  # more than there is room for, and yet what the last call needed is kept
        ours(model, **three, seed=seed)
        assert states.call_count == 6
    assert len(model._prompts) == 6


def test_a_text_encoder_that_does_not_fit_is_said(plain, monkeypatch):
    model = make_qwen_model(QWEN_IMAGE, plain)
    monkeypatch.setattr(qwen_text.QwenReader, "_states", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA")))
    with pytest.raises(MendError, match="not enough memory to read the prompt with tiny"):
        ours(model)
    monkeypatch.setattr(qwen_text.QwenReader, "_states", mock.Mock(side_effect=RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        ours(model)


def test_a_large_canvas_is_shown_no_larger_than_the_model_was_trained_with(edit):
    """Beyond about 2000 pixels a side the picture's tokens would leave no places for the prompt's."""
    pictures = torch.zeros(1, 3, 1600, 2112)
    (embedding,) = make_qwen_model(QWEN_IMAGE_EDIT, edit).encode_prompt([PROMPT], PromptSyntax.COMFY, pictures)
    assert embedding.tokens.shape[1] < 1024 * 1024 / 28**2 + 100
    small = Picture.from_image(Image.new("RGB", (WIDTH, HEIGHT)))
    assert qwen_image.EDIT_SIGHT.glance.at(small) is small


def test_no_negative_prompt_at_all_is_zeros(edit):
    pictures = scene()[0].permute(0, 3, 1, 2) * 2 - 1
    model = make_qwen_model(QWEN_IMAGE_EDIT, edit)
    nothing, empty = model.encode_prompt([None, ""], PromptSyntax.COMFY, pictures)
    assert nothing.tokens.shape == empty.tokens.shape
    assert not nothing.tokens.any()
    assert empty.tokens.any()


@pytest.mark.parametrize("variant", ["plain", "edit"])
def test_what_the_network_reads_is_told(variant, request):
    facts = make_qwen_model(FAMILY[variant], request.getfixturevalue(variant)).facts
    assert facts.conditioning is Conditioning.REPLACE
    assert facts.reads_picture == (variant == "edit")
    assert (facts.native_size, facts.multiple, facts.latent_channels, facts.downscale) == (1024, 16, 16, 8)
    assert facts.prediction_type == "flow_prediction"
    assert facts.latent_format == "Wan21"


# --- prompts and pictures


def test_a_plain_prompt_is_the_pipelines(plain):
    model = make_qwen_model(QWEN_IMAGE, plain)
    for prompt in ("", " ", "a (red:1.3) cat\n", "a red cat, " * 80):
        with torch.no_grad():
            theirs, _ = plain.encode_prompt(prompt, "cpu", max_sequence_length=512)
        (mine,) = model.encode_prompt([prompt], PromptSyntax.PLAIN)
        assert theirs.shape == mine.tokens.shape
        assert relative(theirs, mine.tokens) <= LATENT_GATE


def test_comfy_reads_a_long_prompt_whole_and_escaped_parentheses_as_such(plain):
    model = make_qwen_model(QWEN_IMAGE, plain)
    long = "a red cat, " * 80
    whole, cut = (model.encode_prompt([long], syntax)[0].tokens for syntax in (PromptSyntax.COMFY, PromptSyntax.PLAIN))
    assert cut.shape[1] == 512 < whole.shape[1]
    assert relative(cut, whole[:, :512]) <= LATENT_GATE
    escaped, literal = model.encode_prompt([r"a \(red\) cat", "a (red) cat"], PromptSyntax.COMFY)
    assert torch.equal(escaped.tokens, literal.tokens)


def test_a_prompt_beyond_what_the_network_reads_is_refused(plain):
    with pytest.raises(InputError, match="has 1100 tokens, and Qwen-Image reads 1024: make it shorter"):
        make_qwen_model(QWEN_IMAGE, plain).encode_prompt(["a" * 1100], PromptSyntax.COMFY)


def test_a_prompt_that_holds_the_mark_of_pictures_is_refused(edit):
    pictures = scene()[0].permute(0, 3, 1, 2) * 2 - 1
    with pytest.raises(InputError, match=r"holds <\|image_pad\|>, which stands for the picture: take it out"):
        make_qwen_model(QWEN_IMAGE_EDIT, edit).encode_prompt(["a <|image_pad|>"], PromptSyntax.COMFY, pictures)


def test_the_later_models_are_shown_the_picture_as_their_pipeline_shows_it(edit):
    """QwenImageEditPlusPipeline has no masks, but the same words and glances."""
    from diffusers import QwenImageEditPlusPipeline
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, calculate_dimensions

    parts = {name: getattr(edit, name) for name in ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")}
    plus = QwenImageEditPlusPipeline(**parts, processor=None)
    plus.processor = edit.processor
    plus.prompt_template_encode_start_idx = edit.prompt_template_encode_start_idx
    image, _ = as_pil(*scene())
    width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, WIDTH / HEIGHT)
    with torch.no_grad():
        seen = [plus.image_processor.resize(image, height, width)]
        theirs, _ = plus.encode_prompt(PROMPT, image=seen, device=torch.device("cpu"))
    model = make_qwen_model(QWEN_IMAGE_EDIT_2509, edit)
    (mine,) = model.encode_prompt([PROMPT], PromptSyntax.PLAIN, scene()[0].permute(0, 3, 1, 2) * 2 - 1)
    assert theirs.shape == mine.tokens.shape
    assert relative(theirs, mine.tokens) <= LATENT_GATE
    earlier = make_qwen_model(QWEN_IMAGE_EDIT, edit)
    (other,) = earlier.encode_prompt([PROMPT], PromptSyntax.PLAIN, scene()[0].permute(0, 3, 1, 2) * 2 - 1)
    assert other.tokens.shape != mine.tokens.shape


@pytest.mark.parametrize("size", [(56, 56), (113, 57), (30, 400), (20, 20), (1024, 768)])
def test_pictures_are_cut_into_patches_as_transformers_cuts_them(edit, size):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    picture = Picture.from_image(Image.fromarray(pixels.numpy()))
    theirs, mine = edit.processor.image_processor(picture.image, return_tensors="pt"), qwen_text.patches(picture)
    assert torch.equal(theirs["image_grid_thw"], mine.grid)
    assert relative(theirs["pixel_values"], mine.values) <= LATENT_GATE


def test_pictures_larger_than_the_vision_tower_sees_are_made_smaller():
    sizes = qwen_text.whole_tokens(5000, 2600)
    assert all(side % 28 == 0 for side in sizes)
    assert 0.99 * qwen_text.MOST_PIXELS < sizes[0] * sizes[1] <= qwen_text.MOST_PIXELS
    assert sizes[0] / sizes[1] == pytest.approx(5000 / 2600, rel=0.01)


def test_a_line_is_no_picture():
    with pytest.raises(InputError, match=r"is 4020x20, and a picture for Qwen2.5-VL is at most 200 times as long"):
        qwen_text.whole_tokens(4020, 20)


@pytest.mark.parametrize(
    ("build", "prefix"),
    [(qwen_text.build_language_model, "language_model."), (qwen_text.build_vision_language_model, "")],
)
def test_modules_made_without_values_have_the_frequencies_of_transformers(build, prefix):
    whole = tiny_language_model().model
    with torch.device("meta"):
        made = dict(build(whole.config.to_dict()).named_buffers())
    expected = {name.removeprefix(prefix): buffer for name, buffer in whole.named_buffers() if name.startswith(prefix)}
    assert made.keys() == expected.keys() and any("inv_freq" in name for name in made)
    for name, buffer in made.items():
        assert torch.allclose(buffer, expected[name], rtol=1e-6), name


def test_the_networks_places_are_not_remembered_for_every_size(plain):
    """Not on the card as long as the program runs, as diffusers remembers them."""
    made = qwen_image.build_transformer(dict(plain.transformer.config)).pos_embed
    theirs, first, second = (rope._compute_video_freqs(1, 6, 8) for rope in (plain.transformer.pos_embed, made, made))
    assert torch.equal(theirs, first)
    assert first is not second


def test_the_networks_places_are_made_anew(plain):
    config = dict(plain.transformer.config)
    state = dict(plain.transformer.state_dict())
    module = assemble(lambda: qwen_image.build_transformer(config), state, torch.float32, "tiny")
    assert torch.equal(module.pos_embed.pos_freqs, plain.transformer.pos_embed.pos_freqs)
    assert torch.equal(module.pos_embed.neg_freqs, plain.transformer.pos_embed.neg_freqs)


# --- loading


def loads_the_same(pipeline, model, family=QWEN_IMAGE):
    return relative(ours(make_qwen_model(family, pipeline))[0], ours(model)[0]) <= LATENT_GATE


@pytest.mark.parametrize(
    ("variant", "name", "family"),
    [
        ("plain", "QwenImagePipeline", "qwen-image"),
        ("edit", "QwenImageEditPipeline", "qwen-image-edit"),
        ("edit", "QwenImageEditInpaintPipeline", "qwen-image-edit"),
    ],
)
def test_a_folder_loads_as_its_pipeline_says(variant, name, family, request, tmp_path):
    pipeline = request.getfixturevalue(variant)
    folder = save_folder(pipeline, tmp_path / "model", name)
    assert recognise_folder(folder).family == family
    model = load_model(folder, HOST)
    assert not model.notices
    assert loads_the_same(pipeline, model, FAMILY[variant])
    # the plain one needs no eyes
    assert any("visual" in key for key in model.reader.encoder.module.state_dict()) == (variant == "edit")


def transformer_folder(folder, name="QwenImagePipeline", **config):
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    text = json.dumps({"_class_name": "QwenImageTransformer2DModel", **config})
    (folder / "transformer" / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "config", "family", "variant"),
    [
        ("QwenImageEditPlusPipeline", {}, "qwen-image-edit-2509", ""),
        ("QwenImageEditPlusPipeline", {"zero_cond_t": True}, "qwen-image-edit-2511", "still"),
        ("QwenImagePipeline", {}, "qwen-image", ""),
        ("QwenImageLayeredPipeline", {"use_layer3d_rope": True}, "qwen-image", "layered"),
    ],
)
def test_folders_are_told_apart(name, config, family, variant, tmp_path):
    found = recognise_folder(transformer_folder(tmp_path / "model", name, **config))
    assert (found.family, found.variant) == (family, variant)


def test_a_layered_model_is_refused_by_name(tmp_path):
    folder = transformer_folder(tmp_path / "model", use_layer3d_rope=True)
    with pytest.raises(ModelFileError, match="is a Qwen-Image-Layered model and cannot be used here"):
        load_model(folder, HOST)


def test_a_later_model_asks_for_a_later_diffusers(still, monkeypatch):
    config = dict(still.transformer.config)
    monkeypatch.setattr("diffusers.QwenImageTransformer2DModel", SimpleNamespace)
    with pytest.raises(ModelFileError, match="2511 or later, which the installed diffusers cannot run: update"):
        qwen_image.build_transformer(config)


def text_keys(pipeline, spelling):
    """The names of a whole Qwen2.5-VL in transformers of today, in those of 4.51, and in ComfyUI's files."""
    today, comfy = pipeline.text_encoder.state_dict(), split_states(pipeline)[1]
    then = comfy | {"lm_head.weight": today["lm_head.weight"]}
    return {"today": today, "then": then, "comfy": comfy}[spelling]


@pytest.mark.parametrize("spelling", ["today", "then", "comfy"])
@pytest.mark.parametrize("variant", ["plain", "edit"])
def test_every_spelling_of_the_language_model_is_read(variant, spelling, request):
    pipeline = request.getfixturevalue(variant)
    (part,) = FAMILY[variant].text_encoders
    config = pipeline.text_encoder.config.to_dict()
    read = part.read(text_keys(pipeline, spelling), config)
    with torch.device("meta"):
        assert read.keys() == part.build(config).state_dict().keys()
    assert part.read(read, config).keys() == read.keys()


def split_files(pipeline, folder, marked=False, prefix=""):
    """(denoiser, text encoder, VAE) as ComfyUI's users have them, and the configs of the tiny sizes."""
    folder.mkdir(exist_ok=True)
    denoiser, text, vae = split_states(pipeline)
    denoiser = {prefix + key: tensor for key, tensor in denoiser.items()}
    if marked:
        denoiser[f"{prefix}__index_timestep_zero__"] = torch.tensor([])
    parts = {"qwen_image": denoiser, "qwen_2.5_vl": text, "qwen_image_vae": vae}
    for name, state in parts.items():
        save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
    beside = save_configs(folder / "qwen_image-config", pipeline, ("transformer", "vae", "text_encoder"))
    write_qwen_tokenizer(beside / "tokenizer")
    return [folder / f"{name}.safetensors" for name in parts]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_split_files_load(plain, tmp_path, prefix):
    denoiser, text, vae = split_files(plain, tmp_path, prefix=prefix)
    assert recognise(denoiser).family == "qwen-image"
    assert recognise(text).text_encoder.architecture == "qwen2_5_vl"
    assert recognise(vae).vae_class == "AutoencoderKLQwenImage"
    assert loads_the_same(plain, load_model(denoiser, HOST, text_encoders=[text], vae=vae))


def test_one_file_of_all_parts_loads(plain, tmp_path):
    denoiser, text, vae = split_files(plain, tmp_path)
    whole = {}
    prefixes = ("model.diffusion_model.", "text_encoders.qwen25_7b.transformer.", "vae.")
    for path, prefix in zip((denoiser, text, vae), prefixes, strict=True):
        whole |= {prefix + key: tensor for key, tensor in load_file(path).items()}
    save_file(whole, tmp_path / "all.safetensors")
    shutil.copytree(tmp_path / "qwen_image-config", tmp_path / "all-config")
    assert loads_the_same(plain, load_model(tmp_path / "all.safetensors", HOST))


def test_editing_models_of_one_file_are_named_or_marked(edit, still, tmp_path):
    denoiser, text, vae = split_files(edit, tmp_path / "early")
    parts = {"text_encoders": [text], "vae": vae}
    model = load_model(denoiser, HOST, family="qwen-image-edit", **parts)
    assert model.facts.reads_picture
    assert model.glance is qwen_image.EDIT_SIGHT.glance
    assert loads_the_same(edit, model, QWEN_IMAGE_EDIT)
    denoiser, text, vae = split_files(still, tmp_path / "late", marked=True)
    assert recognise(denoiser).family == "qwen-image-edit-2511"
    late = load_model(denoiser, HOST, family="qwen-image-edit-2511", text_encoders=[text], vae=vae)
    assert late.denoiser.module.zero_cond_t
    assert not late.notices
    (tmp_path / "late" / "qwen_image-config").rename(tmp_path / "late" / "configs")
    assert find_parts(denoiser).folder == CONFIGS / "qwen-image-edit-2511"


def test_an_editing_model_that_is_not_shown_the_picture_is_told_of(edit, tmp_path):
    denoiser, text, vae = split_files(edit, tmp_path)
    named = tmp_path / "qwen_image_edit_2509.safetensors"
    denoiser.rename(named)
    (tmp_path / "qwen_image-config").rename(tmp_path / "qwen_image_edit_2509-config")
    (notice,) = load_model(named, HOST, text_encoders=[text], vae=vae).notices
    assert "set its family to qwen-image-edit, qwen-image-edit-2509 or qwen-image-edit-2511" in notice


def test_a_file_of_2511_is_not_run_as_another_without_a_word(edit, tmp_path):
    denoiser, text, vae = split_files(edit, tmp_path, marked=True)
    with pytest.raises(ModelFileError, match=r"configs beside it are of an earlier model .* put those of Qwen-Image"):
        load_model(denoiser, HOST, text_encoders=[text], vae=vae)
    unmarked = tmp_path / "qwen_image_edit_2511.safetensors"
    split_files(edit, tmp_path)[0].rename(unmarked)
    (tmp_path / "qwen_image-config").rename(tmp_path / "qwen_image_edit_2511-config")
    parts = {"text_encoders": [text], "vae": vae}
    (notice,) = load_model(unmarked, HOST, family="qwen-image-edit-2509", **parts).notices
    assert "if it is of 2511, set its family to qwen-image-edit-2511" in notice
    shutil.rmtree(tmp_path / "qwen_image_edit_2511-config")
    assert find_parts(unmarked, family="qwen-image-edit-2511").folder == CONFIGS / "qwen-image-edit-2511"


def test_another_kind_of_family_is_not_tried(plain, tmp_path):
    denoiser, _, vae = split_files(plain, tmp_path)
    folder = save_folder(plain, tmp_path / "folder", "QwenImagePipeline")
    for path in (denoiser, folder):
        with pytest.raises(
            ModelFileError, match=r"is a Qwen-Image model, and its family is set to sdxl: set that to auto"
        ):
            load_model(path, HOST, family="sdxl")
    with pytest.raises(ModelFileError, match=r"text_encoder is a folder, where a text encoder's file belongs"):
        load_model(denoiser, HOST, text_encoders=[folder / "text_encoder"], vae=vae)


def test_parts_of_other_families_are_refused_by_name(plain, tmp_path):
    denoiser, text, vae = split_files(plain, tmp_path)
    flux_vae, t5 = tmp_path / "ae.safetensors", tmp_path / "t5.safetensors"
    save_file({key: value.clone() for key, value in tiny_vae(0.36, 0.11).state_dict().items()}, flux_vae)
    save_file({key: value.clone() for key, value in tiny_t5().state_dict().items() if "embed_tokens" not in key}, t5)
    with pytest.raises(ModelFileError, match="is a VAE of 16 channels where Qwen-Image has a VAE of films of 16"):
        load_model(denoiser, HOST, text_encoders=[text], vae=flux_vae)
    with pytest.raises(ModelFileError, match="is a T5 text encoder of width 32, which Qwen-Image does not read"):
        load_model(denoiser, HOST, text_encoders=[t5], vae=vae)
    save_file({"scaled_fp8": torch.zeros(1), **load_file(text)}, scaled := tmp_path / "scaled.safetensors")
    with pytest.raises(ModelFileError, match=r"is a text encoder with quantised weights, .* choose it in bf16 or fp16"):
        load_model(denoiser, HOST, text_encoders=[scaled], vae=vae)
    with pytest.raises(ModelFileError, match="holds a transformer but no text encoder"):
        load_model(denoiser, HOST, vae=vae)


def test_a_missing_or_foreign_tokenizer_is_told(plain, tmp_path):
    denoiser, text, vae = split_files(plain, tmp_path)
    tokenizer = tmp_path / "qwen_image-config" / "tokenizer"
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": {}}))
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    kept = {letter: number for letter, number in vocabulary.items() if number < 256}
    (tokenizer / "vocab.json").write_text(json.dumps(kept))
    with pytest.raises(ModelFileError, match=r"without the marks of Qwen2.5's chats"):
        load_model(denoiser, HOST, text_encoders=[text], vae=vae)
    (tokenizer / "vocab.json").write_text("{")
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_model(denoiser, HOST, text_encoders=[text], vae=vae)
    shutil.rmtree(tokenizer)
    with pytest.raises(ModelFileError, match=r"has no tokenizer for Qwen2.5, .* named qwen_image-config"):
        load_model(denoiser, HOST, text_encoders=[text], vae=vae)
    hosts = mock.Mock(wraps=HOST)
    hosts.model_folders = lambda kind: [write_qwen_tokenizer(tmp_path / kind)] if kind == "qwen25_tokenizer" else []
    assert loads_the_same(plain, load_model(denoiser, hosts, text_encoders=[text], vae=vae))


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-edit-2511"])
def test_shipped_configs_have_the_published_sizes(name, tmp_path):
    if name == "qwen-image-edit-2511":
        skip_unless_still()
    folder = CONFIGS / name
    assert check_folder(folder, "qwen-image-edit") is QWEN_IMAGE_EDIT
    configs = {part: read_json(folder / part / "config.json") for part in ("transformer", "text_encoder", "vae")}
    assert configs["transformer"].get("zero_cond_t", False) == (name == "qwen-image-edit-2511")
    with torch.device("meta"):
        networks = [
            qwen_image.build_transformer(configs["transformer"]),
            qwen_text.build_vision_language_model(configs["text_encoder"]),
            wan_vae.build_wan_vae(configs["vae"]),
        ]
    millions = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
    assert millions == pytest.approx([20430.401, 7747.169, 126.893], abs=1e-3)
    path = write_header(
        tmp_path / "file.safetensors", {key: tuple(value.shape) for key, value in networks[0].state_dict().items()}
    )
    assert find_parts(path).folder == CONFIGS / "qwen-image"


def test_the_frequencies_of_the_published_model_are_its_own():
    """1 000 000 and 10 000 to the power of the place in a head."""
    config = read_json(CONFIGS / "qwen-image" / "text_encoder" / "config.json")
    with torch.device("meta"):
        buffers = dict(qwen_text.build_vision_language_model(config).named_buffers())
    language, vision = buffers["language_model.rotary_emb.inv_freq"], buffers["visual.rotary_pos_emb.inv_freq"]
    assert torch.allclose(language[[0, 32]], torch.tensor([1.0, 1e-3]))
    assert torch.allclose(vision[[0, 10]], torch.tensor([1.0, 1e-2]))
