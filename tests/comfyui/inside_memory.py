"""Runs under ComfyUI's own Python: tiny modules under its memory management, in pretended graphics memory.

    python inside_memory.py

Prints what each check found as one line of JSON; test_memory.py says what it should be.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import inside
import torch
from inside import CPU, VRAM, PretendedDevice, VramTensor, fake_vram
from torch import Tensor, nn

inside.boot()

import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.pinned_memory  # noqa: E402
import comfy_aimdo.host_buffer  # noqa: E402
import comfy_aimdo.model_vbar  # noqa: E402
from comfyui_mend.engine.host import Role  # noqa: E402
from comfyui_mend.engine.models.tiled_vae import TiledVae  # noqa: E402
from comfyui_mend.nodes.comfy_host import ComfyHost, ComfyModule, MendModel  # noqa: E402

ENOUGH = 2.0**34


@dataclass(frozen=True)
class Case:
    """A module, and how to run it: inputs on the CPU and a forward pass."""

    module: nn.Module
    role: Role
    inputs: tuple[Tensor, ...]
    run: Callable[..., Tensor]


def unet() -> Case:
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=9,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    inputs = (torch.randn(2, 9, 16, 16), torch.tensor(601), torch.randn(2, 7, 32))
    return Case(module, Role.DENOISER, inputs, lambda m, *x: m(*x, return_dict=False)[0])


def vae() -> Case:
    from diffusers import AutoencoderKL

    module = AutoencoderKL(
        block_out_channels=[16, 32],
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )

    def run(m: nn.Module, pixels: Tensor) -> Tensor:
        return m.decode(m.encode(pixels).latent_dist.mean, return_dict=False)[0]

    return Case(module, Role.VAE, (torch.randn(1, 3, 32, 32),), run)


def vae_in_bands() -> Case:
    """The same, layer by layer over bands of rows that come from main memory and go back there."""
    case = vae()

    def run(m: nn.Module, pixels: Tensor) -> Tensor:
        bands = TiledVae(m, pixels.device, 2**16, lambda: None)
        return bands.decode(bands.encode(pixels).mean).to(pixels.device)

    return replace(case, run=run)


def text_encoder() -> Case:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=99,
        bos_token_id=97,
        eos_token_id=98,
        pad_token_id=1,
    )
    tokens = torch.randint(2, 97, (2, 77))
    return Case(CLIPTextModel(config), Role.TEXT_ENCODER, (tokens,), lambda m, x: m(x)[0])


def t5() -> Case:
    """Norms of a class of its own, which stays: the patcher moves them, and nothing casts them."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=32, d_ff=64, num_layers=3, num_heads=4, d_kv=8, vocab_size=99)
    return Case(T5EncoderModel(config), Role.TEXT_ENCODER, (torch.randint(2, 97, (2, 20)),), lambda m, x: m(x)[0])


def safety_checker() -> Case:
    """A CLIP vision tower and the parameters of StableDiffusionSafetyChecker."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "image_size": 30,
        "patch_size": 6,
        "projection_dim": 32,
    }
    module = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=32))

    def run(m: nn.Module, pixels: Tensor) -> Tensor:
        embeddings = m.visual_projection(m.vision_model(pixels)[1])
        return (
            embeddings @ m.concept_embeds.T + embeddings @ m.special_care_embeds.T[:, :1] * m.concept_embeds_weights[0]
        )

    return Case(module, Role.SAFETY, (torch.randn(2, 3, 30, 30),), run)


def lama() -> Case:
    """Convolutions that mirror their input, batch norms, and Fourier transforms; a smaller one of LaMa's generators."""
    from spandrel.architectures.LaMa.__arch.LaMa import FFCResNetGenerator

    module = FFCResNetGenerator(4, 3, ngf=8, n_downsampling=2, n_blocks=2)
    inputs = torch.rand(1, 3, 24, 32), torch.rand(1, 1, 24, 32).round()
    return Case(module, Role.FILL, inputs, lambda m, image, mask: m(image, mask))


CASES = {f.__name__: f for f in (unet, vae, vae_in_bands, text_encoder, t5, safety_checker, lama)}


