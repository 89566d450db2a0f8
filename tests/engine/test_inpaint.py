"""The main path on a tiny random model: what the mask does not mark comes back bit for bit, whatever else happens."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from comfyui_mend.engine.crop import around
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import Job, Part, inpaint, normalise, paste_job
from comfyui_mend.engine.masks import bounding_box, to_latent_grid
from comfyui_mend.engine.models.protocol import Conditioning
from comfyui_mend.engine.sampling import Canvas, denoise
from comfyui_mend.engine.schedulers import SCHEDULERS, Prediction, plan
from comfyui_mend.engine.types import MAX_SEED, Compat, Crop, InpaintRequest, InpaintResult, InputError, MendError, Size
from tiny import SD15_SCHEDULER, engine_model, photo_and_mask, tiny_pipeline

HOST = LocalHost(torch.device("cpu"))


@pytest.fixture(scope="module")
def nine():
    return engine_model(tiny_pipeline(in_channels=9))


@pytest.fixture(scope="module")
def four():
    return engine_model(tiny_pipeline(in_channels=4))


@pytest.fixture(params=["nine", "four"], ids=["9-channel", "4-channel"])
def model(request):
    return request.getfixturevalue(request.param)


def run(model, image, mask, **options):
    options = {"prompt": "a cat", "steps": 2, "seed": 1} | options
    return inpaint(InpaintRequest(image=image, mask=mask, **options), model, HOST)


def outside(result, image, mask):
    """The largest difference where the mask is 0."""
    return float(((result.images - image).abs() * (mask == 0)[..., None]).max())


def painted(result, image, mask):
    """The mean difference where the mask is 1."""
    return float((result.images - image).abs()[mask == 1].mean())


def canvases(monkeypatch):
    """A list that grows by every canvas that is sampled."""
    told = []
    monkeypatch.setattr(
        "comfyui_mend.engine.inpaint.denoise",
        lambda model, schedule, canvas, *rest: told.append(canvas) or denoise(model, schedule, canvas, *rest),
    )
    return told


def mask_of(kind, height, width):
    mask = torch.zeros(1, height, width)
    if kind == "disc":
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        mask[0] = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 5) ** 2).float()
    elif kind == "corner":
        mask[:, -20:, -30:] = 1
    elif kind == "left edge":
        mask[:, :, :9] = 1
    elif kind == "thin line":
        mask[:, 37:39, 5 : width - 5] = 1
    elif kind == "one pixel":
        mask[:, height // 3, width // 3] = 1
    elif kind == "soft":
        mask = mask_of("disc", height, width) * torch.linspace(0, 1, width)
    elif kind == "full":
        mask[:] = 1
    return mask


MASKS = ["disc", "corner", "left edge", "thin line", "one pixel", "soft", "full"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_outside_is_identical_for_every_scheduler(model, scheduler):
    image, mask = photo_and_mask()
    result = run(model, image, mask, scheduler=scheduler, strength=0.8, steps=3)
    assert outside(result, image, mask) == 0
    assert painted(result, image, mask) > 0.01


@pytest.mark.parametrize("crop", Crop)
@pytest.mark.parametrize("kind", MASKS)
def test_outside_is_identical_for_every_mask(model, kind, crop):
    image, _ = photo_and_mask(213, 187)
    mask = mask_of(kind, 187, 213)
    result = run(model, image, mask, crop=crop)
    assert result.images.shape == image.shape
    assert outside(result, image, mask) == 0
    assert not torch.equal(result.images, image)


@pytest.mark.parametrize("crop", Crop)
@pytest.mark.parametrize("size", [(513, 613), (64, 64), (33, 500), (128, 128), (16, 16), (1, 1)])
def test_outside_is_identical_for_every_size(nine, size, crop):
    width, height = size
    image, _ = photo_and_mask(width, height)
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height // 2 + 1, width // 4 : width // 2 + 1] = 1
    result = run(nine, image, mask, crop=crop, steps=1)
    assert result.images.shape == image.shape
    assert outside(result, image, mask) == 0


def test_ten_edits_on_top_of_each_other_leave_the_rest_identical(nine):
    image, _ = photo_and_mask()
    edited, touched = image, torch.zeros(1, *image.shape[1:3])
    for i in range(10):
        mask = torch.zeros_like(touched)
        mask[:, 10 + 5 * i : 30 + 5 * i, 10 * i : 40 + 10 * i] = 1
        touched = touched.maximum(mask)
        edited = run(nine, edited, mask, seed=i, steps=1).images
    assert float(((edited - image).abs() * (touched == 0)[..., None]).max()) == 0


def test_values_of_the_result_stay_in_range(model):
    image, mask = photo_and_mask()
    result = run(model, image, mask)
    assert float(result.images.min()) >= 0 and float(result.images.max()) <= 1


def test_the_same_seed_repeats_and_another_differs(model):
    image, mask = photo_and_mask()
    first, again, other = (run(model, image, mask, seed=seed).images for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistep", "K_EULER_ANCESTRAL", "DPM++SDE"])
def test_picture_i_of_a_run_is_seed_plus_i_alone(model, scheduler):
    image, mask = photo_and_mask()
    together = run(model, image, mask, count=3, seed=10, scheduler=scheduler)
    assert together.seeds == (10, 11, 12)
    for i in range(3):
        alone = run(model, image, mask, seed=10 + i, scheduler=scheduler)
        # batched matrix products round differently
        assert torch.allclose(together.images[i], alone.images[0], atol=2e-4)


def test_the_largest_seed_wraps(nine):
    image, mask = photo_and_mask()
    result = run(nine, image, mask, seed=MAX_SEED, count=2, steps=1)
    assert result.seeds == (MAX_SEED, 0)


def test_a_batch_of_pictures_with_a_mask_each(nine):
    image, mask = photo_and_mask()
    images = torch.cat([image, image.flip(2)])
    masks = torch.cat([mask, mask_of("corner", *mask.shape[1:])])
    result = run(nine, images, masks, count=2, seed=3)
    assert result.seeds == (3, 4, 5, 6)
    expected = images.repeat_interleave(2, dim=0)
    kept = (masks.repeat_interleave(2, dim=0) == 0)[..., None]
    assert float(((result.images - expected).abs() * kept).max()) == 0
    alone = run(nine, images[1:], masks[1:], seed=6)
    assert torch.allclose(result.images[3], alone.images[0], atol=2e-4)


def test_one_mask_serves_every_picture_and_one_picture_every_mask(nine):
    image, mask = photo_and_mask()
    assert run(nine, image.expand(3, -1, -1, -1), mask, steps=1).images.shape[0] == 3
    assert run(nine, image, mask.expand(3, -1, -1), steps=1).images.shape[0] == 3


def test_batches_that_do_not_match_are_refused(nine):
    image, mask = photo_and_mask()
    with pytest.raises(InputError, match="3 images and 2 masks"):
        run(nine, image.expand(3, -1, -1, -1), mask.expand(2, -1, -1))


def test_an_empty_mask_gives_the_input_back_with_a_notice(nine):
    image, mask = photo_and_mask()
    result = run(nine, image, torch.zeros_like(mask), count=2)
    assert torch.equal(result.images, image.expand(2, -1, -1, -1))
    assert "mask is empty" in result.notices[0]


def test_the_empty_masks_of_a_batch_are_counted(nine):
    image, mask = photo_and_mask()
    result = run(nine, image, torch.cat([mask, torch.zeros_like(mask)]))
    assert torch.equal(result.images[1], image[0])
    assert "1 of the masks" in result.notices[0]


def test_a_mask_that_lets_the_original_show_through_is_told(nine):
    image, mask = photo_and_mask()
    (notice,) = run(nine, image, mask * 0.6).notices
    assert "nowhere above 0.6" in notice and "threshold" in notice
    assert run(nine, image, mask).notices == run(nine, image, mask * 0.6, soft=True).notices == ()


def test_load_images_placeholder_mask_is_refused(nine):
    image, _ = photo_and_mask()
    with pytest.raises(InputError, match="No mask is painted"):
        run(nine, image, torch.zeros(1, 64, 64))


def test_strength_0_gives_the_input_back(model):
    image, mask = photo_and_mask()
    assert torch.equal(run(model, image, mask, strength=0).images, image)


def test_less_strength_keeps_more_of_the_input(four):
    image, mask = photo_and_mask()
    changes = [painted(run(four, image, mask, strength=s, steps=20), image, mask) for s in (0.05, 1.0)]
    assert changes[0] < changes[1]


def test_a_tiny_strength_still_runs_one_step(model):
    image, mask = photo_and_mask()
    assert not torch.equal(run(model, image, mask, strength=0.01, steps=10).images, image)


def test_guidance_of_one_or_less_ignores_the_negative_prompt(nine):
    image, mask = photo_and_mask()
    plain = run(nine, image, mask, guidance_scale=1.0)
    assert torch.equal(plain.images, run(nine, image, mask, guidance_scale=0.5, negative_prompt="a dog").images)
    assert not torch.equal(plain.images, run(nine, image, mask, guidance_scale=7.5).images)


def test_prompts_of_different_length_are_guided(nine):
    image, mask = photo_and_mask()
    long = run(nine, image, mask, prompt="word " * 90)
    assert not torch.equal(long.images, run(nine, image, mask, prompt="word " * 60).images)


def test_width_and_height_resize_first(nine):
    image, mask = photo_and_mask()
    result = run(nine, image, mask, width=301, height=97)
    assert result.images.shape == (1, 97, 301, 3)
    assert result.mask.shape == (1, 97, 301)
    from comfyui_mend.engine.images import resize
    from comfyui_mend.engine.types import Size

    resized = resize(image, Size(301, 97))
    assert outside(result, resized, result.mask) == 0


def test_alpha_is_kept_outside_and_opaque_inside(nine):
    image, mask = photo_and_mask()
    rgba = torch.cat([image, torch.full_like(image[..., :1], 0.25)], dim=-1)
    result = run(nine, rgba, mask)
    assert outside(result, rgba, mask) == 0
    assert bool((result.images[..., 3][mask == 1] == 1).all())


def test_grey_pictures_come_back_in_colour(nine):
    image, mask = photo_and_mask()
    grey = image[..., :1]
    result = run(nine, grey, mask)
    assert result.images.shape[-1] == 3
    assert outside(result, grey, mask) == 0


def test_jpeg_noise_in_the_mask_touches_nothing(nine):
    image, mask = photo_and_mask()
    noisy = (mask + torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) * 0.012).clamp(0, 1)
    result = run(nine, image, noisy)
    assert outside(result, image, mask) == 0
    assert torch.equal(result.mask == 0, mask == 0)


def test_half_and_double_precision_pictures_are_taken(nine):
    image, mask = photo_and_mask()
    for dtype in (torch.float16, torch.float64):
        assert run(nine, image.to(dtype), mask.to(dtype), steps=1).images.dtype == torch.float32


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (torch.rand(1, 3, 64, 64), torch.ones(1, 64, 64), "has shape 1x3x64x64"),
        (torch.rand(1, 64, 64, 3), torch.ones(1, 64, 64, 3), "The mask has shape 1x64x64x3"),
        (torch.rand(1, 64, 64, 3), torch.ones(1, 64, 32), "The mask is 32x64 but the image is 64x64"),
        (torch.rand(1, 64, 64, 3), torch.full((1, 64, 64), 255.0), "must lie in 0..1"),
        (torch.full((1, 64, 64, 3), float("nan")), torch.ones(1, 64, 64), "NaN"),
        (torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.ones(1, 64, 64), "uint8"),
        (torch.rand(0, 64, 64, 3), torch.ones(1, 64, 64), "image is empty"),
    ],
)
def test_bad_pictures_are_refused_in_one_sentence(nine, image, mask, message):
    with pytest.raises(InputError, match=message) as caught:
        run(nine, image, mask)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 0},
        {"steps": 501},
        {"guidance_scale": -1},
        {"guidance_scale": float("nan")},
        {"strength": 1.1},
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"count": 0},
        {"count": 65},
        {"width": 8},
        {"scheduler": "euler"},
    ],
)
def test_numbers_out_of_range_are_refused(nine, option):
    image, mask = photo_and_mask()
    with pytest.raises(InputError, match=str(next(iter(option)))):
        run(nine, image, mask, **option)


def test_masks_of_every_comfyui_shape_mean_the_same(nine):
    image, mask = photo_and_mask()
    expected = run(nine, image, mask, steps=1).images
    for shaped in (mask[0], mask[:, None], mask[..., None]):
        assert torch.equal(run(nine, image, shaped, steps=1).images, expected)


def test_a_mask_of_another_size_but_the_same_shape_is_resized(nine):
    image, mask = photo_and_mask(200, 160)
    small = torch.nn.functional.interpolate(mask[:, None], scale_factor=0.5, mode="area")[:, 0]
    result = run(nine, image, small, steps=1)
    assert result.mask.shape == mask.shape
    assert outside(result, image, result.mask) == 0


def test_every_stroke_reaches_the_network(nine):
    """A 3 px line, at every offset from the latent grid, marks latent cells along its whole length."""
    seen = []
    predict = nine._predict
    nine._predict = lambda rows, *rest: (seen.append(rows), predict(rows, *rest))[1]
    try:
        image, _ = photo_and_mask(128, 128)
        for phase in range(8):
            mask = torch.zeros(1, 128, 128)
            mask[:, 40 + phase : 43 + phase, :] = 1
            run(nine, image, mask, steps=1)
            cells = seen[-1][0][0, 4]
            assert bool((cells.amax(dim=0) == 1).all())
    finally:
        nine._predict = predict


def test_the_sampler_may_paint_less_than_is_joined(model, monkeypatch):
    """The stitch mask decides what may change, the sampler's mask where the network paints."""
    image, mask = photo_and_mask()
    narrow = torch.zeros_like(mask)
    narrow[:, 68:82, 80:100] = 1
    assert bool((narrow <= mask).all())
    both = run(model, image, mask, sampler_mask=narrow)
    assert outside(both, image, mask) == 0
    assert bool(((both.images != image).any(dim=-1) == (mask == 1)).all())
    told = canvases(monkeypatch)
    for sampler_mask in (None, narrow):
        run(model, image, mask, sampler_mask=sampler_mask)
    wide, less = (canvas.mask for canvas in told)
    assert bool((less <= wide).all()) and 0 < less.sum() < wide.sum()


