"""The measures behind the benchmark's figures. Images [B, H, W, C], masks [B, H, W] or [H, W], 0..1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

SEAM_DISTANCE = 8
"""Pixels from the mask's contour to those it is compared with."""


def largest_difference(a: Tensor, b: Tensor, where: Tensor) -> float:
    """max |a - b| over the pixels of the mask ``where``; 0 where it has none."""
    difference = (a - b).abs().amax(-1)[where > 0]
    return float(difference.max()) if difference.numel() else 0.0


def mean_difference(a: Tensor, b: Tensor, where: Tensor) -> float:
    """Signed mean of a - b over the pixels of ``where``, in levels of 255."""
    return float((a - b)[where > 0].double().mean()) * 255


def changed_pixels(a: Tensor, b: Tensor, where: Tensor, above: float = 1e-6) -> int:
    return int(((a - b).abs().amax(-1)[where > 0] > above).sum())


def reach(mask: Tensor, y: int, x: int) -> dict[str, int]:
    """How far a mask [H, W] extends from the pixel y, x on each side."""
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return {
        "left": x - int(columns.min()),
        "right": int(columns.max()) - x,
        "up": y - int(rows.min()),
        "down": int(rows.max()) - y,
    }


class SeamGauge:
    """How much steeper pictures are across the edge of a mask [H, W] (above one half) than beside it.

    The mean absolute step between side-by-side pixels of which one is masked and one is not, over the same mean for
    the mask grown and shrunk by SEAM_DISTANCE pixels. 1 where nothing shows; contours that leave the picture or
    vanish are left out.
    """

    def __init__(self, mask: Tensor) -> None:
        inside = mask.numpy() > 0.5
        signed = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
        self._edge = _pairs_across(inside)
        shrunk, grown = _pairs_across(signed > SEAM_DISTANCE), _pairs_across(signed >= -SEAM_DISTANCE)
        self._beside = np.concatenate([shrunk, grown], axis=1)

    def ratio(self, image: Tensor) -> float:
        """Of a picture [H, W, C]."""
        pixels = image.double().numpy().reshape(-1, image.shape[-1])
        return _mean_step(pixels, self._edge) / _mean_step(pixels, self._beside)


def seam_ratio(image: Tensor, mask: Tensor) -> float:
    """``SeamGauge`` of one picture."""
    return SeamGauge(mask).ratio(image)


def _pairs_across(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """[2, N]: the places, in the flattened picture, of every two neighbours on different sides of the contour."""
    place = np.arange(inside.size).reshape(inside.shape)
    across, down = np.diff(inside, axis=1), np.diff(inside, axis=0)
    first = np.concatenate([place[:, :-1][across], place[:-1][down]])
    second = np.concatenate([place[:, 1:][across], place[1:][down]])
    return np.stack([first, second])


def _mean_step(pixels: npt.NDArray[np.float64], pairs: npt.NDArray[np.intp]) -> float:
    return float(np.abs(pixels[pairs[0]] - pixels[pairs[1]]).mean())


def timed(run: Callable[[], object]) -> float:
    """CPU seconds: on one thread what a clock shows on an idle machine, and a busy one does not spoil them."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(
    runs: Mapping[str, Callable[[], object]], first: Mapping[str, float], *, rounds: int = 5, budget: float = 6.0
) -> dict[str, float]:
    """Median CPU seconds of each run: one after the other in every round, so that a busy minute hits all alike.

    ``first`` are the seconds that each took before: a warm-up, or the figure itself where the run is so slow that
    they exceed ``budget``. A run that has used up ``budget`` seconds sits out the remaining rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if first[name] + sum(seconds[name]) < budget:
                seconds[name].append(timed(run))
    return {name: statistics.median(taken or [first[name]]) for name, taken in seconds.items()}
