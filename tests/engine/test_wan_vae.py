"""Qwen-Image's autoencoder: its files, and pictures in one piece against the module's own call on a video."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comfyui_mend.engine.models.modules import assemble
from comfyui_mend.engine.models.parts import build_vae
from comfyui_mend.engine.models.tiled_vae import TiledVae, WanNetwork
from comfyui_mend.engine.models.wan_vae import WAN_VAE, build_wan_vae, decode, encode, read_wan_vae, wan_names, widths
from comfyui_mend.engine.types import ModelFileError
from torch import nn

CPU = torch.device("cpu")
ROUNDING = 1e-5
"""Largest difference in sums of float32, relative to the largest value."""
REAL = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
TINY = {**REAL, "base_dim": 8}
SHALLOW = {**TINY, "dim_mult": [1, 3, 2], "num_res_blocks": 1, "temperal_downsample": [True, False], "z_dim": 3}
DEEP = {**TINY, "dim_mult": [1, 1, 2, 2, 4], "num_res_blocks": 3, "temperal_downsample": [True, False, True, False]}


@pytest.fixture(scope="module", params=[TINY, SHALLOW], ids=["tiny", "shallow"])
def vae(request):
    return random_vae(request.param)


def random_vae(config):
    torch.manual_seed(0)
    vae = build_wan_vae(config).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "gamma" in name:
            parameter.uniform_(0.5, 1.5)
    return vae


def pictures(count=2, height=80, width=48):
    """[count, 3, height, width] in -1..1, smooth on the left and noise on the right."""
    generator = torch.Generator().manual_seed(5)
    pixels = F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=(height, width), mode="bicubic") * 2
    pixels[..., width // 2 :] += torch.randn(count, 3, height, width - width // 2, generator=generator) * 0.2
    return (pixels - 1).clamp(-1, 1)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


# --- files


def skeleton(config):
    """The parameters of Wan's own module, by the names it gives them: layers in one row, Sequentials inside."""
    dim, factors, layers = config["base_dim"], config["dim_mult"], config["num_res_blocks"]
    times = config["temperal_downsample"]

    class Norm(nn.Module):
        def __init__(self, width, axes=3):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(width, *[1] * axes))

    class Resnet(nn.Module):
        def __init__(self, before, after):
            super().__init__()
            convs = nn.Conv3d(before, after, 3), nn.Conv3d(after, after, 3)
            self.residual = nn.Sequential(
                Norm(before), nn.SiLU(), convs[0], Norm(after), nn.SiLU(), nn.Dropout(), convs[1]
            )
            if before != after:
                self.shortcut = nn.Conv3d(before, after, 1)

    class Attention(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.to_qkv, self.proj = (
                Norm(width, 2),
                nn.Conv2d(width, 3 * width, 1),
                nn.Conv2d(width, width, 1),
            )

    class Resample(nn.Module):
        def __init__(self, before, after, time):
            super().__init__()
            self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(before, after, 3))
            if time:
                self.time_conv = nn.Conv3d(before, time, (3, 1, 1))

    class Half(nn.Module):
        def __init__(self, before, first, row, last, after, name):
            super().__init__()
            self.conv1 = nn.Conv3d(before, first, 3)
            middle = last if name == "downsamples" else first
            self.middle = nn.Sequential(Resnet(middle, middle), Attention(middle), Resnet(middle, middle))
            self.head = nn.Sequential(Norm(last), nn.SiLU(), nn.Conv3d(last, after, 3))
            setattr(self, name, nn.Sequential(*row))

    down, width = [], dim
    for level, factor in enumerate(factors):
        for _ in range(layers):
            down.append(Resnet(width, dim * factor))
            width = dim * factor
        if level < len(times):
            down.append(Resample(width, width, width if times[level] else 0))
    up, lowest = [], width
    for level, factor in enumerate(factors[::-1]):
        for _ in range(layers + 1):
            up.append(Resnet(width, dim * factor))
            width = dim * factor
        if level < len(times):
            up.append(Resample(width, width // 2, 2 * width if times[-1 - level] else 0))
            width //= 2
    whole, z = nn.Module(), config["z_dim"]
    whole.encoder = Half(3, dim, down, lowest, 2 * z, "downsamples")
    whole.conv1, whole.conv2 = nn.Conv3d(2 * z, 2 * z, 1), nn.Conv3d(z, z, 1)
    whole.decoder = Half(z, lowest, up, width, 3, "upsamples")
    return whole


@pytest.mark.parametrize("config", [REAL, TINY, SHALLOW, DEEP], ids=["real", "tiny", "shallow", "deep"])
def test_wans_own_files_have_every_layer_in_its_place(config):
    with torch.device("meta"):
        state = skeleton(config).state_dict()
        expected = build_wan_vae(config).state_dict()
    read = read_wan_vae(state, config)
    assert {key: tensor.shape for key, tensor in read.items()} == {key: t.shape for key, t in expected.items()}
    # layers of the same shape are told apart by their order, in which both modules name them
    for row in ("encoder.down_blocks", "encoder.mid_block.resnets", "decoder.mid_block.resnets", "decoder.up_blocks"):
        assert [key for key in read if key.startswith(row)] == [key for key in expected if key.startswith(row)]


def test_wans_own_files_are_read_as_by_diffusers():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        state = skeleton(REAL).state_dict()
    theirs, ours = convert_wan_vae_to_diffusers(dict(state)), read_wan_vae(state, REAL)
    assert theirs.keys() == ours.keys() and all(theirs[key] is ours[key] for key in ours)


def test_both_layouts_make_the_same_module(vae):
    config, state = dict(vae.config), vae.state_dict()
    names = {new: old for old, new in wan_names(config).items()}
    own = {}
    for key, tensor in state.items():
        block = key
        while block not in names:
            block = block.rpartition(".")[0]
        own[names[block] + key[len(block) :]] = tensor
    assert own.keys() == skeleton(config).state_dict().keys()
    for layout in (state, own):
        read = read_wan_vae(layout, config)
        module = assemble(lambda: build_wan_vae(config), read, torch.float32, "file")
        assert torch.equal(encode(module, pictures()).mean, encode(vae, pictures()).mean)


def test_files_of_another_depth_are_refused():
    state = skeleton({**TINY, "num_res_blocks": 1}).state_dict()
    with pytest.raises(ModelFileError, match="does not fit its configuration"):
        assemble(lambda: build_wan_vae(TINY), read_wan_vae(state, TINY), torch.float32, "file")


def test_widths_are_those_of_the_levels():
    assert widths(REAL) == [96, 192, 384, 384]
    assert WAN_VAE.kind == "AutoencoderKLQwenImage"


# --- pictures in one piece


def test_a_picture_is_a_video_of_one_frame(vae):
    pixels = pictures()
    theirs, ours = vae.encode(pixels[:, :, None]).latent_dist, encode(vae, pixels)
    assert relative(ours.mean, theirs.mean[:, :, 0]) < ROUNDING
    assert relative(ours.std, theirs.std[:, :, 0]) < ROUNDING
    latents = ours.mean
    exact = copy.deepcopy(vae).double().decode(latents[:, :, None].double()).sample[:, :, 0]
    assert relative(decode(vae, latents), exact) < ROUNDING


def test_only_the_last_of_the_three_frames_a_convolution_sees_counts(vae):
    """The control: another one's weights make another picture."""
    latents = encode(vae, pictures(1)).mean
    other = copy.deepcopy(vae)
    other.decoder.conv_in.weight.data = vae.decoder.conv_in.weight.flip(2)
    assert relative(decode(other, latents), decode(vae, latents)) > 1e-2
    other.decoder.conv_in.weight.data = vae.decoder.conv_in.weight * torch.tensor([0.0, 0, 1])[:, None, None]
    assert torch.equal(decode(other, latents), decode(vae, latents))


def test_pixels_end_at_black_and_white():
    vae = random_vae(TINY)
    vae.decoder.norm_out.gamma *= 20
    latents = encode(vae, pictures(1)).mean
    expected = vae.decode(latents[:, :, None]).sample[:, :, 0]
    assert float(expected.abs().max()) == 1
    assert relative(decode(vae, latents), expected) < 10 * ROUNDING
    assert relative(TiledVae(vae, CPU, 2**14, lambda: None).decode(latents), expected) < 10 * ROUNDING


@pytest.mark.parametrize("band_bytes", [1, 2**14, 2**18])
def test_bands_make_the_same_picture(vae, band_bytes):
    pixels = pictures(2, 88, 56)
    posterior = encode(vae, pixels)
    tiled = TiledVae(vae, CPU, band_bytes, lambda: None)
    assert relative(tiled.encode(pixels).mean, posterior.mean) < ROUNDING
    assert relative(tiled.encode(pixels).std, posterior.std) < ROUNDING
    assert relative(tiled.decode(posterior.mean), decode(vae, posterior.mean)) < ROUNDING


def test_blended_tiles_do_not():
    """The control: what the comparison above says of diffusers' tiles."""
    vae = random_vae(TINY)
    latents = encode(vae, pictures(1, 96, 96)).mean
    whole = decode(vae, latents)
    vae.enable_tiling(64, 64, 48, 48)
    assert relative(vae.decode(latents[:, :, None]).sample[:, :, 0], whole) > 1000 * ROUNDING


def test_half_precision_is_as_near_to_the_truth_as_the_modules_own_call(vae):
    latents = encode(vae, pictures(1)).mean
    truth = decode(vae, latents)
    half, latents = copy.deepcopy(vae).to(torch.bfloat16), latents.to(torch.bfloat16)
    own, ours = half.decode(latents[:, :, None]).sample[:, :, 0], decode(half, latents)
    assert ours.dtype == torch.bfloat16
    assert float((ours - truth).pow(2).mean()) < 1.3 * float((own - truth).pow(2).mean())


def test_cells_without_anything_are_no_division_by_zero_in_float16():
    nothing = torch.zeros(1, 8, 2, 2, dtype=torch.float16)
    assert bool(F.normalize(nothing, dim=1).isnan().all())  # the norms of older diffusers
    vae = random_vae(TINY).half()
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    assert torch.equal(decode(vae, torch.zeros(1, 16, 4, 4).half()), torch.zeros(1, 3, 32, 32).half())


def test_other_autoencoders_are_no_videos():
    config = {"block_out_channels": [8], "norm_num_groups": 2}
    assert not WanNetwork.fits(build_vae(config))
    assert WanNetwork.fits(build_wan_vae(TINY))
