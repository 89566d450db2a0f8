"""LoRA files: each kind against its formula, each spelling against the others, and what fits nowhere."""

import inspect
import json
import re
from dataclasses import replace

import pytest
import torch
from comfyui_mend.engine.host import LocalHost, Role
from comfyui_mend.engine.models import ldm, lora
from comfyui_mend.engine.models.detect import CONFIGS
from comfyui_mend.engine.models.load import load_model
from comfyui_mend.engine.models.lora import Lora, LoraStack, Network, decompose
from comfyui_mend.engine.models.lora_file import read_lora
from comfyui_mend.engine.models.protocol import PromptSyntax
from comfyui_mend.engine.models.weight_files import read_json
from comfyui_mend.engine.types import InputError, ModelFileError
from safetensors.torch import save_file
from tiny import relative, tiny_pipeline
from tiny_flow import tiny_flux, tiny_sd3
from tiny_qwen import tiny_qwen_image, tiny_transformer
from tiny_sdxl import save_tiny_sdxl, tiny_sdxl

CPU = LocalHost(torch.device("cpu"))
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
PROJECTION = "down_blocks.1.attentions.0.proj_in"
FORWARD = "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
LAYERS = (ATTENTION, CONVOLUTION, PROJECTION, FORWARD)
TEXT = "encoder.layers.1.self_attn.q_proj"
RANK = 4


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def model_folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def unet_network(pipeline, dtype=torch.float32):
    return Network("unet", pipeline.unet.state_dict(), dict(pipeline.unet.config), dtype)


def text_network(encoder, name="text_encoder"):
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    return Network(name, state, encoder.config.to_dict(), torch.float32)


def draw(seed=0):
    """Small random tensors of any shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) * 0.2


def factors(weight, seed=0):
    """(down, up) of a LoRA for a weight [out, in] or [out, in, h, w]."""
    random = draw(seed)
    ones = (1,) * (weight.ndim - 2)
    return random(RANK, *weight.shape[1:]), random(weight.shape[0], RANK, *ones)


def product(down, up):
    """up @ down, written as the two layers are applied, one after the other."""
    if down.ndim == 2:
        return torch.einsum("or,ri->oi", up, down)
    return torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)


def kohya(layers, alpha=8.0, prefix="lora_unet_"):
    """{layer: (down, up)} as kohya's trainers write it."""
    state = {}
    for layer, (down, up) in layers.items():
        name = prefix + layer.replace(".", "_")
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def write(path, state, metadata=None):
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata=metadata)
    return path


@pytest.fixture
def style(tmp_path, pipeline):
    """A LoRA of alpha 8 for a few layers, and what it holds."""
    weights = pipeline.unet.state_dict()
    layers = {layer: factors(weights[f"{layer}.weight"], n) for n, layer in enumerate(LAYERS)}
    return write(tmp_path / "style.safetensors", kohya(layers)), layers


def fused(network, *loras, model="tiny"):
    stack = LoraStack(loras, model)
    weights = stack.fuse(network)
    return weights, stack.finish()


# --- the formulas


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.7])
def test_a_lora_is_added_by_alpha_over_rank(pipeline, style, strength):
    path, layers = style
    before = pipeline.unet.state_dict()
    weights, notices = fused(unet_network(pipeline), Lora(path, strength))
    assert notices == ()
    for layer, (down, up) in layers.items():
        change = strength * 8 / RANK * product(down, up)
        expected = before[f"{layer}.weight"] + change.reshape(before[f"{layer}.weight"].shape)
        assert relative(expected, weights[f"{layer}.weight"]) <= 1e-6
        assert relative(expected, before[f"{layer}.weight"]) > 1e-2
    changed = {key for key in before if not torch.equal(before[key], weights[key])}
    assert changed == {f"{layer}.weight" for layer in layers}


def test_the_network_computes_what_the_layers_beside_it_would(pipeline, style):
    """W x + alpha / rank * up(down(x)), the definition, applied by hooks and not by weights."""
    path, layers = style
    unet = tiny_pipeline().unet
    inputs = (torch.randn(1, 9, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor(500.0))
    prompt = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(2))

    def branch(down, up):
        def add(module, args, output):
            (x,) = args
            if down.ndim == 2:
                return output + 2 * (x @ down.T @ up.T)
            padding = module.padding if isinstance(module, torch.nn.Conv2d) else 0
            hidden = torch.nn.functional.conv2d(x, down, padding=padding)
            return output + 2 * torch.nn.functional.conv2d(hidden, up)

        return add

    with torch.no_grad():
        plain = unet(*inputs, prompt)[0]
        handles = [unet.get_submodule(name).register_forward_hook(branch(*pair)) for name, pair in layers.items()]
        expected = unet(*inputs, prompt)[0]
        for handle in handles:
            handle.remove()
        unet.load_state_dict(fused(unet_network(pipeline), Lora(path))[0])
        found = unet(*inputs, prompt)[0]
    assert relative(expected, found) <= 5e-6
    assert relative(expected, plain) > 1e-2


