"""ComfyUI as the engine's host: its model management owns every module, its bar shows progress, its button stops.

A diffusers module becomes one of ComfyUI's own: its leaf layers are turned into comfy.ops layers, which compute
the same but can fetch their weights when called, and a ModelPatcher that the model object owns puts it under
``load_models_gpu``: full, partial and dynamic loading, eviction by other models, and interruption between two layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn

from ..engine.host import Role, SilentProgress, TerminalProgress
from ..engine.models.families import TOKENIZER_FOLDERS
from ..engine.models.protocol import InpaintModel

SWAPPED_LAYERS = (
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "GroupNorm",
    "LayerNorm",
    "RMSNorm",
    "Embedding",
)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SD_UNET_PARAMETERS = 860_000_000
"""ComfyUI weighs a network's size against the card's memory when it picks a precision."""


def swap_layers(module: nn.Module) -> None:
    """Turn plain torch leaves into comfy.ops layers, in place; their results stay bit for bit the same.

    Exact types only: a subclass (a LayerNorm that computes in float32, say) has a forward of its own to keep.
    """
    ops = comfy.ops.disable_weight_init
    swaps = {
        getattr(nn, name): getattr(ops, name) for name in SWAPPED_LAYERS if hasattr(nn, name) and hasattr(ops, name)
    }
    for layer in module.modules():
        swap = swaps.get(type(layer))
        # without weights there is nothing to fetch, and comfy's GroupNorm expects some
        if swap is None or getattr(layer, "weight", None) is None:
            continue
        layer.__class__ = swap
        layer.weight_function = []
        layer.bias_function = []
        if not hasattr(layer, "bias"):
            layer.bias = None  # Embedding, RMSNorm: the patcher looks for one


def store_in_8_bits(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of swapped linear layers and convolutions as 8-bit floats, in place.

    Such layers cast what they fetch to the precision of their input. Norms, biases and embeddings, which are small and
    count for more, stay as they are.
    """
    ops = comfy.ops.disable_weight_init
    largest = torch.finfo(dtype).max
    for layer in module.modules():
        if type(layer) in (ops.Linear, ops.Conv2d):
            small = layer.weight.detach().clamp(-largest, largest).to(dtype)
            layer.weight = nn.Parameter(small, requires_grad=False)
            layer.comfy_cast_weights = True


def bring_leftovers(patcher: ModelPatcher, device: torch.device, *_: object) -> None:
    """Move what no comfy.ops layer fetches by itself: buffers, bare parameters, layers of other types.

    An ON_LOAD callback: a partial load leaves these where they were.
    """
    for layer in patcher.model.modules():
        if getattr(layer, "comfy_cast_weights", False):
            continue
        for name, parameter in layer._parameters.items():
            if parameter is not None and parameter.device != device:
                layer._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.device != device:
                layer._buffers[name] = buffer.to(device)


class Holder(nn.Module):
    """Gives a module the settable ``device`` that patchers write; diffusers' and transformers' own is read-only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.device: torch.device | None = None


def hold(module: nn.Module) -> Holder:
    """A Holder that goes by the name of what it holds: ComfyUI's log says "Requested to load <class>"."""
    return type(type(module).__name__, (Holder,), {})(module)


