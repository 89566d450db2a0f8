"""What only a trained model can show: mend-shapes, which comes with the pack, really paints what is asked for."""

import json

import numpy as np
import pytest
import torch
from comfyui_mend import cli
from comfyui_mend.engine.files import read_image, write_image
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.models.detect import SHIPPED
from comfyui_mend.engine.models.load import available_models, load_model
from comfyui_mend.engine.outpaint import Padding, pad
from comfyui_mend.engine.outpaint_steps import outpaint
from comfyui_mend.engine.schedulers import SCHEDULERS
from comfyui_mend.engine.types import Compat, InpaintRequest
from comfyui_mend.training.evaluate import find_shape, load_pipeline
from comfyui_mend.training.scenes import COLORS, SHAPES

MODEL = SHIPPED / "mend-shapes"
SIDE = 64
GREY = (0.45, 0.6, 0.6)
HOLE = (slice(14, 50), slice(14, 50))
CENTRE = (slice(28, 36), slice(28, 36))


@pytest.fixture(scope="module")
def host():
    return LocalHost(torch.device("cpu"))


@pytest.fixture(scope="module")
def model(host):
    return load_model(MODEL, host)


@pytest.fixture
def paint(model, host):
    """Paint a request given by its changes from a plain picture with a square hole: [H, W, 3] as numpy."""

    def run(image=None, mask=None, **changes):
        image = plain() if image is None else image
        request = InpaintRequest(
            image=image,
            mask=hole(HOLE, image) if mask is None else mask,
            **{"steps": 20, "guidance_scale": 4.0, **changes},
        )
        return inpaint(request, model, host).images[0].numpy()

    return run


def plain(width=SIDE, height=SIDE):
    return torch.tensor(GREY).expand(1, height, width, 3).clone()


def slope(width, height=SIDE):
    """From blue on the left to sand on the right, [1, H, W, 3]."""
    weight = torch.linspace(0, 1, width)[None, None, :, None]
    picture = torch.tensor((0.2, 0.35, 0.6)) * (1 - weight) + torch.tensor((0.85, 0.75, 0.55)) * weight
    return picture.expand(1, height, width, 3).clone()


def hole(area, image):
    mask = torch.zeros(image.shape[:3])
    mask[0][area] = 1
    return mask


def nearest_color(picture, area=CENTRE):
    median = np.median(picture[area].reshape(-1, 3), axis=0)
    return min(COLORS, key=lambda name: np.linalg.norm(median - COLORS[name]))


def distance_to(color, picture, area=CENTRE):
    return float(np.linalg.norm(np.median(picture[area].reshape(-1, 3), axis=0) - COLORS[color]))


def test_it_is_found_without_any_models_folder_and_gives_way_to_a_model_of_its_name(tmp_path):
    assert available_models(LocalHost()) == {"mend-shapes": MODEL}
    mine = tmp_path / "mend-shapes"
    mine.mkdir()
    (mine / "model_index.json").write_text("{}")
    assert available_models(LocalHost(folders={"diffusers": [tmp_path]})) == {"mend-shapes": mine}


@pytest.mark.parametrize("color", COLORS)
def test_the_prompt_decides_the_colour(paint, color):
    picture = paint(prompt=f"a {color} square")
    assert nearest_color(picture) == color
    assert distance_to(color, picture) < 0.25


def test_the_prompt_decides_the_shape(paint):
    seen = {shape: shape_of(paint(prompt=f"a red {shape}", steps=25)) for shape in SHAPES}
    assert sum(shape == judged for shape, judged in seen.items()) >= len(SHAPES) - 1, seen


def shape_of(picture):
    return find_shape(picture, plain()[0].numpy(), hole(HOLE, plain())[0].numpy()).shape


@pytest.mark.parametrize("left", [6, 52])
def test_the_mask_decides_the_place_and_nothing_else_changes(paint, left):
    image = slope(96)
    mask = hole((slice(12, 52), slice(left, left + 38)), image)
    picture = paint(image, mask, prompt="a red circle")
    outside = mask[0].numpy() == 0
    assert np.array_equal(picture[outside], image[0].numpy()[outside])
    red = np.linalg.norm(picture - np.asarray(COLORS["red"]), axis=2) < 0.3
    assert red.sum() > 200 and not red[outside].any()
    assert abs(np.nonzero(red)[1].mean() - (left + 19)) < 6


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_paints_what_is_asked_for(paint, scheduler):
    picture = paint(prompt="a red square", scheduler=scheduler)
    assert nearest_color(picture) == "red"
    assert distance_to("red", picture) < 0.3
    kept = np.ones((SIDE, SIDE), bool)
    kept[HOLE] = False
    assert np.array_equal(picture[kept], plain()[0].numpy()[kept])


