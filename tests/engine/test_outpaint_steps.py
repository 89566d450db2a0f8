"""Growing step by step on a tiny random model: every window in its place, the original untouched, no noise twice."""

from dataclasses import dataclass, field

import pytest
import torch
from comfyui_mend.engine.fill import FillMethod
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.outpaint import NONE, SIDES, Length, Padding, Unit, pad
from comfyui_mend.engine.outpaint_steps import (
    MIN_GROWTH,
    WINDOW_SEED,
    GrowthOptions,
    outpaint,
    plan_stages,
    stages,
    window_mask,
)
from comfyui_mend.engine.types import MAX_SEED, Box, Compat, Crop, InpaintRequest, InputError, Size
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import engine_model, photo_and_mask, tiny_pipeline

HOST = LocalHost(torch.device("cpu"))
WINDOW = 128
"""The tiny model's native size."""


@pytest.fixture(scope="module")
def nine():
    return engine_model(tiny_pipeline(in_channels=9))


@pytest.fixture(scope="module")
def four():
    return engine_model(tiny_pipeline(in_channels=4))


@dataclass
class WatchedBar:
    total: int
    steps: list = field(default_factory=list)

    def update(self, step, preview=None):
        self.steps.append(step)


@dataclass(frozen=True)
class WatchedHost(LocalHost):
    """Keeps its bars, and stops a run after so many looks at the button."""

    bars: list = field(default_factory=list)
    looks: list = field(default_factory=list)
    patience: int = 10**9

    def progress(self, total, description, latent_format=None):
        self.bars.append(WatchedBar(total))
        return self.bars[-1]

    def check_interrupt(self):
        self.looks.append(None)
        if len(self.looks) > self.patience:
            raise KeyboardInterrupt


class Recorder:
    """A model that keeps what it is shown and the noise it starts from."""

    def __init__(self, model):
        self.model = model
        self.pixels, self.first = [], []

    @property
    def shown(self):
        return [tuple(pixels.shape) for pixels in self.pixels]

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode_image(self, pixels):
        self.pixels.append(pixels.clone())
        return self.model.encode_image(pixels)

    def sample(self, canvas, levels, guidance, loop):
        def recorded(denoiser):
            def denoise(state, timestep, level):
                self.first.append(state.clone())
                return denoiser(state, timestep, level)

            return loop(denoise)

        return self.model.sample(canvas, levels, guidance, recorded)


def padded_photo(padding, width=150, height=120, feather=12, batch=1):
    image = torch.cat([photo_and_mask(width, height, seed=seed)[0] for seed in range(batch)])
    return image, pad(image, padding, feather)


def request_for(padded, **options):
    return InpaintRequest(image=padded.image, mask=padded.mask, **{"prompt": "a cat", "steps": 2, "seed": 1, **options})


WALK = GrowthOptions(overlap=16, fill=FillMethod.EDGE)


def run(model, padded, options=WALK, host=HOST, **settings):
    return outpaint(request_for(padded, **settings), padded.box, model, host, options)


sizes = st.builds(Size, st.integers(1, 3000), st.integers(1, 3000))
paddings = st.builds(Padding, *[st.sampled_from([0, 1, 15, 16, 17, 100, 700, 5000])] * 4)
growths = st.one_of(
    st.builds(Length, st.integers(MIN_GROWTH, 1000)), st.builds(Length, st.integers(5, 200), st.just(Unit.PERCENT))
)


@given(sizes, paddings, growths, st.sampled_from([None, 128, 512, 4096]))
def test_stages_add_up_to_the_whole_and_none_exceeds_the_growth(size, padding, growth, window):
    total, current = Padding(), size
    for step in stages(size, padding, growth, window):
        limits = [max(growth.pixels(side), MIN_GROWTH) for side in current] * 2
        assert all(0 <= pixels <= limit for pixels, limit in zip(step.sides, limits, strict=True))
        assert step != Padding()
        total, current = total + step, step.canvas(current)
        # either everything fits into a window, or one side grows
        assert window is None or max(current) <= window or sum(pixels > 0 for pixels in step.sides) == 1
    assert total == padding
    assert current == padding.canvas(size)