def test_strength_0_is_the_model_bit_for_bit(pipeline, style):
    path, _ = style
    before = pipeline.unet.state_dict()
    weights, _ = fused(unet_network(pipeline), Lora(path, 0), Lora(path, 0, text_strength=1))
    assert all(torch.equal(before[key], weights[key]) for key in before)


def test_several_add_up_in_any_order(pipeline, style, tmp_path):
    path, layers = style
    weight = pipeline.unet.state_dict()[f"{ATTENTION}.weight"]
    second = factors(weight, 9)
    other = write(tmp_path / "other.safetensors", kohya({ATTENTION: second}, alpha=None))
    first, _ = fused(unet_network(pipeline), Lora(path, 0.5), Lora(other, 2))
    expected = weight + 0.5 * 2 * product(*layers[ATTENTION]) + 2 * product(*second)
    assert relative(expected, first[f"{ATTENTION}.weight"]) <= 1e-6
    swapped, _ = fused(unet_network(pipeline), Lora(other, 2), Lora(path, 0.5))
    assert relative(first[f"{ATTENTION}.weight"], swapped[f"{ATTENTION}.weight"]) <= 1e-6


def test_half_precision_is_rounded_once(pipeline, style):
    path, layers = style
    weight = pipeline.unet.state_dict()[f"{ATTENTION}.weight"]
    weights, _ = fused(unet_network(pipeline, torch.float16), Lora(path))
    exact = weight + 2 * product(*layers[ATTENTION])
    assert weights[f"{ATTENTION}.weight"].dtype == torch.float16
    step = exact.abs() * 2**-11 + 2**-25
    assert ((weights[f"{ATTENTION}.weight"].float() - exact).abs() <= step * 1.001).all()
    twice = (weight.half() + (2 * product(*layers[ATTENTION])).half()).float()
    assert not ((twice - exact).abs() <= step * 1.001).all()