class ComfyModule:
    """A module that ComfyUI loads, offloads and evicts; lives as long as its owner keeps it."""

    def __init__(
        self,
        module: nn.Module,
        load_device: torch.device,
        offload_device: torch.device,
        storage: torch.dtype | None = None,
    ) -> None:
        """``storage``: an 8-bit float to keep weights in, where they are not kept as they came."""
        swap_layers(module)
        self.module = module.eval().requires_grad_(False)
        self.dtype = next((p.dtype for p in module.parameters()), torch.float32)
        if storage is not None:
            store_in_8_bits(module, storage)
        self._holder = hold(module)
        # rebound when dynamic VRAM starts, so looked up now; hosts without it have the plain patcher only
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
        self.patcher: ModelPatcher = patcher_class(self._holder, load_device, offload_device)
        self.patcher.add_callback(CallbacksMP.ON_LOAD, bring_leftovers)
        self._activation_bytes = 0
        self._resident_bytes = 0

    def load(self, activation_bytes: int, beside: Sequence[ComfyModule] = ()) -> torch.device:
        device = self.patcher.load_device
        together = [self, *beside]
        if not self._still_loaded(activation_bytes, together):
            mm.load_models_gpu([module.patcher for module in together], memory_required=activation_bytes)
            for module in together:
                # a load into less memory than before moves layers away and ends without the callback
                bring_leftovers(module.patcher, device)
                module._resident_bytes = module._holder.model_loaded_weight_memory
            self._activation_bytes = activation_bytes
        return device

    def _still_loaded(self, activation_bytes: int, together: Sequence[ComfyModule]) -> bool:
        """Whether nothing happened since the last load: a load costs as much as a small denoising step."""
        # hosts before 0.28 load those that go together in any order
        newest = {id(patcher) for patcher in mm.loaded_models()[: len(together)]}
        return (
            newest == {id(module.patcher) for module in together}
            and activation_bytes <= self._activation_bytes
            and all(module._where_it_was() for module in together)
        )

    def _where_it_was(self) -> bool:
        # a module of which nothing was resident still leaves the device when it is detached
        holder = self._holder
        return holder.device == self.patcher.load_device and holder.model_loaded_weight_memory == self._resident_bytes


class ComfyProgress:
    """The node's progress bar with previews of the latents, and a bar in the console."""

    def __init__(self, total: int, description: str, latent_format: str | None = None) -> None:
        """``latent_format`` names a class of comfy.latent_formats; without one there are no previews."""
        self.total = total
        self._latent_format = getattr(comfy.latent_formats, latent_format or "", None)
        self._bar = comfy.utils.ProgressBar(total)
        self._console = TerminalProgress(total, description) if comfy.utils.PROGRESS_BAR_ENABLED else SilentProgress()
        self._previewer: Any = None
        self._previewer_chosen = False
        self._frames = False

    def update(self, step: int, preview: Tensor | None = None) -> None:
        # the bar looks at the stop button only when it has something to send
        mm.throw_exception_if_processing_interrupted()
        self._console.update(step)
        self._bar.update_absolute(step, self.total, None if preview is None else self._picture(preview))

    def _picture(self, latents: Tensor) -> tuple[str, Any, int] | None:
        """("JPEG", PIL image, longest side) by the preview method of the user's settings; None where that is none or
        nothing is known of the latents."""
        # a previewer may be a network of its own (TAESD), and shows the first of the batch
        latents = latents[:1].detach().to(mm.get_torch_device(), torch.float32)
        if not self._previewer_chosen:
            self._previewer_chosen = True
            if self._latent_format is not None:
                self._frames = self._latent_format.latent_dimensions == 3
                self._previewer = latent_preview.get_previewer(latents.device, self._latent_format())
        if self._previewer is None:
            return None
        # what is made for videos expects a picture to be one frame
        latents = latents.unsqueeze(2) if self._frames else latents
        picture: tuple[str, Any, int] = self._previewer.decode_latent_to_preview_image("JPEG", latents)
        return picture