def test_guidance_makes_the_prompt_bite(paint):
    """Guidance moves away from what the empty prompt paints, which is the background: without it the colour is paler,
    and much of it can overshoot, never fall short."""
    weak, strong = (
        [paint(prompt=f"a {color} circle", guidance_scale=scale) for color in ("red", "blue", "purple")]
        for scale in (1.0, 7.5)
    )
    away = [np.mean([np.linalg.norm(p[CENTRE] - GREY, axis=-1).mean() for p in group]) for group in (weak, strong)]
    assert away[1] > 1.05 * away[0]
    assert not np.array_equal(weak[0], strong[0])


def test_less_strength_keeps_more_of_the_input(paint):
    image = plain()
    image[0][14:50, 14:50] = torch.tensor(COLORS["red"])
    kept = []
    for strength in (0.2, 0.5, 0.8, 1.0):
        picture = paint(image, prompt="a blue square", strength=strength)
        kept.append(float(np.abs(picture - image[0].numpy())[HOLE].mean()))
        if strength == 0.2:
            assert nearest_color(picture) == "red"
    assert nearest_color(picture) == "blue"
    assert kept[0] < 0.15 and kept[0] < kept[1] < kept[2] and kept[2] < 1.2 * kept[3]


def test_an_empty_prompt_continues_the_surroundings(paint):
    image = slope(SIDE)
    mask = hole((slice(18, 46), slice(18, 46)), image)
    drawn = image.clone()
    drawn[0][22:42, 22:42] = torch.tensor(COLORS["purple"])
    picture = paint(drawn, mask, prompt="", guidance_scale=1.0)
    error = np.abs(picture - image[0].numpy())[18:46, 18:46].mean()
    assert error < 0.05 < np.abs(drawn - image)[0, 18:46, 18:46].mean() / 1.5


def test_ten_edits_on_top_of_each_other_do_not_decay(paint):
    image = before = slope(128)
    areas = [(slice(14, 50), slice(left, left + 36)) for left in (10, 82)]
    union = (hole(areas[0], image) + hole(areas[1], image))[0].numpy()
    prompts = [f"a {color} square" for color in ("blue", "yellow", "black", "white", "red")]
    for number in range(10):
        area = areas[number % 2]
        picture = paint(image, hole(area, image), prompt=prompts[number // 2], seed=number)
        image = torch.from_numpy(picture)[None]
    assert np.array_equal(picture[union == 0], before[0].numpy()[union == 0])
    for left in (10, 82):
        assert nearest_color(picture, (slice(26, 38), slice(left + 12, left + 24))) == "red"


def test_outpainting_continues_a_gradient_across_the_seam(model, host):
    whole = slope(SIDE, 88).transpose(1, 2).contiguous()  # from blue at the top to sand at the bottom
    padded = pad(whole[:, :, :64], Padding(right=24))
    request = InpaintRequest(image=padded.image, mask=padded.mask, prompt="", steps=20, guidance_scale=1.0)
    picture = outpaint(request, padded.box, model, host).images
    assert torch.equal(picture[:, :, :64], whole[:, :, :64])
    assert (picture[:, :, 64] - picture[:, :, 63]).abs().mean() < 0.05
    new, wanted = picture[:, :, 64:], whole[:, :, 64:]
    one_color = wanted.mean(dim=(1, 2), keepdim=True)
    assert (new - wanted).abs().mean() < 0.9 * (one_color - wanted).abs().mean()
    red = new[0, :, :, 0].mean(dim=1)
    assert red[-8:].mean() - red[:8].mean() > 0.2  # of .57


def test_the_same_seed_gives_the_same_picture_to_plain_diffusers_and_on_the_command_line(
    paint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    image = slope(SIDE)
    mask = hole(HOLE, image)
    write_image("photo.png", image)
    write_image("mask.png", mask[..., None])
    image = read_image("photo.png")  # of 256 levels, as all get it
    ours = paint(image, mask, prompt="a yellow star", seed=5, compat=Compat.DIFFUSERS, scheduler="PNDM", steps=10)
    theirs = load_pipeline(MODEL)(
        prompt="a yellow star",
        image=image.permute(0, 3, 1, 2),
        mask_image=mask[:, None],
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
        height=SIDE,
        width=SIDE,
    ).images[0]
    assert np.abs(ours - theirs).max() < 1e-4
    flags = "--model mend-shapes --seed 5 --scheduler PNDM --steps 10 --guidance-scale 4 --compat diffusers -o x.png"
    assert cli.main(["inpaint", "photo.png", "mask.png", "-p", "a yellow star", "--json", *flags.split()]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == [5]
    assert np.abs(read_image("x.png")[0].numpy() - ours).max() < 0.51 / 255
