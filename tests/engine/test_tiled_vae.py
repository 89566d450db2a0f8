"""The VAE in bands of rows: the same numbers as the whole picture at once, so that there are no seams to see."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comfyui_mend.engine.models.bands import Bands, Plane, Statistics
from comfyui_mend.engine.models.detect import SHIPPED
from comfyui_mend.engine.models.tiled_vae import TiledVae

CPU = torch.device("cpu")
BAND = 2**18
"""Bytes; of the pictures here it makes a dozen bands and more of the largest planes."""
ROUNDING = 2e-5
"""Largest difference in sums of float32, relative to the largest value."""


def stable_diffusion_vae():
    """Random weights, with every layer of the real one and fewer channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )


def flux_vae():
    """Without the two 1x1 convolutions between the halves, with 16 latent channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=4,
        latent_channels=16,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def shipped_vae():
    """Trained weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(SHIPPED / "mend-shapes", subfolder="vae", low_cpu_mem_usage=False)


def qwen_image_vae():
    """Of videos, without group norms; random weights, with every layer of the real one and fewer channels."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=8)
    for name, parameter in vae.named_parameters():
        if "gamma" in name:
            parameter.data.uniform_(0.5, 1.5)
    return vae


@pytest.fixture(scope="module", params=[stable_diffusion_vae, flux_vae, shipped_vae, qwen_image_vae])
def vae(request):
    return request.param().eval().requires_grad_(False)


def encoded(vae, pixels):
    """The posterior of whole pictures by diffusers' own call."""
    if "temperal_downsample" not in vae.config:
        return vae.encode(pixels).latent_dist
    posterior = vae.encode(pixels[:, :, None]).latent_dist
    return type(posterior)(posterior.parameters[:, :, 0])


def decoded(vae, latents):
    """Whole pictures by diffusers' own call."""
    if "temperal_downsample" not in vae.config:
        return vae.decode(latents).sample
    return vae.decode(latents[:, :, None]).sample[:, :, 0]


@pytest.fixture(scope="module")
def picture():
    """Smooth on the left, where a seam would show, and noise on the right; [1, 3, 160, 128] in -1..1."""
    generator = torch.Generator().manual_seed(5)
    pixels = F.interpolate(torch.rand(1, 3, 5, 4, generator=generator), size=(160, 128), mode="bicubic") * 2 - 1
    pixels[..., 64:] += torch.randn(1, 3, 160, 64, generator=generator) * 0.2
    return pixels.clamp(-1, 1)


class Counted(TiledVae):
    def __init__(self, vae, band_bytes=BAND):
        super().__init__(vae, CPU, band_bytes, self.count)
        self.bands = 0

    def count(self):
        self.bands += 1


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_a_posterior_is_that_of_the_whole_picture(vae, picture):
    whole, tiled = encoded(vae, picture), Counted(vae)
    posterior = tiled.encode(picture)
    assert relative(posterior.mean, whole.mean) < ROUNDING
    assert relative(posterior.std, whole.std) < ROUNDING
    fewer = Counted(vae, 2**40)
    fewer.encode(picture)
    assert tiled.bands > 2 * fewer.bands  # of which there is one in each layer


def test_pixels_are_those_of_the_whole_picture(vae, picture):
    latents = encoded(vae, picture).mean
    tiled, fewer = Counted(vae), Counted(vae, 2**40)
    whole = decoded(vae, latents)
    assert relative(tiled.decode(latents), whole) < ROUNDING
    assert relative(fewer.decode(latents), whole) < ROUNDING
    assert tiled.bands > 2 * fewer.bands


def test_the_smallest_bands_have_two_rows(vae, picture):
    latents = encoded(vae, picture[..., :48, :32]).mean
    assert relative(Counted(vae, 1).decode(latents), decoded(vae, latents)) < ROUNDING
    mean = Counted(vae, 1).encode(picture[..., :48, :32]).mean
    assert relative(mean, latents) < ROUNDING


def test_pictures_of_a_batch_keep_to_themselves(vae, picture):
    batch = torch.cat([picture, -picture.flip(-1)])
    posterior = Counted(vae).encode(batch)
    assert relative(posterior.mean, encoded(vae, batch).mean) < ROUNDING
    assert relative(Counted(vae).decode(posterior.mean), decoded(vae, posterior.mean)) < ROUNDING


