"""A training run in a folder: weights, their moving average, the optimiser's state and a log, safe to interrupt."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STATE = "state.safetensors"
LOG = "log.jsonl"
CHECKPOINT_SECONDS = 300
WARMUP = 100
BETAS = (0.9, 0.99)


class Run:
    """What is trained and how far it is.

    Everything lies in one safetensors file that is replaced in one move: stopped at any moment, the run goes on from
    the last checkpoint, at most CHECKPOINT_SECONDS back. SIGTERM and SIGINT end the loop after a last checkpoint.
    """

    def __init__(
        self, folder: Path, modules: Mapping[str, nn.Module], lr: float, decay: float = 0.2, ema: float = 0.999
    ) -> None:
        self.folder, self.modules, self.lr, self.decay, self.ema_decay = folder, modules, lr, decay, ema
        self.step = 0
        self.named = {
            f"{part}/{name}": parameter
            for part, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.parameters: list[Tensor] = list(self.named.values())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
        self._stop = False
        self._saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    # -- the loop

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps still to do; checkpoints in between and at the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        while self.step < total and not self._stop:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate(self.step, total, self.decay)
            yield self.step
            self.step += 1
            if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
                self.save()
        self.save()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def update(self, loss: Tensor, clip: float = 1.0) -> None:
        """One step of the optimiser and of the moving average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules hold the moving average of their weights inside, in eval mode."""
        live = [parameter.detach().clone() for parameter in self.parameters]
        self._assign(self.average)
        for module in self.modules.values():
            module.eval()
        try:
            yield
        finally:
            self._assign(live)
            for module in self.modules.values():
                module.train()

    def _assign(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, list(values))

    # -- files

    def save(self) -> None:
        """Replaces the checkpoint in one move."""
        tensors = {}
        for (name, parameter), average in zip(self.named.items(), self.average, strict=True):
            tensors[f"live/{name}"], tensors[f"ema/{name}"] = parameter.detach(), average
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        target = self.folder / STATE
        partial = target.with_suffix(".partial")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial, metadata={"step": str(self.step)})
        partial.replace(target)
        self._saved = time.monotonic()

    def resume(self) -> bool:
        """Takes up the checkpoint in the folder; False where there is none."""
        path = self.folder / STATE
        if not path.exists():
            return False
        with safe_open(path, "pt") as file, torch.no_grad():
            self.step = int(file.metadata()["step"])
            keys = set(file.keys())
            for (name, parameter), average in zip(self.named.items(), self.average, strict=True):
                parameter.copy_(file.get_tensor(f"live/{name}"))
                average.copy_(file.get_tensor(f"ema/{name}"))
                self.optimizer.state[parameter] = {
                    key: file.get_tensor(f"{key}/{name}").to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}/{name}" in keys
                }
        return True

    def log(self, **values: float) -> None:
        """Appends a line of JSON to the log."""
        record = {"step": self.step, "time": round(time.time(), 1)}
        record |= {key: round(float(value), 5) for key, value in values.items()}
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")


def rate(step: int, total: int, decay: float) -> float:
    """The learning rate's factor: a linear warm-up, constant, and down to zero over the last share ``decay``."""
    return min(1.0, (step + 1) / WARMUP, (total - step) / max(1.0, decay * total))


def load_average(folder: Path, part: str, module: nn.Module) -> nn.Module:
    """The averaged weights of one part of a run, into ``module``, ready for inference."""
    with safe_open(folder / STATE, "pt") as file:
        prefix = f"ema/{part}/"
        state = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    missing, unexpected = module.load_state_dict(state, strict=False)
    buffers = {name for name, _ in module.named_buffers()}
    if unexpected or set(missing) - buffers:
        raise ValueError(f"{folder / STATE} does not fit: missing {sorted(set(missing) - buffers)}, extra {unexpected}")
    return module.eval().requires_grad_(False)


class Means:
    """Running means of named numbers, single or many at once, between two lines of the log."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, **values: Tensor) -> None:
        for key, value in values.items():
            self._values[key].append(value.detach().reshape(-1))

    def take(self) -> dict[str, float]:
        means = {key: torch.cat(values).mean().item() for key, values in self._values.items()}
        self._values.clear()
        return means


def save_sheet(path: Path, rows: Sequence[Tensor]) -> None:
    """A PNG of rows of pictures, each a batch [N, 3, H, W] in -1..1."""
    lines = [torch.cat(list(row.float().cpu().clamp(-1, 1)), dim=2) for row in rows]
    pixels = (torch.cat(lines, dim=1).permute(1, 2, 0) + 1) * 127.5
    Image.fromarray(pixels.round().numpy().astype(np.uint8)).save(path)