def special(kind, weight):
    """(tensors of a layer, the change they stand for) by the papers' formulas, entry by entry."""
    random, (out, into), kernel = draw(5), weight.shape[:2], weight.shape[2:]
    flat = weight[0].numel()
    if kind == "mid":
        down, mid, up = random(RANK, into, 1, 1), random(RANK, RANK, *kernel), random(out, RANK, 1, 1)
        change = torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
        return {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, change
    if kind == "loha":
        a, b, c, d = random(out, RANK), random(RANK, flat), random(out, RANK), random(RANK, flat)
        change = torch.stack([(a[o] @ b) * (c[o] @ d) for o in range(out)])
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, change
    if kind == "loha with a kernel":
        one, two = ((random(RANK, RANK, *kernel), random(RANK, out), random(RANK, into)) for _ in range(2))
        rebuilt = [torch.einsum("pqhw,po,qi->oihw", t, a, b) for t, a, b in (one, two)]
        tensors = {}
        for number, (t, a, b) in ((1, one), (2, two)):
            tensors |= {f"hada_t{number}": t, f"hada_w{number}_a": a, f"hada_w{number}_b": b}
        return tensors, rebuilt[0] * rebuilt[1]
    rows, columns = 4, 4
    small, a, b = random(rows, columns), random(out // rows, RANK), random(RANK, into // columns)
    large = a @ b
    if kind == "lokr with a kernel":
        a, b, t = random(RANK, out // rows), random(RANK, into // columns), random(RANK, RANK, *kernel)
        large = torch.einsum("pqhw,po,qi->oihw", t, a, b)
        tensors = {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
    else:
        tensors = {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b}
    blocks = [torch.cat([small[r, c] * large for c in range(columns)], dim=1) for r in range(rows)]
    return tensors, torch.cat(blocks)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("mid", CONVOLUTION),
        ("loha", FORWARD),
        ("loha", CONVOLUTION),
        ("loha with a kernel", CONVOLUTION),
        ("lokr", FORWARD),
        ("lokr with a kernel", CONVOLUTION),
    ],
)
def test_locon_loha_and_lokr_follow_their_formulas(tmp_path, pipeline, kind, layer):
    before = pipeline.unet.state_dict()[f"{layer}.weight"]
    tensors, change = special(kind, before)
    name = "lora_unet_" + layer.replace(".", "_")
    state = {f"{name}.{key}": value for key, value in tensors.items()} | {f"{name}.alpha": torch.tensor(2.0)}
    weights, _ = fused(unet_network(pipeline), Lora(write(tmp_path / "x.safetensors", state)))
    expected = before + 2 / RANK * change.reshape(before.shape)
    assert relative(expected, weights[f"{layer}.weight"]) <= 1e-6
    assert relative(expected, before) > 1e-3


def test_a_lokr_without_a_low_rank_ignores_alpha(tmp_path, pipeline):
    weight = pipeline.unet.state_dict()[f"{ATTENTION}.weight"]
    small, large = draw()(4, 4), draw(1)(weight.shape[0] // 4, weight.shape[1] // 4)
    name = "lora_unet_" + ATTENTION.replace(".", "_")
    state = {f"{name}.lokr_w1": small, f"{name}.lokr_w2": large, f"{name}.alpha": torch.tensor(1e10)}
    weights, _ = fused(unet_network(pipeline), Lora(write(tmp_path / "x.safetensors", state)))
    assert relative(weight + torch.kron(small, large), weights[f"{ATTENTION}.weight"]) <= 1e-6


@pytest.mark.parametrize("layer", [ATTENTION, CONVOLUTION])
@pytest.mark.parametrize("spelling", ["rows", "inputs", "peft"])
def test_dora_normalises_the_sum(tmp_path, pipeline, layer, spelling):
    """m (W + dW) / |W + dW| and not |W|, which is what ComfyUI divides by; strength goes from W to it."""
    weight = pipeline.unet.state_dict()[f"{layer}.weight"]
    down, up = factors(weight)
    axes = [axis for axis in range(weight.ndim) if axis != (1 if spelling == "inputs" else 0)]
    magnitude = torch.linalg.vector_norm(weight, dim=axes, keepdim=True) * (1 + draw(3)(1))
    direction = weight + 2 * product(down, up)
    trained = magnitude * direction / torch.linalg.vector_norm(direction, dim=axes, keepdim=True)
    state = kohya({layer: (down, up)})
    name = "lora_unet_" + layer.replace(".", "_")
    if spelling == "peft":
        shape = (-1,) if weight.ndim == 2 else (1, -1, 1, 1)
        state[f"{name}.lora_magnitude_vector.weight"] = magnitude.reshape(shape)
    else:
        state[f"{name}.dora_scale"] = magnitude
    path = write(tmp_path / "x.safetensors", state)
    for strength in (1, 0.4):
        weights, _ = fused(unet_network(pipeline), Lora(path, strength))
        expected = weight + strength * (trained - weight)
        assert relative(expected, weights[f"{layer}.weight"]) <= 2e-6
    by_the_weight = magnitude * direction / torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    assert relative(trained, by_the_weight) > 1e-2
    assert torch.isfinite(decompose(torch.zeros(3, 2), torch.ones(3, 1))).all()


def test_whole_differences_are_added_to_weights_and_biases(tmp_path, pipeline):
    state = pipeline.unet.state_dict()
    change, bias = draw()(*state[f"{CONVOLUTION}.weight"].shape), draw()(*state[f"{CONVOLUTION}.bias"].shape)
    norm = draw()(*state["conv_norm_out.weight"].shape)
    name = "lora_unet_" + CONVOLUTION.replace(".", "_")
    file = {f"{name}.diff": change, f"{name}.diff_b": bias, "lora_unet_conv_norm_out.w_norm": norm}
    weights, _ = fused(unet_network(pipeline), Lora(write(tmp_path / "x.safetensors", file), 0.5))
    assert torch.equal(weights[f"{CONVOLUTION}.weight"], state[f"{CONVOLUTION}.weight"] + 0.5 * change)
    assert torch.equal(weights[f"{CONVOLUTION}.bias"], state[f"{CONVOLUTION}.bias"] + 0.5 * bias)
    assert torch.equal(weights["conv_norm_out.weight"], state["conv_norm_out.weight"] + 0.5 * norm)


def test_the_first_layer_of_an_inpainting_model_takes_the_ordinary_models_change(tmp_path, pipeline):
    weight = pipeline.unet.state_dict()["conv_in.weight"]
    down, up = factors(weight[:, :4])
    path = write(tmp_path / "x.safetensors", kohya({"conv_in": (down, up)}, alpha=None))
    weights, _ = fused(unet_network(pipeline), Lora(path))
    assert relative(weight[:, :4] + product(down, up), weights["conv_in.weight"][:, :4]) <= 1e-6
    assert torch.equal(weights["conv_in.weight"][:, 4:], weight[:, 4:])


# --- the spellings


def spelled(layers, spelling, config):
    """The same LoRA without alpha as other programs write it."""
    originals = {ours: theirs for theirs, ours in ldm.unet_names(config).items()}
    state = {}
    for layer, (down, up) in layers.items():
        original = ldm.rename(layer, originals)
        down_key, up_key = {
            "diffusers": (f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight"),
            "peft": (f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"),
            "peft alone": (f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"),
            "peft named": (f"unet.{layer}.lora_A.default.weight", f"unet.{layer}.lora_B.default.weight"),
            "bare": (f"{layer}.lora_linear_layer.down.weight", f"{layer}.lora_linear_layer.up.weight"),
            "original": (f"diffusion_model.{original}.lora_A.weight", f"diffusion_model.{original}.lora_B.weight"),
            "kohya, original": tuple(
                f"lora_unet_{original.replace('.', '_')}.{end}" for end in ("lora_down.weight", "lora_up.weight")
            ),
            "lycoris": tuple(
                f"lycoris_{layer.replace('.', '_')}.{end}" for end in ("lora_down.weight", "lora_up.weight")
            ),
        }[spelling]
        state |= {down_key: down, up_key: up}
    return state


@pytest.mark.parametrize(
    "spelling",
    ["diffusers", "peft", "peft alone", "peft named", "bare", "original", "kohya, original", "lycoris"],
)
def test_every_spelling_is_the_same_bit_for_bit(tmp_path, pipeline, style, spelling):
    _, layers = style
    config = dict(pipeline.unet.config)
    expected, _ = fused(unet_network(pipeline), Lora(write(tmp_path / "kohya.safetensors", kohya(layers, alpha=None))))
    state = spelled(layers, spelling, config)
    weights, notices = fused(unet_network(pipeline), Lora(write(tmp_path / "x.safetensors", state)))
    assert notices == () and all(torch.equal(expected[key], weights[key]) for key in expected)


def test_attention_processors_of_old_diffusers(tmp_path, pipeline):
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    weights = pipeline.unet.state_dict()
    layers = {f"{block}.{name}": factors(weights[f"{block}.{name}.weight"]) for name in ("to_q", "to_out.0")}
    old = {}
    for layer, (down, up) in layers.items():
        name = layer.removeprefix(f"{block}.").removesuffix(".0")
        old |= {
            f"unet.{block}.processor.{name}_lora.down.weight": down,
            f"unet.{block}.processor.{name}_lora.up.weight": up,
        }
    expected, _ = fused(unet_network(pipeline), Lora(write(tmp_path / "a.safetensors", kohya(layers, None))))
    found, _ = fused(unet_network(pipeline), Lora(write(tmp_path / "b.safetensors", old)))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.r": RANK, "unet.lora_alpha": 8}, 2),
        ({"lora_alpha": 8}, 2),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 2}}, 2),
        ({"text_encoder.lora_alpha": 8}, 1),
        ({}, 1),
    ],
    ids=str,
)
def test_alpha_is_read_from_pefts_metadata(tmp_path, pipeline, settings, scale):
    weight = pipeline.unet.state_dict()[f"{ATTENTION}.weight"]
    down, up = factors(weight)
    state = spelled({ATTENTION: (down, up)}, "peft", dict(pipeline.unet.config))
    path = write(tmp_path / "x.safetensors", state, {"lora_adapter_metadata": json.dumps(settings)})
    weights, _ = fused(unet_network(pipeline), Lora(path))
    assert relative(weight + scale * product(down, up), weights[f"{ATTENTION}.weight"]) <= 1e-6


def test_sdxl_by_both_names_with_both_text_encoders(tmp_path):
    pipeline = tiny_sdxl()
    layer = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    unet = pipeline.unet.state_dict()
    assert f"{layer}.weight" in unet
    pair = factors(unet[f"{layer}.weight"])
    state = kohya({layer.replace("down_blocks.1.attentions.0", "input_blocks.4.1"): pair})
    encoders = {1: pipeline.text_encoder, 2: pipeline.text_encoder_2}
    pairs = {}
    for number, encoder in encoders.items():
        pairs[number] = factors(text_network(encoder).weights[f"{TEXT}.weight"], number)
        state |= kohya({f"text_model.{TEXT}": pairs[number]}, prefix=f"lora_te{number}_")
    path = write(tmp_path / "xl.safetensors", state)
    folder = save_tiny_sdxl(tmp_path / "xl", pipeline)
    model = load_model(folder, CPU, loras=[Lora(path, 1, text_strength=0.5)])
    assert model.notices == ()
    found = model.denoiser.module.state_dict()[f"{layer}.weight"]
    assert relative(unet[f"{layer}.weight"] + 2 * product(*pair), found) <= 1e-6
    for (number, encoder), reader in zip(encoders.items(), model.readers, strict=True):
        expected = text_network(encoder).weights[f"{TEXT}.weight"] + 0.5 * 2 * product(*pairs[number])
        assert relative(expected, text_network(reader.encoder.module).weights[f"{TEXT}.weight"]) <= 1e-6


KOHYA_SDXL = {
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "middle_block_1_transformer_blocks_9_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "output_blocks_5_1_transformer_blocks_1_attn2_to_k": "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_k",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "output_blocks_0_0_skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "label_emb_0_0": "add_embedding.linear_1",
    "time_embed_0": "time_embedding.linear_1",
    "out_2": "conv_out",
}


@pytest.mark.parametrize("family", ["sd15", "sd2-base", "sdxl"])
def test_every_layer_of_the_published_sizes_has_its_names(family):
    """Networks of full size, without any data."""
    from diffusers import UNet2DConditionModel

    config = read_json(CONFIGS / family / "unet" / "config.json")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    places = lora._places(Network("unet", unet.state_dict(), config, torch.float32))
    layers = [name for name, module in unet.named_modules() if getattr(module, "weight", None) is not None]
    assert len(layers) > 300 and all(places[name.replace(".", "_")].names == (name,) for name in layers)
    if family == "sdxl":
        assert {name: places[name].names[0] for name in KOHYA_SDXL} == KOHYA_SDXL


def flux_state(random, width=16, context=24):
    """Layers of a tiny FLUX transformer under diffusers' names."""
    block, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    shapes = {f"{block}attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")}
    shapes |= {f"{single}attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v")}
    shapes |= {f"{single}proj_mlp": (4 * width, width), f"{single}proj_out": (width, 5 * width)}
    shapes |= {"norm_out.linear": (2 * width, width), "context_embedder": (width, context), "x_embedder": (width, 48)}
    return {f"{name}.weight": random(*shape) for name, shape in shapes.items()}