def test_stages_of_one_side_are_even_and_sides_take_turns():
    assert stages(Size(500, 500), Padding(right=700), Length(256)) == (
        Padding(right=234),
        Padding(right=233),
        Padding(right=233),
    )
    assert stages(Size(500, 500), Padding(left=300, top=100), Length(256), window=512) == (
        Padding(left=150),
        Padding(top=100),
        Padding(left=150),
    )


def test_growth_in_percent_grows_with_the_picture():
    steps = stages(Size(100, 100), Padding(right=300), Length(100, Unit.PERCENT))
    assert [step.right for step in steps] == [100, 200]


def test_what_is_cut_goes_first():
    assert stages(Size(100, 100), Padding(left=-20, top=-5, right=30), Length(16)) == (
        Padding(left=-20, top=-5),
        Padding(right=15),
        Padding(right=15),
    )


@settings(max_examples=50)
@given(
    st.builds(Size, st.integers(20, 700), st.integers(20, 700)),
    st.builds(Padding, *[st.sampled_from([0, 1, 40, 300])] * 4),
    st.sampled_from([0, 10, 80]),
    st.sampled_from([NONE, Length(16), Length(200), Length(60, Unit.PERCENT)]),
    st.sampled_from([None, 64, 128, 512]),
    st.sampled_from([0, 5, 64]),
)
def test_windows_cover_all_that_is_new_and_paint_nothing_else_anew(size, padding, feather, growth, window, overlap):
    padded = pad(torch.zeros(1, size.height, size.width, 3), padding, feather)
    painted = torch.zeros(padded.mask.shape[1:])
    painted[padded.box.rows, padded.box.columns] = 1
    options = GrowthOptions(growth=growth, overlap=overlap)
    for stage in plan_stages(padded.mask, padded.box, window, options):
        before = painted.clone()
        for index, box in enumerate(stage.windows):
            mask = window_mask(stage, index, overlap)
            assert mask.shape == (box.height, box.width)
            assert mask.min() >= 0 and mask.max() <= 1
            view = painted[box.rows, box.columns]
            assert (mask[view == 0] == 1).all()  # no hole is left beside or between windows
            view[mask > 0] = 1
            # the model is never shown what nobody has painted
            assert (view == 1).all()
        inside = torch.zeros_like(painted)
        inside[stage.extent.rows, stage.extent.columns] = 1
        assert torch.equal(painted, inside)
        assert torch.equal(before.bool() & ~inside.bool(), torch.zeros_like(inside, dtype=torch.bool))
    assert painted.all()


@pytest.mark.parametrize("side", SIDES)
def test_windows_are_native_squares_with_a_quarter_of_what_is_there(side):
    padded = pad(torch.zeros(1, 900, 1100, 3), Padding(**{side: 500}), feather=40)
    plan = plan_stages(padded.mask, padded.box, 512, GrowthOptions())
    assert len(plan) == 2
    for stage in plan:
        assert sum(stage.step.sides) == 250
        assert {box.size for box in stage.windows} == {Size(512, 512)}
        for box, following in zip(stage.windows, stage.windows[1:], strict=False):
            assert (
                max(box.right - following.left if side in ("top", "bottom") else 0, box.bottom - following.top) >= 128
            )


def test_growth_beyond_the_window_still_shows_what_is_there():
    padded = pad(torch.zeros(1, 900, 900, 3), Padding(right=800))
    (stage,) = plan_stages(padded.mask, padded.box, 512, GrowthOptions(growth=Length(800)))
    assert all(box.left <= 900 - 64 - 128 for box in stage.windows)


def test_the_seam_between_windows_fades():
    padded = pad(torch.zeros(1, 400, 100, 3), Padding(right=30))
    (stage,) = plan_stages(padded.mask, padded.box, 128, GrowthOptions(overlap=20))
    second, shared = stage.windows[1], stage.windows[0].bottom - stage.windows[1].top
    column = window_mask(stage, 1, 20)[:, -1]
    assert second.right == 130
    assert not column[: shared - 20].any()
    ramp = column[shared - 20 : shared]
    assert (ramp > 0).all() and (ramp < 1).all() and (ramp[1:] > ramp[:-1]).all()
    assert (column[shared:] == 1).all()