PLACEMENTS = (
    ("full", 10.0, "NORMAL_VRAM"),
    ("40 %", 0.4, "NORMAL_VRAM"),
    ("10 %", 0.1, "NORMAL_VRAM"),
    ("no VRAM", 10.0, "NO_VRAM"),
)
"""Room for this many times a module."""


def build(name: str) -> tuple[Case, dict[torch.device, Tensor]]:
    """The case with random weights, and what the plain module gives on each device (their attention may differ)."""
    torch.manual_seed(0)
    case = CASES[name]()
    with torch.no_grad():
        for key, tensor in [*case.module.named_parameters(), *case.module.named_buffers()]:
            if tensor.is_floating_point():
                values = torch.randn_like(tensor) * 0.1
                tensor.copy_(values.abs() if key.endswith("running_var") else values)
    case.module.eval().requires_grad_(False)
    with PretendedDevice():
        expected = {
            device: case.run(copy.deepcopy(case.module).to(device), *(x.to(device) for x in case.inputs)).to(CPU)
            for device in (CPU, VRAM)
        }
    return case, expected


def size_of(module: nn.Module) -> int:
    return mm.module_size(module)


def stranded(managed: ComfyModule, device: torch.device) -> list[str]:
    """Tensors on the wrong device that no layer fetches for itself."""
    return [
        f"{name}.{key}"
        for name, layer in managed.module.named_modules()
        if not getattr(layer, "comfy_cast_weights", False)
        for key, tensor in [*layer._parameters.items(), *layer._buffers.items()]
        if tensor is not None and tensor.device != device
    ]


def observe(case: Case, expected: dict[torch.device, Tensor], managed: ComfyModule, activation_bytes: int = 0) -> dict:
    """Load, look, run."""
    device = managed.load(activation_bytes)
    report = {
        "loaded": managed.patcher.loaded_size() / managed.patcher.model_size(),
        "stranded": stranded(managed, device),
        "device": str(device),
    }
    result = case.run(managed.module, *(x.to(device) for x in case.inputs))
    assert result.device == device
    return {**report, "equal": torch.equal(result.to(CPU), expected[device])}