def test_flux_layers_that_files_join_are_parted(tmp_path):
    random = draw()
    before = flux_state(random)
    joined = {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "single_blocks.0.linear1": [*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
                                    "single_transformer_blocks.0.proj_mlp"],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
        "img_in": ["x_embedder"],
    }  # fmt: skip
    layers = {
        name: factors(torch.cat([before[f"{part}.weight"] for part in parts]), n)
        for n, (name, parts) in enumerate(joined.items())
    }
    layers["img_in"] = factors(before["x_embedder.weight"][:, :16])  # of the model that does not inpaint
    network = Network("transformer", before, {"num_layers": 1, "num_single_layers": 1}, torch.float32)
    for prefix, dots in (("lora_unet_", False), ("diffusion_model.", True)):
        state = kohya(layers, 2.0, "")
        if dots:
            state = {}
            for name, (down, up) in layers.items():
                state |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
                state[f"{prefix}{name}.alpha"] = torch.tensor(2.0)
        else:
            state = {prefix + key: value for key, value in state.items()}
        weights, notices = fused(network, Lora(write(tmp_path / "flux.safetensors", state)))
        assert notices == ()
        for name, parts in joined.items():
            change = 0.5 * product(*layers[name])
            if name == "final_layer.adaLN_modulation.1":
                change = torch.cat(change.chunk(2)[::-1])
            if name == "img_in":
                change = torch.nn.functional.pad(change, (0, 32))
            expected = torch.cat([before[f"{part}.weight"] for part in parts]) + change
            found = torch.cat([weights[f"{part}.weight"] for part in parts])
            assert relative(expected, found) <= 1e-6, name
        untouched = ("transformer_blocks.0.attn.to_out.0.weight", "context_embedder.weight")
        assert all(torch.equal(before[key], weights[key]) for key in untouched)