@pytest.mark.parametrize("overlap", [0, 8, 64])
@pytest.mark.parametrize("feather", [0, 3, 12])
def test_what_fits_into_one_window_is_what_inpaint_gives(nine, overlap, feather):
    _, padded = padded_photo(Padding(20, 5, 17, 9), 70, 90, feather)
    expected = inpaint(request_for(padded), nine, HOST)
    result = run(nine, padded, GrowthOptions(overlap=overlap))
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.mask, expected.mask)
    assert result.seeds == expected.seeds


@pytest.mark.parametrize("model", ["nine", "four"])
@pytest.mark.parametrize("crop", Crop)
@pytest.mark.parametrize(
    "padding", [Padding(right=150), Padding(100, 40, 20, 70), Padding(top=40, left=-30), Padding(bottom=1)], ids=str
)
def test_the_original_outside_the_feather_is_identical_and_all_else_is_painted(request, model, crop, padding):
    image, padded = padded_photo(padding)
    result = run(request.getfixturevalue(model), padded, crop=crop, steps=1)
    assert result.images.shape == padded.image.shape
    assert torch.equal(result.images[result.mask == 0], padded.image[result.mask == 0])
    cut = image[:, -min(padding.top, 0) :, -min(padding.left, 0) :]
    inner = (slice(None), slice(12, 108), slice(12, cut.shape[2] - 12))
    assert torch.equal(result.images[:, padded.box.rows, padded.box.columns][inner], cut[inner])
    assert (result.images != padded.image)[result.mask == 1].float().mean() > 0.9
    assert result.images.min() >= 0 and result.images.max() <= 1


def test_the_request_is_left_as_it_was(nine):
    _, padded = padded_photo(Padding(right=150))
    before = padded.image.clone(), padded.mask.clone()
    run(nine, padded)
    assert torch.equal(padded.image, before[0]) and torch.equal(padded.mask, before[1])


def test_the_model_sees_native_windows_however_large_the_canvas(nine):
    _, padded = padded_photo(Padding(right=200, bottom=90), 400, 300)
    recorder = Recorder(nine)
    run(recorder, padded, steps=1)
    assert len(recorder.shown) > 6
    assert set(recorder.shown) == {(1, 3, WINDOW, WINDOW)}


def test_without_crops_each_stage_is_one_window_with_everything(nine):
    _, padded = padded_photo(Padding(right=40, bottom=40), 152, 120)
    recorder = Recorder(nine)
    run(recorder, padded, GrowthOptions(growth=Length(24)), steps=1, crop=Crop.OFF)
    assert recorder.shown == [(1, 3, 144, 176), (1, 3, 160, 192)]


def test_larger_windows_take_fewer_runs(nine):
    _, padded = padded_photo(Padding(right=150), 300, 200)
    recorder = Recorder(nine)
    run(recorder, padded, GrowthOptions(window=512), steps=1)
    assert len(recorder.shown) == 1
    assert max(recorder.shown[0]) < 200


