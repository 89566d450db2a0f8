"""What is measured: one interface, an adapter for each pack behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""What happens to the crop [1, h, w, 3] between cutting and stitching."""


class NotOfferedError(Exception):
    """The pack has nothing that does this."""


@dataclass(frozen=True)
class Sides:
    """Pixels added by outpainting."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


class Contestant:
    """A pack. Each operation is what its users run for the purpose; what it has not raises NotOfferedError.

    Images are float32 [1, H, W, 3] in 0..1 and masks [1, H, W] unless a robustness case says otherwise.
    """

    name: str

    def grow(self, mask: Tensor, pixels: int) -> Tensor:
        """The mask, ``pixels`` larger on all sides."""
        raise NotOfferedError

    def shrink(self, mask: Tensor, pixels: int) -> Tensor:
        raise NotOfferedError

    def fill_holes(self, mask: Tensor) -> Tensor:
        raise NotOfferedError

    def prepare(self, mask: Tensor) -> Tensor:
        """The mask as the pack's preparation gives it with its own defaults."""
        raise NotOfferedError

    def sampler_mask(self, mask: Tensor) -> Tensor:
        """What the sampler is told to repaint, on the latent grid of one cell for 8 x 8 pixels, [..., H/8, W/8]."""
        raise NotOfferedError

    def crop(self, image: Tensor, mask: Tensor) -> Tensor:
        """The crop with the pack's own defaults."""
        raise NotOfferedError

    def crop_mask(self, mask: Tensor, feather: int) -> Tensor:
        """The mask that the sampler gets with the crop of a picture that it touches the left border of."""
        raise NotOfferedError

    def round_trip(self, image: Tensor, mask: Tensor, edit: Edit, *, feather: int, target: int | None) -> Tensor:
        """Crop around the mask, edit, stitch; ``target`` is the side of a square crop, None keeps the scale."""
        raise NotOfferedError

    def alpha(self, mask: Tensor, feather: int) -> Tensor:
        """How much of the painted crop arrives, [H, W]: black picture, white crop."""
        raise NotOfferedError

    def through_vae(self, image: Tensor, mask: Tensor, codec: Edit) -> Tensor:
        """The picture after a run whose sampler changed nothing but whose VAE did: ``codec`` is encode and decode.

        ``codec`` takes any size and gives back whole latent cells, as VAEs do.
        """
        raise NotOfferedError

    def join(self, original: Tensor, painted: Tensor, mask: Tensor, *, feather: int) -> Tensor:
        """The painted picture's masked part set into the original so that it does not show."""
        raise NotOfferedError

    def match_color(self, target: Tensor, reference: Tensor, excluded: Tensor) -> Tensor:
        """``target`` with the colours of ``reference``, measured where ``excluded`` is 0."""
        raise NotOfferedError

    def pad(self, image: Tensor, sides: Sides, feather: int) -> tuple[Tensor, Tensor]:
        """The picture on the larger canvas, and its mask."""
        raise NotOfferedError

    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        """The masked part made grey."""
        raise NotOfferedError

    def bounding_box(self, mask: Tensor) -> None:
        raise NotOfferedError

    def other_path(self) -> Contestant:
        """The pack on another device, or with another library below: its masks should be the same."""
        raise NotOfferedError