def test_a_flux_model_with_its_text_encoders(tmp_path):
    pipeline = tiny_flux()
    pipeline.save_pretrained(tmp_path / "flux")
    transformer, t5 = pipeline.transformer.state_dict(), pipeline.text_encoder_2.state_dict()
    layer, attention = "transformer_blocks.0.attn.to_q", "encoder.block.0.layer.0.SelfAttention.q"
    pairs = [factors(transformer[f"{layer}.weight"]), factors(t5[f"{attention}.weight"], 1)]
    state = {f"transformer.{layer}.lora_A.weight": pairs[0][0], f"transformer.{layer}.lora_B.weight": pairs[0][1]}
    state |= kohya({attention: pairs[1]}, None, "lora_te3_")
    text = text_network(pipeline.text_encoder).weights[f"{TEXT}.weight"]
    pairs.append(factors(text, 2))
    state |= kohya({f"text_model.{TEXT}": pairs[2]}, None, "lora_te1_")
    model = load_model(tmp_path / "flux", CPU, loras=[Lora(write(tmp_path / "x.safetensors", state))])
    assert model.notices == ()
    found = model.denoiser.module.state_dict()[f"{layer}.weight"]
    assert relative(transformer[f"{layer}.weight"] + product(*pairs[0]), found) <= 1e-6
    encoders = [model.clip.encoder.module, model.t5.encoder.module]
    found = [text_network(encoders[0]).weights[f"{TEXT}.weight"], encoders[1].state_dict()[f"{attention}.weight"]]
    for before, pair, after in zip((text, t5[f"{attention}.weight"]), (pairs[2], pairs[1]), found, strict=True):
        assert relative(before + product(*pair), after) <= 1e-6


def test_sd3_layers_that_files_join_are_parted(tmp_path):
    pipeline = tiny_sd3()
    before = pipeline.transformer.state_dict()
    last = pipeline.transformer.config.num_layers - 1
    joined = {
        "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "joint_blocks.0.context_block.mlp.fc1": ["transformer_blocks.0.ff_context.net.0.proj"],
        f"joint_blocks.{last}.context_block.adaLN_modulation.1": [f"transformer_blocks.{last}.norm1_context.linear"],
    }
    layers = {
        name: factors(torch.cat([before[f"{part}.weight"] for part in parts]), n)
        for n, (name, parts) in enumerate(joined.items())
    }
    network = Network("transformer", before, dict(pipeline.transformer.config), torch.float32)
    weights, notices = fused(network, Lora(write(tmp_path / "sd3.safetensors", kohya(layers))))
    assert notices == ()
    for name, parts in joined.items():
        change = 2 * product(*layers[name])
        if "adaLN" in name:
            change = torch.cat(change.chunk(2)[::-1])
        expected = torch.cat([before[f"{part}.weight"] for part in parts]) + change
        assert relative(expected, torch.cat([weights[f"{part}.weight"] for part in parts])) <= 1e-6, name


QWEN_BLOCK = [
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{kind}_{layer}" for kind in ("img", "txt") for layer in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
]
"""All of which the accelerating LoRAs for Qwen-Image change."""