def test_no_two_windows_have_the_same_noise_and_the_first_has_the_seeds_own(nine):
    _, padded = padded_photo(Padding(right=150))
    recorder = Recorder(nine)
    run(recorder, padded, steps=1, scheduler="DDIM", seed=7)
    noises = recorder.first
    assert len(noises) >= 3
    assert all(not torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    for number, noise in enumerate(noises):
        generator = torch.Generator().manual_seed(7 + number * WINDOW_SEED)
        assert torch.equal(noise, torch.randn(noise.shape, generator=generator))


def test_seeds_repeat_and_wrap(nine):
    _, padded = padded_photo(Padding(right=150))
    first, again = (run(nine, padded, steps=1, seed=MAX_SEED).images for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, run(nine, padded, steps=1, seed=0).images)


def test_each_picture_of_a_batch_is_the_one_its_seed_makes_alone(nine):
    _, padded = padded_photo(Padding(right=110), batch=2)
    together = run(nine, padded, count=2, steps=1)
    assert together.seeds == (1, 2, 3, 4)
    assert len(together.images) == 4 and len(together.mask) == 2
    for index, seed in enumerate(together.seeds):
        source = slice(index // 2, index // 2 + 1)
        request = InpaintRequest(
            image=padded.image[source], mask=padded.mask[source], prompt="a cat", steps=1, seed=seed
        )
        alone = outpaint(request, padded.box, nine, HOST, WALK)
        # one run of a batch of four rounds other than four of one
        assert torch.allclose(together.images[index], alone.images[0], atol=2e-3)


def test_later_stages_are_filled_from_what_earlier_ones_painted(nine):
    _, padded = padded_photo(Padding(right=100), 120, 100)
    black = padded.image.clone()
    black[:, :, 120:] = 0
    request = InpaintRequest(image=black, mask=padded.mask, prompt="a cat", steps=2, strength=0.5)
    shown = {}
    for method in (FillMethod.EDGE, None):
        recorder = Recorder(nine)
        outpaint(request, padded.box, recorder, HOST, GrowthOptions(overlap=16, fill=method))
        # of the two things a window is shown the first is the picture with its fill, in -1..1
        shown[method] = recorder.pixels[::2]
    assert len(shown[None]) == len(shown[FillMethod.EDGE]) == 2
    for unfilled, filled in zip(shown[None], shown[FillMethod.EDGE], strict=True):
        assert (unfilled[..., -40:] == -1).all()
        last = filled[:, :, :100, -50:]
        assert last.mean() > -0.5 and torch.equal(last, last[..., :1].expand_as(last))


def test_alpha_is_opaque_where_something_was_painted(nine):
    image = torch.cat([photo_and_mask(150, 100)[0], torch.full((1, 100, 150, 1), 0.25)], dim=-1)
    padded = pad(image, Padding(left=60), feather=8)
    result = run(nine, padded, steps=1)
    assert (result.images[..., 3][result.mask == 1] == 1).all()
    assert (result.images[..., 3][result.mask == 0] == 0.25).all()


def test_one_bar_counts_all_windows(nine):
    _, padded = padded_photo(Padding(right=150))
    host = WatchedHost(torch.device("cpu"))
    run(nine, padded, host=host, steps=3)
    (bar,) = host.bars
    assert bar.total == bar.steps[-1]
    assert bar.steps == sorted(bar.steps)
    assert {3, 6} <= set(bar.steps)


def test_the_stop_button_works_between_windows(nine):
    _, padded = padded_photo(Padding(right=150))
    with pytest.raises(KeyboardInterrupt):
        run(nine, padded, host=WatchedHost(torch.device("cpu"), patience=2), steps=1)


def test_no_room_gives_the_picture_back_with_a_notice(nine):
    image, padded = padded_photo(Padding())
    result = run(nine, padded, count=2)
    assert torch.equal(result.images, image.expand(2, -1, -1, -1))
    assert result.notices == ("No room was added, so nothing was painted.",)


def test_strength_0_gives_the_canvas_back(nine):
    _, padded = padded_photo(Padding(right=150))
    result = run(nine, padded, GrowthOptions(), strength=0.0)
    assert torch.equal(result.images, padded.image)
    assert result.notices == ("Strength is 0: the picture is returned as it came.",)


@pytest.mark.parametrize("settings", [{"width": 512}, {"height": 64}, {"compat": Compat.DIFFUSERS}])
def test_what_would_move_the_canvas_is_refused(nine, settings):
    _, padded = padded_photo(Padding(right=20))
    with pytest.raises(InputError, match="leave width and height at 0 and compat off"):
        run(nine, padded, **settings)


@pytest.mark.parametrize("box", [Box(0, 0, 171, 120), Box(-1, 0, 9, 9), Box(5, 5, 5, 9)])
def test_an_original_that_is_not_on_the_canvas_is_refused(nine, box):
    _, padded = padded_photo(Padding(right=20))
    with pytest.raises(InputError, match="of a canvas of 170x120"):
        outpaint(request_for(padded), box, nine, HOST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth": Length(3)}, "growth is 3; give a value from 16"),
        ({"growth": Length(-5, Unit.PERCENT)}, "growth is -5.*percent"),
        ({"overlap": -1}, "overlap is -1"),
        ({"window": 10}, "window is 10; give a value from 64"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        GrowthOptions(**options)