class ComfyHost:
    """engine.host.Host inside ComfyUI. One per loaded model: it knows the patchers of the modules it manages."""

    name = "ComfyUI"

    def __init__(self, precision: torch.dtype | None = None) -> None:
        self.precision = precision
        """Of all weights; None: what ComfyUI would choose for each."""
        self._patchers: weakref.WeakSet[ModelPatcher] = weakref.WeakSet()

    @property
    def patchers(self) -> list[ModelPatcher]:
        """Of the modules that are alive, the largest first."""
        return sorted(self._patchers, key=lambda patcher: patcher.model_size(), reverse=True)

    def dtype(self, role: Role) -> torch.dtype:
        if self.precision is not None:
            return self.precision
        device, _ = _devices(role)
        if role is Role.DENOISER:
            dtype = _denoiser_dtype(device)
        elif role is Role.VAE:
            # no float16: the decoder of Stable Diffusion overflows in it
            dtype = mm.vae_dtype(device, [torch.bfloat16, torch.float32])
        elif mm.is_device_cpu(device):
            # ComfyUI keeps float16 here and casts in every layer; a processor computes in float32 either way
            dtype = torch.float32
        else:
            dtype = mm.text_encoder_dtype(device)
        # what it is computed in: ComfyUI would store float16 on old cards too, and cast it on use
        return mm.unet_manual_cast(dtype, device) or dtype

    def storage(self, role: Role) -> torch.dtype | None:
        """The 8-bit float that the user has ComfyUI keep diffusion networks in (--fp8_e4m3fn-unet, ...), if any."""
        if role is not Role.DENOISER or self.precision is not None:
            return None
        dtype = _denoiser_dtype(_devices(role)[0])
        return dtype if dtype in FLOAT8 else None

    def manage(self, module: nn.Module, role: Role) -> ComfyModule:
        managed = ComfyModule(module, *_devices(role), self.storage(role))
        self._patchers.add(managed.patcher)
        return managed

    def free_memory(self) -> int:
        device = mm.get_torch_device()
        for patcher in mm.loaded_models():
            # counts what dynamic VRAM gives back on demand
            if patcher is not None and patcher.load_device == device:
                return int(patcher.get_free_memory(device))
        return int(mm.get_free_memory(device))

    def total_memory(self) -> int:
        return int(mm.get_total_memory(mm.get_torch_device()))

    def progress(self, total: int, description: str, latent_format: str | None = None) -> ComfyProgress:
        return ComfyProgress(total, description, latent_format)

    def check_interrupt(self) -> None:
        mm.throw_exception_if_processing_interrupted()

    def model_folders(self, kind: str) -> Sequence[Path]:
        if kind in TOKENIZER_FOLDERS:
            return [Path(comfy.utils.__file__).parent / "text_encoders" / kind]
        if kind not in folder_paths.folder_names_and_paths:
            return []
        return [Path(folder) for folder in folder_paths.get_folder_paths(kind)]


def _denoiser_dtype(device: torch.device) -> torch.dtype:
    dtype: torch.dtype = mm.unet_dtype(device=device, model_params=SD_UNET_PARAMETERS)
    return dtype


def _devices(role: Role) -> tuple[torch.device, torch.device]:
    """Where ComfyUI runs a module of this role, and where it keeps it meanwhile."""
    if role in (Role.DENOISER, Role.FILL):
        return mm.get_torch_device(), mm.unet_offload_device()
    if role is Role.VAE:
        return mm.vae_device(), mm.vae_offload_device()
    return mm.text_encoder_device(), mm.text_encoder_offload_device()


class OnWire:
    """What ComfyUI asks of an output that holds models.

    It owns the modules, and through them the patchers: ComfyUI only has weak references, so a model that leaves the
    cache leaves memory.
    """

    host: ComfyHost

    @property
    def patcher(self) -> ModelPatcher | None:
        """The largest module's: by it ComfyUI's cache knows an output that holds a model."""
        return next(iter(self.host.patchers), None)

    def get_models(self) -> list[ModelPatcher]:
        """For ComfyUI, which keeps the models of the running prompt in fast memory."""
        return self.host.patchers

    def get_ram_usage(self) -> int:
        """Bytes; the RAM-pressure cache of ComfyUI before 0.28 asks."""
        return sum(patcher.model_size() for patcher in self.host.patchers)


@dataclass(frozen=True, eq=False)
class MendModel(OnWire):
    """What travels on a MEND_MODEL wire."""

    model: InpaintModel
    host: ComfyHost