def qwen_network(transformer):
    return Network("transformer", transformer.state_dict(), dict(transformer.config), torch.float32)


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    return tiny_transformer()


def qwen_layers(transformer):
    weights = transformer.state_dict()
    names = [f"transformer_blocks.{block}.{name}" for block in range(2) for name in QWEN_BLOCK]
    return {name: factors(weights[f"{name}.weight"], n) for n, name in enumerate(names)}


QWEN_SPELLINGS = {
    "diffusers": ("transformer.{}", ("lora_A", "lora_B")),
    "peft alone": ("base_model.model.{}", ("lora_A", "lora_B")),
    "peft named": ("{}", ("lora_A.default", "lora_B.default")),
    "bare": ("{}", ("lora_A", "lora_B")),
    "Lightning": ("{}", ("lora_down", "lora_up")),
    "ComfyUI": ("diffusion_model.{}", ("lora_A", "lora_B")),
    "kohya": ("lora_unet_{}", ("lora_down", "lora_up")),
    "LyCORIS": ("lycoris_{}", ("lora_down", "lora_up")),
}


def qwen_lora(layers, spelling, alpha=2.0):
    prefix, ends = QWEN_SPELLINGS[spelling]
    state = {}
    for layer, pair in layers.items():
        name = prefix.format(layer.replace(".", "_") if prefix.endswith("_{}") else layer)
        state |= {f"{name}.{end}.weight": factor for end, factor in zip(ends, pair, strict=True)}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("spelling", QWEN_SPELLINGS)
def test_every_spelling_of_a_qwen_image_lora_is_added(tmp_path, qwen, spelling):
    layers, before = qwen_layers(qwen), qwen.state_dict()
    path = write(tmp_path / "x.safetensors", qwen_lora(layers, spelling))
    weights, notices = fused(qwen_network(qwen), Lora(path, 0.7))
    assert notices == ()
    for layer, pair in layers.items():
        expected = before[f"{layer}.weight"] + 0.7 * 2 / RANK * product(*pair)
        assert relative(expected, weights[f"{layer}.weight"]) <= 1e-6
        assert relative(expected, before[f"{layer}.weight"]) > 1e-2
    assert {key for key in before if not torch.equal(before[key], weights[key])} == {
        f"{name}.weight" for name in layers
    }


def test_the_qwen_image_network_computes_what_the_layers_beside_it_would(tmp_path, qwen):
    """Two files of their own strengths, against hooks; without alpha it is another picture."""
    layers = qwen_layers(qwen)
    attention = {name: factors(qwen.state_dict()[f"{name}.weight"], 99) for name in list(layers)[:4]}
    first = write(tmp_path / "first.safetensors", qwen_lora(layers, "Lightning"))
    second = write(tmp_path / "second.safetensors", qwen_lora(attention, "diffusers", None))
    random = draw(3)
    inputs = {
        "hidden_states": random(1, 24, 64) * 5,
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": random(1, 7, 32) * 5,
        "img_shapes": [[(1, 4, 6)]],
        "return_dict": False,
    }
    if "txt_seq_lens" in inspect.signature(qwen.forward).parameters:
        inputs["txt_seq_lens"] = [7]

    def branch(scale, down, up):
        return lambda module, args, output: output + scale * (args[0] @ down.T @ up.T)

    def by_weights(*loras):
        network = tiny_transformer()
        network.load_state_dict(fused(qwen_network(qwen), *loras)[0])
        return network(**inputs)[0]

    with torch.no_grad():
        hooks = [(name, 0.8 * 2 / RANK, pair) for name, pair in layers.items()]
        hooks += [(name, -0.5, pair) for name, pair in attention.items()]
        handles = [qwen.get_submodule(name).register_forward_hook(branch(s, *pair)) for name, s, pair in hooks]
        expected = qwen(**inputs)[0]
        for handle in handles:
            handle.remove()
        assert relative(expected, by_weights(Lora(first, 0.8), Lora(second, -0.5))) <= 5e-6
        without = write(tmp_path / "without.safetensors", qwen_lora(layers, "Lightning", None))
        assert relative(expected, by_weights(Lora(without, 0.8), Lora(second, -0.5))) > 1e-2
        assert relative(expected, by_weights(Lora(first, 0.8))) > 1e-2


def test_a_qwen_image_model_is_loaded_with_loras(tmp_path):
    pipeline = tiny_qwen_image(tmp_path / "made")
    pipeline.save_pretrained(tmp_path / "qwen")
    before, layers = pipeline.transformer.state_dict(), qwen_layers(pipeline.transformer)
    path = write(tmp_path / "lightning.safetensors", qwen_lora(layers, "Lightning", float(RANK)))
    model = load_model(tmp_path / "qwen", CPU, loras=[Lora(path), Lora(path, -0.25)])
    assert model.notices == ()
    found = model.denoiser.module.state_dict()
    for layer, pair in layers.items():
        assert relative(before[f"{layer}.weight"] + 0.75 * product(*pair), found[f"{layer}.weight"]) <= 1e-6


