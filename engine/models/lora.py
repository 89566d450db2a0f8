"""LoRA files: small changes to many layers of a model, added to its weights while it is loaded.

For a layer with weight W [out, in, ...] a file holds factors of a change dW:

    LoRA    dW = alpha / rank * up @ down                                  Hu et al., arXiv 2106.09685
    LoCon   the same for convolutions, where a third factor may hold the kernel     Yeh et al., arXiv 2309.14859
    LoHa    dW = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry       the same
    LoKr    dW = alpha / rank * kron(w1, w2)                                        the same
    DoRA    dW = m * (W + V) / |W + V| - W, V being any of the above       Liu et al., arXiv 2402.09353

Several files add up: W + strength_1 * dW_1 + strength_2 * dW_2, each dW made from the model's own W, in float32, and
rounded to the model's precision once. Nothing is ever taken off again: another strength is another load.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..types import ModelFileError, check_range
from . import ldm
from .lora_file import LoraFile, LoraLayer, Target, family_by_layers, family_named, family_of, flat, read_lora
from .transformer_layouts import Layout, flux_layout, sd3_layout

MAX_STRENGTH = 20.0
SHOWN = 3
"""Names in a message, of many."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how much of it is added; raises InputError for what is out of range."""

    path: Path
    strength: float = 1.0
    """-20..20: of the denoiser's change. 0 leaves the denoiser as it is, bit for bit."""
    text_strength: float | None = None
    """-20..20: of the text encoders' change; None: the same as ``strength``."""

    def __post_init__(self) -> None:
        check_range("strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)
        if self.text_strength is not None:
            check_range("text_strength", self.text_strength, -MAX_STRENGTH, MAX_STRENGTH)

    def strength_of(self, target: Target) -> float:
        if target is Target.DENOISER or self.text_strength is None:
            return self.strength
        return self.text_strength


@dataclass(frozen=True)
class Layers:
    """Where a layer of a file goes."""

    names: tuple[str, ...]
    """The network's own layers, whose rows make up the file's layer one after the other."""
    halves_swapped: bool = False
    """Whether the network has the second half of the rows before the first."""


@dataclass(frozen=True)
class Network:
    """One network of a model, before it is built."""

    name: str
    """Its folder in a diffusers pipeline: "unet", "transformer", "text_encoder_2", ..."""
    weights: Mapping[str, Tensor]
    """Under the names that its module has; CLIP's without ``text_model.``"""
    config: Mapping[str, Any]
    """Its config.json."""
    dtype: torch.dtype
    """What its module computes in."""


class LoraStack:
    """LoRA files on their way into one model, network by network."""

    def __init__(self, loras: Sequence[Lora], model: str) -> None:
        """``model`` is a name, for messages. Raises ModelFileError for a file that is no LoRA, or of a kind that is not
        known."""
        self._model = model
        self._files = [(lora, read_lora(lora.path)) for lora in loras]
        self._placed: list[set[LoraLayer]] = [set() for _ in loras]
        self._family: str | None = None

    def fuse(self, network: Network) -> dict[str, Tensor]:
        """The network's weights with all files added; what none of them changes is the tensor that came.

        Layers are found by the names of kohya's trainers (``lora_unet_down_blocks_0_...``, ``lora_te1_...``), with the
        names of diffusers or of the original checkpoints, and of diffusers and peft (``unet.down_blocks.0...``). Raises
        ModelFileError for a layer whose shape is not the network's.
        """
        target = Target.of(network.name)
        if target is None or not self._files:
            return dict(network.weights)
        places = _places(network)
        if target is Target.DENOISER:
            self._family = family_named(places)
        changes: dict[Layers, list[_Change]] = defaultdict(list)
        for (lora, file), placed in zip(self._files, self._placed, strict=True):
            for layer in file.layers:
                place = places.get(layer.flat_name)
                if place is None or target not in layer.targets:
                    continue
                placed.add(layer)
                strength = lora.strength_of(target)
                if strength != 0:
                    changes[place].append(_Change(file, layer, strength))
        weights = dict(network.weights)
        for place, wanted in changes.items():
            _apply(wanted, place, weights, network.dtype, self._model)
        return weights

    def finish(self) -> tuple[str, ...]:
        """Sentences about what of the files found no place, after the last network. Raises ModelFileError for a file of
        which nothing did."""
        notices = []
        for (_, file), placed in zip(self._files, self._placed, strict=True):
            lost = [layer for layer in file.layers if layer not in placed]
            _refuse_misfit(file, lost, self._model, self._family)
            unused = [*file.unknown, *(key for layer in lost for key in layer.keys.values())]
            if unused:
                notices.append(
                    f"{file.name}: {len(unused)} of its {len(file.header.tensors)} tensors have no place in"
                    f" {self._model} and were left out ({_some(unused)})."
                )
        return tuple(notices)


# --- names


def original_names(network: Network) -> dict[str, Layers]:
    """The layers of a denoiser by the names of its original code, which trainers use as well as those of diffusers."""
    if any(key.startswith("down_blocks.") for key in network.weights):
        original = {ours: theirs for theirs, ours in ldm.unet_names(network.config).items()}
        return {ldm.rename(layer, original): Layers((layer,)) for layer in _layers(network)}
    if any(key.startswith("single_transformer_blocks.") for key in network.weights):
        return _transformer_names(flux_layout(network.config))
    if "pos_embed.proj.weight" in network.weights:
        return _transformer_names(sd3_layout(network.config))
    return {}


def _transformer_names(layout: Layout) -> dict[str, Layers]:
    alone = {theirs: Layers((ours,), ours in layout.swapped) for theirs, ours in layout.names.items()}
    return {**alone, **{theirs: Layers(tuple(parts)) for theirs, parts in layout.fused.items()}}


def _layers(network: Network) -> set[str]:
    return {key.rpartition(".")[0] for key in network.weights}


def _places(network: Network) -> dict[str, Layers]:
    own = {layer: Layers((layer,)) for layer in _layers(network)}
    return {flat(name): place for name, place in {**original_names(network), **own}.items()}


def _refuse_misfit(file: LoraFile, lost: Sequence[LoraLayer], model: str, family: str | None) -> None:
    """A file made for another family may fit a text encoder that both have; its denoiser decides then. Of that, too, a
    part may fit: the attentions of FLUX and Qwen-Image have the same names and widths in diffusers."""
    targets = {layer.target for layer in file.layers}
    deciding = {Target.DENOISER} if Target.DENOISER in targets else targets
    total = sum(layer.target in deciding for layer in file.layers)
    missing = sum(layer.target in deciding for layer in lost)
    if missing == total:
        raise ModelFileError(_misfit(file, model, f"none of its {total} layers is there"))
    if missing and family is not None and family_by_layers(file) not in (None, family):
        raise ModelFileError(_misfit(file, model, f"{missing} of its {total} layers are not there"))


def _misfit(file: LoraFile, model: str, reason: str) -> str:
    family = family_of(file)
    made_for = f", it seems to be made for {family}" if family else ""
    return f"{file.name} does not fit {model}: {reason}{made_for}; choose a LoRA that was made for this kind of model."


# --- arithmetic


@dataclass(frozen=True)
class _Change:
    """What one file does to one layer."""

    file: LoraFile
    layer: LoraLayer
    strength: float


def _apply(
    changes: Sequence[_Change], place: Layers, weights: dict[str, Tensor], dtype: torch.dtype, model: str
) -> None:
    """Replace a layer's weight and bias in ``weights`` by the changed ones in ``dtype``."""
    for kind, has in (("weight", _has_weight), ("bias", _has_bias)):
        wanted = [change for change in changes if has(change)]
        if not wanted:
            continue
        keys = [f"{name}.{kind}" for name in place.names]
        if any(key not in weights for key in keys):
            raise ModelFileError(_misfit(wanted[0].file, model, f"{place.names[0]} has no {kind} to change"))
        base = torch.cat([weights[key].float() for key in keys])
        base = _swap_halves(base) if place.halves_swapped else base
        result = base.clone()
        for change in wanted:
            result += change.strength * _delta(change, base, kind, place, model)
        result = _swap_halves(result) if place.halves_swapped else result
        rows = [weights[key].shape[0] for key in keys]
        for key, part in zip(keys, result.split(rows), strict=True):
            weights[key] = part.to(dtype).contiguous()


def _has_weight(change: _Change) -> bool:
    return bool(change.layer.keys.keys() - {"alpha", "diff_b"})


def _has_bias(change: _Change) -> bool:
    return "diff_b" in change.layer.keys


def _swap_halves(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def _delta(change: _Change, base: Tensor, kind: str, place: Layers, model: str) -> Tensor:
    """A whole change, for a strength of 1, of the shape of ``base``."""
    tensors = change.file.tensors(change.layer)
    try:
        change_of = tensors["diff_b"] if kind == "bias" else weight_change(tensors, change.file.alpha(change.layer))
    except (KeyError, RuntimeError) as error:
        raise ModelFileError(
            f"{change.file.name} is damaged: the factors of {change.layer.name} do not belong together; download it"
            " again."
        ) from error
    fitted = _fit(change_of, base, place)
    if fitted is None:
        was, wanted = (" x ".join(map(str, shape)) for shape in (change_of.shape, base.shape))
        raise ModelFileError(_misfit(change.file, model, f"its {change.layer.name} is {was} where {wanted} belongs"))
    if kind == "weight" and tensors.keys() & {"magnitude", "row_magnitude"}:
        return decompose(base + fitted, _magnitude(tensors, base)) - base
    return fitted


def weight_change(tensors: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    """dW from a layer's factors by what they are ("down", "up", "hada_w1_a", ...), without DoRA.

    ``alpha`` None means the rank. Convolutions come as [out, in, height, width] where a factor has the kernel, else as
    [out, in].
    """
    if "diff" in tensors:
        return tensors["diff"]
    if "hada_w1_a" in tensors:
        first, second = (_product(tensors, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        return _scale(alpha, tensors["hada_w1_b"].shape[0]) * first * second
    if tensors.keys() & {"lokr_w1", "lokr_w1_a"}:
        first, second = _kronecker_factor(tensors, "lokr_w1"), _kronecker_factor(tensors, "lokr_w2")
        rank = next((tensors[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in tensors), None)
        # without a low rank on either side there is nothing for alpha to be divided by
        scale = 1.0 if rank is None else _scale(alpha, rank)
        first = first.reshape(*first.shape, *([1] * (second.ndim - first.ndim)))
        return scale * torch.kron(first, second.contiguous())
    up, down = tensors["up"], tensors["down"]
    scale = _scale(alpha, down.shape[0])
    if "mid" in tensors:
        return scale * torch.einsum("or, rs..., si -> oi...", up.flatten(1), tensors["mid"], down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _product(tensors: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """a @ b, or with the kernel in a third factor: a is [rank, out] then, and b [rank, in]."""
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core in tensors:
        return torch.einsum("pq..., po, qi -> oi...", tensors[core], a, b)
    return a @ b


def _kronecker_factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in tensors:
        return _product(tensors, name, "lokr_t2")
    # a factored kernel: b is [rank, in, height, width]
    return (a.flatten(1) @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def decompose(direction: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: magnitude * V / |V|, for a magnitude of each row ([out, 1, ...]) or each input ([1, in, ...])."""
    axes = [axis for axis in range(direction.ndim) if magnitude.shape[axis] == 1]
    norm = torch.linalg.vector_norm(direction, dim=axes, keepdim=True)
    return magnitude * direction / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def _magnitude(tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """Of each row or, in LyCORIS' older files, of each input; peft writes those of a convolution's rows in its second
    axis."""
    rows = tensors.get("row_magnitude")
    if rows is None:
        rows = tensors["magnitude"]
        if rows.shape[0] == 1 != base.shape[0]:
            return rows.reshape(1, -1, *[1] * (base.ndim - 2))
    return rows.reshape(-1, *[1] * (base.ndim - 1))


INPUT_LAYERS = (("conv_in",), ("x_embedder",))


def _fit(change: Tensor, base: Tensor, place: Layers) -> Tensor | None:
    """``change`` in the shape of ``base``; None where it does not belong there.

    A 1x1 convolution and a linear layer are the same. An inpainting model's first layer reads the mask and the masked
    picture behind the latents, of which a LoRA made for the ordinary model knows nothing: no change there.
    """
    if change.numel() == base.numel() and change.shape[0] == base.shape[0]:
        return change.reshape(base.shape)
    narrow = change.ndim == base.ndim and (*change.shape[:1], *change.shape[2:]) == (*base.shape[:1], *base.shape[2:])
    if narrow and change.shape[1] < base.shape[1] and place.names in INPUT_LAYERS:
        widened = torch.zeros_like(base)
        widened[:, : change.shape[1]] = change
        return widened
    return None


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