def test_an_empty_sampler_mask_gives_the_input_back(nine):
    image, mask = photo_and_mask()
    result = run(nine, image, mask, sampler_mask=torch.zeros_like(mask))
    assert torch.equal(result.images, image) and result.notices


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("scheduler", ["DDIM", "K_EULER"])
def test_a_soft_mask_of_one_grey_is_that_strength(model, scheduler, share):
    image, _ = photo_and_mask(128, 128)
    mask = torch.ones(1, 128, 128)
    options = {"scheduler": scheduler, "steps": 10, "crop": Crop.OFF}
    soft = run(model, image, mask * share, soft=True, **options).images
    plain = run(model, image, mask, strength=share, **options).images
    assert (soft - image).abs().max() > 0.05
    assert torch.allclose(soft, plain, atol=1e-4)


class Knows:
    """A network that knows the clean latents: from whatever state, its noise is what is over them."""

    def __init__(self, clean, conditioning):
        self.facts = SimpleNamespace(conditioning=conditioning, mask_rule=None)
        self.clean = clean

    def sample(self, canvas, levels, guidance, loop):
        return loop(lambda state, timestep, level: Prediction.EPSILON.output(state, self.clean, level))


@pytest.mark.parametrize("conditioning", Conditioning)
@pytest.mark.parametrize("strength", [0.5, 1])
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_soft_mask_lets_go_of_every_cell_at_the_level_it_has(scheduler, steps, strength, conditioning):
    """Also between the evaluations of one step, and whatever the order: nothing that is let go loses its picture."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 6, 24, generator=generator)
    soft = torch.linspace(0, 1, 24).expand(1, 1, 6, 24)
    schedule = plan(scheduler, SD15_SCHEDULER, steps, strength)
    hole = F.interpolate((soft > 0).float(), scale_factor=8)
    canvas = Canvas(noise=noise, mask=(soft > 0).float(), hole=hole, image=clean, masked_image=clean, soft=soft)
    model = Knows(clean, conditioning)
    result = denoise(model, schedule, canvas, None, generator, HOST.progress(schedule.evaluations, "soft"))
    assert float((result - clean).abs().max()) < 0.25  # some stop at a low level of noise instead of none


def test_a_soft_mask_changes_more_where_it_is_lighter(four):
    image = torch.full((1, 128, 384, 3), 0.5)
    mask = torch.zeros(1, 128, 384)
    levels = (0.2, 0.6, 1.0)
    for index, level in enumerate(levels):
        mask[:, :, 128 * index : 128 * (index + 1)] = level
    result = run(four, image, mask, soft=True, steps=10, crop=Crop.OFF, color_match=0)
    plain = run(four, image, (mask > 0).float(), strength=0.1, steps=10, crop=Crop.OFF, color_match=0)
    change = [(result.images - plain.images)[:, :, 128 * i + 32 : 128 * i + 96].abs().mean() for i in range(3)]
    assert change[0] < change[1] < change[2]


def test_a_soft_mask_leaves_the_rest_identical(model):
    image, mask = photo_and_mask()
    ramp = mask * torch.linspace(0, 1, mask.shape[-1])
    result = run(model, image, ramp, soft=True, steps=4)
    assert outside(result, image, ramp) == 0
    assert bool((result.mask[ramp >= 0.1] == 1).all()) and bool((result.mask[ramp == 0] == 0).all())


def test_each_part_of_a_mask_gets_a_crop_of_its_own(model, monkeypatch):
    """Two far-apart strokes keep their pixels, where one crop would have to shrink them; the rest is identical."""
    image, _ = photo_and_mask(700, 500)
    mask = torch.zeros(1, 500, 700)
    mask[:, 20:40, 30:60] = 1
    mask[:, 440:470, 640:680] = 1
    told = canvases(monkeypatch)
    result = run(model, image, mask, crop=Crop.EACH, count=2)
    assert outside(result, image, mask) == 0
    assert all(bool((picture != image[0]).any(dim=-1)[mask[0] == 1].all()) for picture in result.images)
    (noise,) = (canvas.noise for canvas in told)
    assert len(noise) == 4 and len({row.sum().item() for row in noise}) == 4
    first = run(model, image, mask, crop=Crop.EACH)
    assert torch.allclose(first.images[0], result.images[0], atol=2e-4)


def test_a_part_that_one_of_the_masks_lacks_is_left_alone(model, monkeypatch):
    """Nothing is painted there, or nothing comes back: it would cost a run, or pass through the autoencoder."""
    image, _ = photo_and_mask(700, 300)
    joined, free = torch.zeros(2, 1, 300, 700)
    joined[:, 20:40, 30:60] = joined[:, 200:220, 300:330] = 1
    free[:, 20:40, 30:60] = free[:, 20:40, 600:640] = 1
    told = canvases(monkeypatch)
    result = run(model, image, joined, sampler_mask=free, crop=Crop.EACH)
    assert sum(len(canvas.noise) for canvas in told) == 1
    assert outside(result, image, joined * free) == 0


def test_one_part_alone_is_what_auto_makes(model):
    image, mask = photo_and_mask()
    assert torch.equal(run(model, image, mask, crop=Crop.EACH).images, run(model, image, mask).images)


def test_parts_that_overlap_keep_each_others_paint(model):
    """Crops of native size around near strokes overlap: the later must not put back what the earlier one painted."""
    image, _ = photo_and_mask(400, 300)
    mask = torch.zeros(1, 300, 400)
    mask[:, 100:110, 100:110] = 1
    mask[:, 100:110, 180:190] = 1
    result = run(model, image, mask, crop=Crop.EACH)
    assert outside(result, image, mask) == 0
    assert bool((result.images != image).any(dim=-1)[mask == 1].all())


def test_compat_has_no_soft_masks(nine):
    image, mask = photo_and_mask()
    for option in ({"soft": True}, {"sampler_mask": mask}):
        with pytest.raises(InputError, match="compat"):
            run(nine, image, mask, compat=Compat.DIFFUSERS, **option)


def test_memory_bounds_the_batch_and_not_the_picture(nine):
    """With room for nothing, one row at a time, the pictures are those of the unsplit batch."""

    class Small(LocalHost):
        def free_memory(self):
            return 0

    image, mask = photo_and_mask()
    whole = run(nine, image, mask, count=3).images
    split_model = engine_model(tiny_pipeline(in_channels=9), host=Small(torch.device("cpu")))
    rows = []
    forward = split_model.denoiser.module.forward
    split_model.denoiser.module.forward = lambda x, *a, **k: (rows.append(len(x)), forward(x, *a, **k))[1]
    split = run(split_model, image, mask, count=3).images
    assert set(rows) == {1}  # one picture, one branch of guidance
    assert torch.allclose(whole, split, atol=2e-4)


@pytest.mark.parametrize("side", [40, 300], ids=["as it is", "scaled"])
def test_tone_is_compared_where_nothing_was_painted(side):
    """A black object on grey, the whole 3 levels too bright: it comes out black. Its cells reach beyond the mask."""
    picture = torch.full((1, 640, 640, 3), 0.5)
    mask = torch.zeros(1, 640, 640)
    mask[:, 101 : 101 + side, 101 : 101 + side] = 1
    crop = around(bounding_box(mask), Size(640, 640), 128, 8)
    cells = to_latent_grid((crop.cut_mask(mask) > 0).float(), 8)
    black = F.interpolate(cells, scale_factor=8)[:, 0, ..., None]
    canvas = (0.5 * (1 - black) + 3 / 255).expand(-1, -1, -1, 3)
    results = picture.clone()
    request = normalise(InpaintRequest(image=picture, mask=mask))
    paste_job(request, Job(Part(0, crop, mask, mask), 0, 0), canvas, cells[0], results)
    inside = results[mask == 1]
    assert float(inside.max()) < 1e-3
    assert outside(InpaintResult(images=results, mask=mask, seeds=(0,)), picture, mask) == 0


def test_a_large_job_runs_in_batches_of_bounded_size(nine, monkeypatch):
    """The native canvas has 128x128 pixels: with room for two, five pictures take three batches."""
    image, mask = photo_and_mask()
    whole = run(nine, image, mask, count=5).images
    monkeypatch.setattr("comfyui_mend.engine.inpaint.MAX_BATCH_PIXELS", 2 * 128 * 128 + 1)
    encoded = []
    encode_image = nine.encode_image
    monkeypatch.setattr(nine, "encode_image", lambda pixels: (encoded.append(len(pixels)), encode_image(pixels))[1])
    split = run(nine, image, mask, count=5).images
    assert encoded == [1, 1, 1]
    assert torch.allclose(whole, split, atol=2e-4)
    # one that is larger than the bound by itself runs all the same
    monkeypatch.setattr("comfyui_mend.engine.inpaint.MAX_BATCH_PIXELS", 1)
    assert torch.allclose(whole[:1], run(nine, image, mask).images, atol=2e-4)


def test_an_overflowing_network_is_an_error_not_a_black_picture(nine):
    decode = nine.decode
    nine.decode = lambda latents: decode(latents) * float("nan")
    try:
        with pytest.raises(MendError, match="NaN"):
            run(nine, *photo_and_mask(), steps=1)
    finally:
        nine.decode = decode


def test_interrupt_stops_within_one_evaluation(nine):
    class Stop(BaseException):
        pass

    evaluations = []

    class Interrupting(LocalHost):
        def check_interrupt(self):
            if len(evaluations) == 3:
                raise Stop

    model = engine_model(tiny_pipeline(in_channels=9), host=Interrupting(torch.device("cpu")))
    predict = model._predict
    model._predict = lambda *args: (predict(*args), evaluations.append(1))[0]
    with pytest.raises(Stop):
        run(model, *photo_and_mask(), steps=20)
    assert len(evaluations) == 3


def test_progress_counts_to_its_total_with_previews(nine):
    updates, totals = [], []

    class Bar:
        def update(self, step, preview=None):
            updates.append((step, preview))

    class Watching(LocalHost):
        def progress(self, total, description, latent_format=None):
            totals.append(total)
            return Bar()

    image, mask = photo_and_mask()
    both = torch.cat([image, image])
    masks = torch.cat([mask, mask_of("full", *mask.shape[1:])])  # two canvas sizes
    request = InpaintRequest(image=both, mask=masks, steps=3)
    inpaint(request, nine, Watching(torch.device("cpu")))
    assert [step for step, _ in updates] == list(range(1, totals[0] + 1))
    assert all(torch.isfinite(preview).all() for _, preview in updates)


def test_preview_converges_on_the_result(nine):
    """The last guess at the clean latents is what the solver ends on (DDIM ends at the lowest noise level)."""
    previews, finals = [], []

    class Bar:
        def update(self, step, preview=None):
            previews.append(preview)

    class Watching(LocalHost):
        def progress(self, total, description, latent_format=None):
            return Bar()

    decode = nine.decode
    nine.decode = lambda latents: (finals.append(latents), decode(latents))[1]
    try:
        image, mask = photo_and_mask()
        request = InpaintRequest(image=image, mask=mask, steps=10, scheduler="K_EULER")
        inpaint(request, nine, Watching(torch.device("cpu")))
    finally:
        nine.decode = decode
    assert torch.allclose(previews[-1], finals[0], atol=1e-4 * float(finals[0].abs().max()))


def test_compat_refuses_sizes_the_pipeline_refuses(nine):
    image, mask = photo_and_mask()
    with pytest.raises(InputError, match="multiples of 8"):
        run(nine, image, mask, width=100, height=128, compat=Compat.DIFFUSERS)


def test_the_fixtures_are_what_they_say(nine, four):
    assert nine.facts.conditioning is Conditioning.CONCAT
    assert four.facts.conditioning is Conditioning.REPLACE


def test_more_pictures_than_memory_holds_are_refused_before_anything_runs(nine):
    image, mask = torch.zeros(1, 1, 1, 3).expand(1, 5000, 5000, 3), torch.ones(1, 1, 1).expand(1, 5000, 5000)
    with pytest.raises(InputError, match="64 pictures of 5000x5000 would be made at once, and 42 fit"):
        run(nine, image, mask, count=64)