def test_every_layer_of_qwen_image_has_its_names():
    from comfyui_mend.engine.models.qwen_image import build_transformer

    config = read_json(CONFIGS / "qwen-image" / "transformer" / "config.json")
    with torch.device("meta"):
        transformer = build_transformer(config)
    places = lora._places(qwen_network(transformer))
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 60 * len(QWEN_BLOCK) + 6
    assert all(places[name.replace(".", "_")].names == (name,) for name in layers)


# --- what fits nowhere


def attentions(*blocks):
    """Rank 4 on the attentions of these transformer blocks, which FLUX and Qwen-Image have alike."""
    return {f"transformer_blocks.{block}.attn.to_q": factors(torch.ones(16, 16), block) for block in blocks}


def test_what_fits_another_family_by_half_is_refused(tmp_path, qwen):
    """Layers of the same names and widths are there: what painted would be neither model nor LoRA."""
    flux = Network("transformer", flux_state(draw()), {"num_layers": 1, "num_single_layers": 1}, torch.float32)
    for_qwen = write(tmp_path / "portrait.safetensors", qwen_lora(attentions(0, 59), "diffusers"))
    with pytest.raises(ModelFileError, match="1 of its 2 layers are not there, it seems to be made for Qwen-Image;"):
        fused(flux, Lora(for_qwen))
    width = torch.ones(32, 32)
    layers = {
        "transformer_blocks.0.attn.to_q": factors(width),
        "single_transformer_blocks.0.attn.to_q": factors(width),
    }
    for_flux = write(tmp_path / "flux.safetensors", qwen_lora(layers, "diffusers"))
    with pytest.raises(ModelFileError, match="1 of its 2 layers are not there, it seems to be made for FLUX;"):
        fused(qwen_network(qwen), Lora(for_flux))
    # its own, of which something is not there, is only told of
    layers = {**qwen_layers(qwen), "transformer_blocks.2.attn.to_q": factors(width)}
    _, notices = fused(qwen_network(qwen), Lora(write(tmp_path / "more.safetensors", qwen_lora(layers, "bare"))))
    assert len(notices) == 1 and "3 of its 87 tensors have no place" in notices[0]


def test_what_has_no_place_is_named(tmp_path, pipeline, style):
    path, layers = style
    state = kohya(layers) | kohya({"no.such.layer": factors(torch.ones(8, 8))}) | {"bundle_emb.cat": torch.ones(1, 32)}
    state["lora_unet_down_blocks_9.alpha"] = torch.tensor(1.0)
    _, notices = fused(unet_network(pipeline), Lora(write(path, state)))
    (notice,) = notices
    assert notice.startswith("style.safetensors: 5 of its 17 tensors have no place in tiny and were left out")
    assert "bundle_emb.cat" in notice and "..." in notice


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"double_blocks.0.img_attn.qkv": (48, 16)}, "it seems to be made for FLUX;"),
        ({"joint_blocks.0.x_block.attn.qkv": (48, 16)}, "Stable Diffusion 3"),
        ({"transformer_blocks.0.img_mlp.net.2": (16, 16)}, "made for Qwen-Image;"),
        ({"transformer_blocks.0.img_mod.1": (16, 16)}, "made for Qwen-Image;"),
        ({"transformer_blocks.59.attn.to_q": (16, 16)}, "made for Qwen-Image;"),
        ({"transformer_blocks.19.attn.add_q_proj": (16, 3072)}, "made for Qwen-Image;"),
        ({"transformer_blocks.18.attn.add_q_proj": (16, 3072)}, "made for FLUX;"),
        ({"transformer_blocks.23.attn.add_q_proj": (16, 1536)}, "made for Stable Diffusion 3;"),
        ({ATTENTION: (64, 2048)}, "is 64 x 2048 where 64 x 32 belongs, it seems to be made for SDXL"),
        ({"up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_v": (64, 768)}, "Stable Diffusion 1.x"),
        ({"something": (4, 4)}, "none of its 1 layers is there; choose"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_familys_lora_is_refused(tmp_path, pipeline, layers, words):
    state = kohya({name: factors(torch.ones(shape)) for name, shape in layers.items()})
    # the text encoder it comes with would fit
    encoder = text_network(pipeline.text_encoder)
    state |= kohya({TEXT: factors(encoder.weights[f"{TEXT}.weight"])}, prefix="lora_te1_text_model_")
    path = write(tmp_path / "foreign.safetensors", state)
    with pytest.raises(ModelFileError, match=r"foreign\.safetensors does not fit tiny: ") as error:
        stack = LoraStack([Lora(path)], "tiny")
        stack.fuse(unet_network(pipeline))
        stack.fuse(encoder)
        stack.finish()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("lora_unet_x.on_input", "IA3"),
        ("transformer.x.lora_B.bias", "a LoRA with biases"),
        ("diffusion_model.x.reshape_weight", "replaces weights or their shapes"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
    ],
)
def test_kinds_that_are_not_known_are_refused_by_name(tmp_path, key, words):
    path = write(tmp_path / "new.safetensors", {key: torch.ones(1), "lora_unet_y.lora_up.weight": torch.ones(1, 1)})
    with pytest.raises(ModelFileError, match=rf"new\.safetensors is .*{words}.*{re.escape(key)}"):
        read_lora(path)