def test_bands_that_see_too_few_rows_around_them_show(vae, picture, monkeypatch):
    """The control: what the comparisons above would say of bands without their neighbours' rows."""
    latents = encoded(vae, picture).mean
    posterior, pixels = Counted(vae).encode(picture), Counted(vae).decode(latents)
    over = Bands.over
    monkeypatch.setattr(Bands, "over", lambda *args, reach=0, **options: over(*args, **options))
    assert relative(Counted(vae).encode(picture).mean, posterior.mean) > 100 * ROUNDING
    assert relative(Counted(vae).decode(latents), pixels) > 100 * ROUNDING


def test_a_stop_is_noticed_between_bands(vae, picture):
    class StopError(Exception):
        pass

    class Stopping(Counted):
        def count(self):
            super().count()
            if self.bands == 5:
                raise StopError

    for verb, inputs in (("encode", picture), ("decode", encoded(vae, picture).mean)):
        stopping = Stopping(vae)
        with pytest.raises(StopError):
            getattr(stopping, verb)(inputs)
        assert stopping.bands == 5


def steepness(pixels):
    """Of each line between two rows."""
    return (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean(dim=(0, 1, 3))


def test_no_line_is_steeper_or_flatter_than_in_the_whole_picture(picture):
    """And the control: tiles that are decoded one by one and blended differ by 5 % at lines of their borders."""
    vae = shipped_vae().eval().requires_grad_(False)
    latents = vae.encode(picture).latent_dist.mean
    whole = vae.decode(latents).sample
    ratios = steepness(Counted(vae).decode(latents)) / steepness(whole)
    assert float((ratios - 1).abs().max()) < 1e-4

    blended = copy.deepcopy(vae)
    blended.enable_tiling()
    blended.tile_sample_min_size, blended.tile_latent_min_size = 64, 16
    tiles = blended.decode(latents).sample
    assert relative(tiles, whole) > 1e-2
    assert float((steepness(tiles) / steepness(whole) - 1).abs().max()) > 0.05


def test_half_precision_is_as_near_to_the_truth_as_the_whole_network_in_it(picture):
    vae = shipped_vae().eval().requires_grad_(False)
    latents = vae.encode(picture).latent_dist.mean
    truth = vae.decode(latents).sample
    half, latents = vae.to(torch.bfloat16), latents.to(torch.bfloat16)
    tiled, whole = Counted(half).decode(latents), half.decode(latents).sample
    assert tiled.dtype == torch.bfloat16
    assert float((tiled - truth).pow(2).mean()) < 1.3 * float((whole - truth).pow(2).mean())


def test_statistics_of_bands_are_those_of_the_whole():
    """Where the mean is large beside the spread, sums of squares would lose it."""
    values = torch.randn(1, 8, 33, 20, generator=torch.Generator().manual_seed(0)) + 1000
    values[:, 3] += 5
    statistics = Statistics()
    for band in values.split(7, dim=2):
        statistics.add(band)
    norm = torch.nn.GroupNorm(4, 8)
    norm.weight.data, norm.bias.data = torch.linspace(-1, 2, 8), torch.linspace(3, -1, 8)
    norm.requires_grad_(False)
    normalised = Plane(values, statistics).normalised_by(norm)(values)
    exact = copy.deepcopy(norm).double()(values.double())
    assert float((normalised - exact).abs().max()) < 1e-3  # what float32 leaves of 1000 + a spread of 1


def test_only_known_layers_are_taken_apart(vae):
    from diffusers import AutoencoderKL, AutoencoderTiny

    assert TiledVae.supports(vae)
    assert not TiledVae.supports(
        AutoencoderTiny(
            num_encoder_blocks=(1,),
            num_decoder_blocks=(1,),
            encoder_block_out_channels=(8,),
            decoder_block_out_channels=(8,),
        )
    )
    attentive = AutoencoderKL(up_block_types=["AttnUpDecoderBlock2D"], block_out_channels=(8,), norm_num_groups=2)
    assert not TiledVae.supports(attentive)
