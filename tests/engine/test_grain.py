import numpy as np
import pytest
import torch
from comfyui_mend.engine.grain import add_grain, grain_level
from comfyui_mend.engine.types import InputError
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage


def noise(sigma, seed=0, shape=(1, 160, 180), channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, channels, generator=generator) * sigma


def scene(shape=(1, 160, 180)):
    """Smooth shading with hard edges every 20 pixels."""
    rows, columns = torch.meshgrid(torch.arange(shape[1]), torch.arange(shape[2]), indexing="ij")
    shade = 0.3 + 0.2 * torch.sin(rows / 40) + 0.3 * ((rows // 20 + columns // 20) % 2)
    return shade[None, ..., None].expand(*shape, 3)


def grain_like(blur, sigma=0.03, seed=0, grey=False):
    grain = noise(1.0, seed, channels=1 if grey else 3).expand(-1, -1, -1, 3).numpy()
    grain = ndimage.gaussian_filter(grain, (0, blur, blur, 0), mode="wrap") if blur else grain
    return torch.from_numpy(grain / grain.std() * sigma).float()


def disk(shape=(1, 160, 180), radius=50):
    rows, columns = torch.meshgrid(torch.arange(shape[1]), torch.arange(shape[2]), indexing="ij")
    return ((rows - 80) ** 2 + (columns - 90) ** 2 <= radius**2).numpy()


@pytest.mark.parametrize("sigma", [0.0, 1 / 255, 4 / 255, 12 / 255])
def test_white_noise_gives_its_own_standard_deviation_even_among_edges(sigma):
    level = grain_level(scene() + noise(sigma), torch.ones(1, 160, 180))
    assert level.shape == (1, 3)
    assert torch.allclose(level, torch.full((1, 3), sigma), rtol=0.05, atol=0.1 / 255)


def test_each_channel_and_each_picture_has_its_own():
    sigmas = torch.tensor([[0.01, 0.02, 0.03], [0.04, 0.0, 0.01]])
    images = torch.cat([scene() + noise(1.0, seed) * sigma for seed, sigma in enumerate(sigmas)])
    level = grain_level(images, torch.ones(2, 160, 180))
    assert torch.allclose(level, sigmas, rtol=0.06, atol=0.1 / 255)
    assert torch.equal(level[1:], grain_level(images[1:], torch.ones(1, 160, 180)))


@given(st.integers(0, 1000))
def test_what_the_weight_excludes_cannot_move_it(seed):
    weight = torch.zeros(1, 60, 60)
    weight[:, 10:40, 12:50] = 1
    image = noise(0.02, seed, (1, 60, 60)) + 0.5
    other = torch.where(weight[..., None] > 0, image, torch.tensor(float(seed % 7)))
    assert torch.equal(grain_level(image, weight), grain_level(other, weight))


def test_alpha_is_not_grain_and_too_few_pixels_say_nothing():
    rgba = torch.cat([scene() + noise(0.01), torch.rand(1, 160, 180, 1)], dim=-1)
    assert torch.equal(grain_level(rgba, torch.ones(1, 160, 180)), grain_level(rgba[..., :3], torch.ones(1, 160, 180)))
    assert torch.equal(grain_level(rgba, torch.zeros(1, 160, 180)), torch.zeros(1, 3))
    assert torch.equal(grain_level(torch.rand(1, 1, 1, 3), torch.ones(1, 1, 1)), torch.zeros(1, 3))
    with pytest.raises(InputError, match="one weight"):
        grain_level(rgba, torch.ones(1, 160, 90))


@pytest.mark.parametrize("blur", [0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("grey", [False, True])
def test_added_grain_has_the_size_strength_and_colour_of_what_is_around(blur, grey):
    smooth, grain = scene(), grain_like(blur, grey=grey)
    inside = disk()
    grained, wanted, had = add_grain(
        smooth[0].numpy(), (smooth + grain)[0].numpy(), inside, ~inside, 1.0, torch.Generator().manual_seed(1)
    )
    added = grained - smooth[0].numpy()
    assert had < 0.02 * wanted
    for smoothing in (0, 1):
        found, expected = (
            ndimage.gaussian_filter(values, (smoothing, smoothing, 0))[inside].std()
            for values in (added, grain[0].numpy())
        )
        assert found == pytest.approx(expected, rel=0.15)
    correlation = np.corrcoef(added[inside].T)[0, 1]
    assert correlation == pytest.approx(1.0 if grey else 0.0, abs=0.12)
    assert abs(added[inside].mean()) < 1 / 255


def test_strength_scales_it_and_the_seed_decides_it():
    smooth, grainy, inside = scene()[0].numpy(), (scene() + grain_like(0.7))[0].numpy(), disk()

    def added(strength, seed):
        generator = torch.Generator().manual_seed(seed)
        return add_grain(smooth, grainy, inside, ~inside, strength, generator)[0] - smooth

    assert np.allclose(added(0.5, 1), added(1.0, 1) / 2, atol=1e-5)
    assert np.array_equal(added(1.0, 1), added(1.0, 1))
    assert not np.allclose(added(1.0, 1), added(1.0, 2), atol=1e-3)
    assert not added(0.0, 1).any()


def test_grain_that_is_there_already_is_not_doubled():
    grainy, inside = (scene() + grain_like(0.7))[0].numpy(), disk()
    other = (scene() + grain_like(0.7, sigma=0.06, seed=5))[0].numpy()
    unchanged, wanted, had = add_grain(other, grainy, inside, ~inside, 1.0, torch.Generator())
    assert had > wanted
    assert np.array_equal(unchanged, other)


def test_half_the_grain_is_topped_up():
    full, half = scene() + grain_like(0), scene() + grain_like(0, sigma=0.015, seed=3)
    inside = disk()
    grained, _, _ = add_grain(half[0].numpy(), full[0].numpy(), inside, ~inside, 1.0, torch.Generator())
    level = grain_level(torch.from_numpy(grained)[None], torch.from_numpy(inside).float()[None])
    assert torch.allclose(level, torch.tensor(0.03), rtol=0.1)


def test_texture_of_the_painted_part_is_left_alone():
    smooth, inside = scene().clone(), disk()
    smooth[:, :, 90:] += torch.rand(1, 160, 90, 1, generator=torch.Generator().manual_seed(2)) * 0.3 - 0.15
    grained, _, _ = add_grain(
        smooth[0].numpy(), (scene() + grain_like(0))[0].numpy(), inside, ~inside, 1.0, torch.Generator()
    )
    added = grained - smooth[0].numpy()
    assert not added[70:90, 110:].any()
    assert added[70:90, 45:75].std() == pytest.approx(0.03, rel=0.2)


@pytest.mark.parametrize("inside", [np.zeros((160, 180), bool), np.ones((160, 180), bool)])
def test_without_two_sides_to_compare_nothing_is_added(inside):
    smooth = scene()[0].numpy()
    grained, _, _ = add_grain(smooth, (scene() + grain_like(0))[0].numpy(), inside, ~inside, 1.0, torch.Generator())
    assert np.array_equal(grained, smooth)


def test_coarse_texture_around_is_not_copied_as_blobs():
    smooth, inside = scene(), disk()
    texture = grain_like(3, sigma=0.15)
    grained, _, _ = add_grain(
        smooth[0].numpy(),
        (smooth + texture + grain_like(0, seed=1))[0].numpy(),
        inside,
        ~inside,
        1.0,
        torch.Generator(),
    )
    added = grained - smooth[0].numpy()
    assert added[inside].std() < 0.05
    assert ndimage.gaussian_filter(added, (2, 2, 0))[inside].std() < 0.012