def test_what_is_no_lora_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"is not a LoRA \(its first tensor is conv_in\.weight\)"):
        read_lora(write(tmp_path / "unet.safetensors", {"conv_in.weight": torch.ones(1)}))
    with pytest.raises(ModelFileError, match="is not a LoRA"):
        read_lora(write(tmp_path / "alphas.safetensors", {"lora_unet_x.alpha": torch.ones(1)}))
    (tmp_path / "old.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelFileError, match=r"old\.pt is a pickle"):
        read_lora(tmp_path / "old.pt")
    with pytest.raises(ModelFileError, match="not there any more"):
        read_lora(tmp_path / "gone.safetensors")


def test_factors_that_do_not_belong_together_are_damage(tmp_path, pipeline):
    weight = pipeline.unet.state_dict()[f"{ATTENTION}.weight"]
    down, up = factors(weight)
    for state in (
        kohya({ATTENTION: (down, up[:, :2])}),
        {k: v for k, v in kohya({ATTENTION: (down, up)}).items() if "up" not in k},
    ):
        with pytest.raises(ModelFileError, match=r"is damaged: the factors of .*attn2_to_k do not belong together"):
            fused(unet_network(pipeline), Lora(write(tmp_path / "x.safetensors", state)))


def test_a_bias_that_the_layer_lacks(tmp_path, pipeline):
    name = "lora_unet_" + ATTENTION.replace(".", "_")
    path = write(tmp_path / "x.safetensors", {f"{name}.diff_b": torch.ones(64)})
    with pytest.raises(ModelFileError, match="has no bias to change"):
        fused(unet_network(pipeline), Lora(path))


@pytest.mark.parametrize("options", [{"strength": 21}, {"strength": float("nan")}, {"text_strength": -21}], ids=str)
def test_strengths_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(InputError, match="give a value from -20"):
        Lora(tmp_path / "x.safetensors", **options)


# --- in a model


def test_a_model_is_loaded_with_it_and_says_what_was_left_out(pipeline, model_folder, style):
    path, layers = style
    down, up = factors(text_network(pipeline.text_encoder).weights[f"{TEXT}.weight"], 7)
    state = kohya(layers) | kohya({TEXT: (down, up)}, prefix="lora_te_text_model_") | {"other": torch.ones(1)}
    write(path, state)
    plain = load_model(model_folder, CPU)
    changed = load_model(model_folder, CPU, loras=[Lora(path, 0.5, text_strength=0)])
    assert (
        plain.notices == () and len(changed.notices) == 1 and "in tiny and were left out (other)" in changed.notices[0]
    )
    weight = pipeline.unet.state_dict()[f"{ATTENTION}.weight"]
    found = changed.denoiser.module.state_dict()[f"{ATTENTION}.weight"]
    assert relative(weight + product(*layers[ATTENTION]), found) <= 1e-6
    # the strengths are apart
    words = (["a cat"], PromptSyntax.PLAIN)
    assert torch.equal(plain.encode_prompt(*words)[0].tokens, changed.encode_prompt(*words)[0].tokens)
    both = load_model(model_folder, CPU, loras=[Lora(path, 0, text_strength=0.5)])
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.denoiser.module.parameters(), both.denoiser.module.parameters(), strict=True)
    )
    found = text_network(both.text_encoder.module).weights[f"{TEXT}.weight"]
    expected = text_network(pipeline.text_encoder).weights[f"{TEXT}.weight"] + product(down, up)
    assert relative(expected, found) <= 1e-6
    assert not torch.equal(plain.encode_prompt(*words)[0].tokens, both.encode_prompt(*words)[0].tokens)


def test_a_foreign_file_stops_the_load(model_folder, tmp_path):
    path = write(tmp_path / "flux.safetensors", kohya({"single_blocks.0.linear1": factors(torch.ones(8, 8))}))
    with pytest.raises(ModelFileError, match="made for FLUX"):
        load_model(model_folder, CPU, loras=[Lora(path)])


def test_the_files_own_weights_are_left_alone(pipeline, model_folder, style):
    """Another strength starts from the file again: nothing is added to what was added before."""
    path, _ = style
    host = replace(CPU)
    first = load_model(model_folder, host, loras=[Lora(path, 0.3)])
    second = load_model(model_folder, host, loras=[Lora(path, 0.9)])
    again = load_model(model_folder, host, loras=[Lora(path, 0.3)])
    states = [model.denoiser.module.state_dict() for model in (first, second, again)]
    key = f"{ATTENTION}.weight"
    assert torch.equal(states[0][key], states[2][key]) and not torch.equal(states[0][key], states[1][key])
    plain = load_model(model_folder, host).denoiser.module.state_dict()
    assert torch.equal(plain[key], pipeline.unet.state_dict()[key])
    assert host.dtype(Role.DENOISER) == torch.float32