def placements() -> dict:
    """Every module at every share of memory; partially unloaded; unloaded and loaded whole; shrunk to a half."""
    report = {}
    for name in CASES:
        pristine, expected = build(name)
        size = size_of(pristine.module)
        for label, share, state in PLACEMENTS:
            case = replace(pristine, module=copy.deepcopy(pristine.module))
            rows = {}
            with fake_vram(share * size, vram_state=state) as vram:
                managed = ComfyHost().manage(case.module, case.role)
                rows["loaded"] = observe(case, expected, managed)
                managed.patcher.partially_unload(managed.patcher.offload_device, size // 5)
                vram.total -= vram.free()  # room for nothing else
                rows["partially unloaded"] = observe(case, expected, managed)
                mm.unload_all_models()
                rows["in VRAM after unloading"] = len(in_vram(case.module))
                vram.total = 20 * size
                # asks for more activations each time, or the load is skipped
                rows["loaded again"] = observe(case, expected, managed, activation_bytes=1)
                vram.total = size // 2
                rows["shrunk"] = observe(case, expected, managed, activation_bytes=2)
                mm.unload_all_models()
            report[f"{name}, {label}"] = rows
    return report


def in_vram(module: nn.Module) -> list[Tensor]:
    return [t for t in [*module.parameters(), *module.buffers()] if isinstance(t, VramTensor)]


def plain_modules_are_stranded() -> dict:
    """The control: the same modules unswapped in a bare patcher."""
    report = {}
    for name in CASES:
        case, _ = build(name)
        with fake_vram(0.4 * size_of(case.module)):
            holder = nn.Module()
            holder.inner = case.module
            patcher = comfy.model_patcher.ModelPatcher(holder, VRAM, CPU)
            mm.load_models_gpu([patcher])
            left = [key for key, tensor in case.module.state_dict().items() if tensor.device != VRAM]
            try:
                case.run(case.module, *(x.to(VRAM) for x in case.inputs))
            except RuntimeError as error:
                report[name] = {"stranded": len(left), "error": str(error)}
            mm.unload_all_models()
    return report


def eviction() -> dict:
    """Two models in room for one: the second moves the first out, and back."""
    first, expected = build("unet")
    second, expected_too = build("unet")
    size = size_of(first.module)
    with fake_vram(1.3 * size):
        one = ComfyHost().manage(first.module, Role.DENOISER)
        two = ComfyHost().manage(second.module, Role.DENOISER)
        rows = [observe(first, expected, one), observe(second, expected_too, two)]
        shares = [m.patcher.loaded_size() / size for m in (one, two)]
        rows += [observe(first, expected, one), observe(second, expected_too, two)]
        mm.unload_all_models()
    return {"rows": rows, "shares": shares}


def repeated_loads() -> dict:
    """How often the patcher is asked, over calls that need it or not."""
    case, _ = build("unet")
    with fake_vram(ENOUGH) as vram:
        managed = ComfyHost().manage(case.module, case.role)
        other = ComfyHost().manage(build("vae")[0].module, Role.VAE)
        asked = []
        real = mm.load_models_gpu

        def counting(*args: object, **kwargs: object) -> object:
            asked.append(args)
            return real(*args, **kwargs)

        mm.load_models_gpu = counting

        def loads(action: Callable[[], object]) -> int:
            before = len(asked)
            action()
            return len(asked) - before

        report = {
            "first": loads(lambda: managed.load(100)),
            "same": loads(lambda: managed.load(100)),
            "less": loads(lambda: managed.load(50)),
            "more": loads(lambda: managed.load(200)),
        }
        other.load(0)
        report["after another model"] = loads(lambda: managed.load(200))
        managed.patcher.partially_unload(CPU, 1000)
        report["after a partial unload"] = loads(lambda: managed.load(200))
        mm.unload_all_models()
        report["after unloading"] = loads(lambda: managed.load(200))
        mm.load_models_gpu = real
        report["free"] = ComfyHost().free_memory() == vram.free(VRAM)
        mm.unload_all_models()
    return report


def loaded_by_others() -> dict:
    """Whoever loads the patcher, e.g. another pack that frees and restores: nothing stays behind."""
    report = {}
    for name in CASES:
        case, _ = build(name)
        with fake_vram(0.4 * size_of(case.module)):
            managed = ComfyHost().manage(case.module, Role.DENOISER)
            mm.load_models_gpu([managed.patcher])
            report[name] = stranded(managed, VRAM)
            mm.unload_all_models()
    return report


class Vbar:
    """Stands in for comfy_aimdo's virtual memory with no room at all: every weight is fetched when it is used."""

    def __init__(self, size: int, device: int | None) -> None:
        self.staged = 0

    def alloc(self, size: int) -> tuple:
        self.staged += size
        return (self, self.staged, size)

    def prioritize(self) -> None:
        pass

    def loaded_size(self) -> int:
        return 0

    def free_memory(self, size: int) -> int:
        return 0


@contextlib.contextmanager
def dynamic_vram() -> Iterator[None]:
    """Dynamic VRAM as ComfyUI starts it, its native library replaced."""
    library = {
        "ModelVBAR": Vbar,
        "vbar_fault": lambda allocation: None,
        "vbar_unpin": lambda allocation: None,
        "vbar_signature_compare": lambda one, other: False,
        "vbars_analyze": lambda *device: 0,
    }
    with contextlib.ExitStack() as patches:
        for patch in (
            mock.patch.object(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic),
            mock.patch.multiple(comfy_aimdo.model_vbar, **library),
            mock.patch.object(comfy_aimdo.host_buffer, "HostBuffer", mock.MagicMock()),
            mock.patch.object(mm, "pinned_hostbuf_size", lambda size: 0, create=True),
            mock.patch.object(comfy.pinned_memory, "pin_memory", lambda *module, **options: False),
            mock.patch.object(comfy.pinned_memory, "get_pin", lambda *module, **options: None),
        ):
            patches.enter_context(patch)
        yield


def dynamic() -> dict:
    """The patcher of dynamic VRAM. Not the safety checker: ComfyUI assigns ``.data`` of its bare parameters, which a
    VramTensor cannot take."""
    report = {}
    for name in ("unet", "vae", "vae_in_bands", "text_encoder", "t5"):
        case, expected = build(name)
        with fake_vram(ENOUGH), dynamic_vram():
            managed = ComfyHost().manage(case.module, case.role)
            rows = [observe(case, expected, managed)]
            (vbar,) = managed.patcher.model.dynamic_vbars.values()
            mm.unload_all_models()
            left = len(in_vram(case.module))
            rows.append(observe(case, expected, managed))
            mm.unload_all_models()
        report[name] = {
            "rows": rows,
            "in VRAM after unloading": left,
            "staged": vbar.staged / managed.patcher.model_size(),
            "dynamic": managed.patcher.is_dynamic(),
        }
    return report


def eight_bits() -> dict:
    """ComfyUI told to keep diffusion networks in 8 bits, against a plain network with weights rounded so."""
    from comfy.cli_args import args

    report = {}
    with mock.patch.object(args, "fp8_e4m3fn_unet", True):
        storage = {role.value: ComfyHost().storage(role) for role in Role}
        report["roles"] = {role: str(dtype) for role, dtype in storage.items() if dtype is not None}
        report["a precision that was chosen"] = ComfyHost(torch.bfloat16).storage(Role.DENOISER)
        for label, share, state in PLACEMENTS:
            case, _ = build("unet")
            for layer in case.module.modules():
                if type(layer) in (nn.Linear, nn.Conv2d):
                    layer.weight.copy_(layer.weight.to(torch.float8_e4m3fn).float())
            with PretendedDevice():
                plain = copy.deepcopy(case.module).to(VRAM)
                expected = {VRAM: case.run(plain, *(x.to(VRAM) for x in case.inputs)).to(CPU)}
            size = size_of(case.module)
            with fake_vram(share * size / 4, vram_state=state):
                managed = ComfyHost().manage(case.module, case.role)
                report[label] = {
                    **observe(case, expected, managed),
                    "stored": sorted({str(tensor.dtype) for tensor in case.module.parameters()}),
                    "computes in": str(managed.dtype),
                    "share of memory": managed.patcher.model_size() / size,
                }
                mm.unload_all_models()
    return report


class Keeper:
    """Stands in for an InpaintModel: it keeps its modules."""

    def __init__(self, *modules: ComfyModule) -> None:
        self.modules = modules


def dropping_the_model() -> dict:
    """What ComfyUI's list of models and its log say when the last reference to a MendModel goes."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    with fake_vram(ENOUGH):
        host = ComfyHost()
        cases = [build(name)[0] for name in ("unet", "vae", "text_encoder")]
        model = MendModel(Keeper(*(host.manage(c.module, c.role) for c in cases)), host)
        del cases
        sizes = [patcher.model_size() for patcher in model.get_models()]
        for managed in model.model.modules:
            managed.load(0)
        del managed
        report = {
            "models": len(sizes),
            "largest first": sizes == sorted(sizes, reverse=True) and model.patcher is model.get_models()[0],
            "recognised": comfy.model_patcher.is_model_patcher_output(model)
            if hasattr(comfy.model_patcher, "is_model_patcher_output")
            else None,
            "before": len(mm.loaded_models()),
        }
        gc.disable()  # counting references must be enough
        del model
        mm.cleanup_models_gc()
        report["after"] = len(mm.loaded_models())
        gc.enable()
        report["patchers left"] = len(host.patchers)
    logging.getLogger().removeHandler(handler)
    return {**report, "leak warnings": log.getvalue().count("memory leak"), "log": log.getvalue()}


def inference_mode() -> dict:
    """Nodes run in inference mode, the worker unloads outside of it."""
    with fake_vram(ENOUGH) as vram:
        with torch.inference_mode():
            case, expected = build("safety_checker")
            managed = ComfyHost().manage(case.module, case.role)
            rows = [observe(case, expected, managed)]
        mm.unload_all_models()
        vram.total = 0.3 * size_of(case.module)
        with torch.inference_mode():
            rows.append(observe(case, expected, managed))
        mm.unload_all_models()
        with torch.inference_mode():
            rows.append(observe(case, expected, managed))
        mm.unload_all_models()
    return {"rows": rows}


def interruption() -> dict:
    """The stop button in the middle of one forward pass."""
    case, expected = build("unet")
    ran = []
    with fake_vram(ENOUGH):
        managed = ComfyHost().manage(case.module, case.role)
        device = managed.load(0)
        inputs = [x.to(device) for x in case.inputs]
        blocks = [case.module.conv_in, case.module.mid_block, case.module.conv_out]
        names = ["conv_in", "mid_block", "conv_out"]
        for name, block in zip(names, blocks, strict=True):
            block.register_forward_hook(lambda *_, name=name: ran.append(name))
        hook = case.module.mid_block.register_forward_hook(lambda *_: mm.interrupt_current_processing())
        try:
            case.run(case.module, *inputs)
            stopped = False
        except mm.InterruptProcessingException:
            stopped = True
        hook.remove()
        report = {"stopped": stopped, "ran": list(ran)}
        after = observe(case, expected, managed)
        mm.unload_all_models()
    return {**report, "after": after}


def host() -> dict:
    """What the host answers on a machine without a graphics card, and with an interrupt pending."""
    report = {"dtypes": {role.value: str(ComfyHost().dtype(role)) for role in Role}}
    report["precision"] = str(ComfyHost(torch.bfloat16).dtype(Role.VAE))
    report["folders"] = {
        kind: len(ComfyHost().model_folders(kind)) for kind in ("checkpoints", "diffusers", "embeddings")
    }
    report["unknown folders"] = len(ComfyHost().model_folders("no such kind"))
    report["free"] = ComfyHost().free_memory()

    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    seen = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: seen.append((value, total, preview))
    )
    latents = torch.randn(2, 4, 8, 8)
    for method in ("Latent2RGB", "NoPreviews"):
        args.preview_method = LatentPreviewMethod[method]
        progress = ComfyHost().progress(3, "Inpaint", "SD15")
        progress.update(1, latents)
        progress.update(3, None)
    args.preview_method = LatentPreviewMethod.Latent2RGB
    ComfyHost().progress(1, "Sixteen channels", "Flux").update(1, torch.randn(1, 16, 8, 8))
    ComfyHost().progress(1, "Latents of its own").update(1, torch.randn(1, 4, 8, 8))
    ComfyHost().progress(1, "From a later ComfyUI", "NotYetKnown").update(1, torch.randn(1, 4, 8, 8))
    report["previewed formats"] = previewed_formats()
    report["previews differ"] = preview_colours()
    report["progress"] = [
        [value, total, None if p is None else [p[0], list(p[1].size), p[1].mode, p[2]]] for value, total, p in seen
    ]
    mm.interrupt_current_processing()
    interrupts = 0
    for ask in (ComfyHost().check_interrupt, lambda: progress.update(2)):
        mm.interrupt_current_processing()
        try:
            ask()
        except mm.InterruptProcessingException:
            interrupts += 1
    return {**report, "interrupts": interrupts, "pending": mm.processing_interrupted()}


def previewed_formats() -> dict[str, str]:
    """What each family's latents of one picture become: the size of the preview, or what went wrong."""
    import comfy.latent_formats
    from comfyui_mend.nodes.comfy_host import ComfyProgress

    report = {}
    for name, kind in vars(comfy.latent_formats).items():
        # AV: video and sound in one, of which ComfyUI shows nothing either
        if not isinstance(kind, type) or getattr(kind, "latent_dimensions", 0) < 2 or name.endswith("AV"):
            continue
        try:
            picture = ComfyProgress(1, "", name)._picture(torch.randn(2, kind().latent_channels, 8, 8))
            report[name] = "none" if picture is None else str(min(picture[1].size) >= 8)
        except Exception as error:
            report[name] = repr(error)
    return report


def preview_colours() -> bool:
    """Whether the same latents look different as another family's."""
    from comfyui_mend.nodes.comfy_host import ComfyProgress

    latents = torch.randn(1, 4, 8, 8)
    pictures = [ComfyProgress(1, "", name)._picture(latents)[1].tobytes() for name in ("SD15", "SDXL")]
    return pictures[0] != pictures[1]


CHECKS = (
    placements,
    plain_modules_are_stranded,
    loaded_by_others,
    dynamic,
    eviction,
    repeated_loads,
    eight_bits,
    dropping_the_model,
    inference_mode,
    interruption,
    host,
)

if __name__ == "__main__":
    with torch.no_grad():
        inside.answer({check.__name__: check() for check in CHECKS})
