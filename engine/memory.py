"""Where memory is short: smaller forms of the same computation, and one line of log when one is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .types import MendError

log = logging.getLogger("mend")

MIB = 2**20
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, ROCm, MPS
    "out_of_device_memory",  # XPU
    "not enough gpu video memory",  # DirectML
    "can't allocate memory",  # the CPU on Linux and macOS
    "not enough memory",  # the CPU on Windows
)
WITHOUT_FUSED_ATTENTION = frozenset({"mps", "privateuseone"})
"""Device types on which torch's scaled_dot_product_attention makes the whole matrix of queries and keys; privateuseone
is DirectML. Everywhere else it works through the keys in blocks, and slicing would only cost time."""

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is torch.OutOfMemoryError or one of the plain RuntimeErrors by which other devices say so."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


@dataclass(frozen=True)
class Form:
    """How much of a batch a network works on at once."""

    rows: int
    apart: bool = False
    """Whether the two branches of guidance run one after the other."""
    band_bytes: int = 0
    """Of a VAE that runs in bands of rows: what the activations of one may take."""

    def __str__(self) -> str:
        if self.band_bytes:
            return f"in bands of {self.band_bytes // MIB} MiB"
        pictures = "one picture" if self.rows == 1 else f"{self.rows} pictures"
        return f"{pictures} {'and one prompt ' if self.apart else ''}at a time"


def halved(rows: int) -> list[Form]:
    """So many rows at once, half of them, and one."""
    return [Form(count) for count in dict.fromkeys((rows, max(rows // 2, 1), 1))]


class Forms:
    """The forms of one computation, from the fastest that should fit to the smallest there is."""

    def __init__(self, forms: Sequence[Form], work: str) -> None:
        """``work`` says what is computed, as in "There is not enough memory to <work>"."""
        self._forms = list(forms)
        self._work = work
        self.failed = 0
        """How many forms did not fit, against what had been estimated."""

    def run(self, attempt: Callable[[Form], Result]) -> Result:
        """``attempt`` in the first form that fits; those that did not are not tried again.

        Raises MendError where none does.
        """
        while True:
            try:
                return attempt(self._forms[0])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(self._forms) == 1:
                    raise MendError(
                        f"There is not enough memory to {self._work}, even {self._forms[0]}: make the canvas smaller"
                        " (crop to the mask, or give a smaller width and height), load the model in a smaller"
                        " precision, or close what else uses the memory."
                    ) from error
            # outside of the handler: the error holds on to all tensors of the attempt
            tried = self._forms.pop(0)
            self.failed += 1
            log.warning("Not enough memory to %s, %s; trying again, %s.", self._work, tried, self._forms[0])


def slice_attention(module: Any, device: torch.device) -> None:
    """Make a diffusers UNet attend one head at a time where torch's attention would make the matrices of all heads."""
    if device.type in WITHOUT_FUSED_ATTENTION and isinstance(module, nn.Module):
        slicing = getattr(module, "set_attention_slice", None)
        if slicing is not None:
            slicing("max")
