"""Pictures and masks -> crops for a sampler and a record; painted crops and the record -> pictures.

How many go in and come out: N pictures with one mask, one picture with N masks, and N with N make N pictures; picture i
is the i-th of whichever there are N of. Frames are cut and put back one at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from . import images
from .crop import UNCHANGED, CropOptions, CropPlan, Overflow, fit, plan, surroundings, union
from .crop_record import CropRecord, Patch, as_batch, levels_of
from .masks import OnImage, bounding_box
from .regions import Region, Video, regions, stable_boxes
from .stitch import Stitched, StitchOptions, stitch
from .types import MAX_SEED, Box, InputError, Size

CELL = 8
"""Pixels of a latent cell: a sampler changes whole cells."""
SAMPLER_MULTIPLES = (8, 16, 32, 64)
"""What samplers and VAEs round sizes down to."""


class Separate(str, Enum):
    """What becomes of a mask with several regions."""

    TOGETHER = "together"
    """One crop holds them all."""
    EACH = "each"
    """Each gets a crop of its own, and all come back into one picture."""


@dataclass(frozen=True)
class Cropped:
    """What goes to the sampler, and what brings it back."""

    crops: tuple[Tensor, ...]
    """Batches [b, h, w, 3] of one canvas size each; with Separate.EACH one for each region."""
    masks: tuple[Tensor, ...]
    """The sampler's masks of those batches, [b, h, w]."""
    record: CropRecord
    reports: tuple[str, ...]
    """One line for each crop, and sentences the user should see."""


@dataclass(frozen=True)
class _Frames:
    """Pictures and masks, each pair normalised when it is asked for, so that no copy of all of them is held."""

    image: Tensor
    mask: Tensor
    stitch_mask: Tensor | None
    context_mask: Tensor | None

    @classmethod
    def of(cls, image: Tensor, mask: Tensor | None, stitch_mask: Tensor | None, context_mask: Tensor | None) -> _Frames:
        images.check_tensor("image", image)
        frames = cls(
            image if image.ndim == 4 else image[None],
            torch.ones(1, *image.shape[-3:-1]) if mask is None else _batched(mask),
            None if stitch_mask is None else _batched(stitch_mask),
            None if context_mask is None else _batched(context_mask),
        )
        total = len(frames)
        for name, batch in (("images", frames.image), *frames._masks()):
            if batch.shape[0] not in (1, total):
                raise InputError(
                    f"{batch.shape[0]} {name} do not go with the {total} of another input; give one, or one for each."
                )
        return frames

    def __len__(self) -> int:
        return max(batch.shape[0] for batch in (self.image, *(mask for _, mask in self._masks())))

    def _masks(self) -> list[tuple[str, Tensor]]:
        named = (("masks", self.mask), ("stitch masks", self.stitch_mask), ("context masks", self.context_mask))
        return [(name, mask) for name, mask in named if mask is not None]

    def pictures(self, index: int) -> Tensor:
        """[1, H, W, 3 or 4]."""
        return images.as_images(_at(self.image, index))

    def sampler_mask(self, index: int) -> Tensor:
        """[1, H, W] on the CPU, as are the others."""
        return self._fitted(self.mask, index)

    def stitch_masks(self, index: int) -> Tensor:
        return self._fitted(self.mask if self.stitch_mask is None else self.stitch_mask, index)

    def touched(self, index: int) -> Tensor:
        """Where either mask is above 0."""
        mask = self.sampler_mask(index)
        return mask if self.stitch_mask is None else torch.maximum(mask, self.stitch_masks(index))

    def context(self, index: int) -> Box | None:
        return None if self.context_mask is None else bounding_box(self._fitted(self.context_mask, index))

    def _fitted(self, mask: Tensor, index: int) -> Tensor:
        return images.as_masks(_at(mask, index), _at(self.image, index)).cpu()


def _batched(mask: Tensor) -> Tensor:
    images.check_tensor("mask", mask)
    return mask[None] if mask.ndim == 2 else mask


def _at(batch: Tensor, index: int) -> Tensor:
    return batch if batch.shape[0] == 1 else batch[index : index + 1]


@dataclass(frozen=True)
class _Piece:
    """A crop to make; ``region`` None takes the whole mask."""

    picture: int
    plan: CropPlan
    region: Region | None = None
    empty: bool = False


def crop_to_mask(
    image: Tensor,
    mask: Tensor | None,
    options: CropOptions = CropOptions(),  # noqa: B008
    *,
    stitch_mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    separate: Separate = Separate.TOGETHER,
    video: Video = Video.OFF,
    smoothing: float = 8.0,
    on_image: OnImage | None = None,
) -> Cropped:
    """Cut the surroundings of ``mask`` [B, H, W] (default: everything) out of ``image`` [B, H, W, 3 or 4].

    The crops are for a sampler: ``mask`` says what it may paint, ``stitch_mask`` (default: the same) what of it comes
    back, and everything ``context_mask`` marks is shown. Crops have three channels. A picture whose masks are empty is
    cut as a whole, and comes back as it was. ``video`` decides whether the boxes of a batch move together
    (``stable_boxes``), and then empty frames are cut where their neighbours are. With Separate.EACH the regions are
    those of each picture, or with Video.UNION those of all frames at once.

    Raises InputError for pictures and masks that do not fit each other.
    """
    separate, video = Separate(separate), Video(video)
    frames = _Frames.of(image, mask, stitch_mask, context_mask)
    if separate is Separate.EACH and video is Video.SMOOTHED:
        raise InputError("A smoothed box follows one place; crop the regions together, or choose the union for them.")
    pieces, batches = _pieces(frames, options, separate, video, smoothing)
    crops, masks, patches = list[Tensor](), list[Tensor](), list[Patch]()
    for batch in batches:
        canvas = batch[0].plan.canvas
        crop = torch.empty(len(batch), canvas.height, canvas.width, 3, device=image.device)
        crop_mask = torch.empty(len(batch), canvas.height, canvas.width)
        for row, piece in enumerate(batch):
            _cut(frames, piece, crop[row], crop_mask[row], patches)
            if on_image is not None:
                on_image(len(patches), len(pieces))
        crops.append(crop)
        masks.append(crop_mask.to(image.device))
    record = CropRecord(
        size=images.size_of(frames.pictures(0)),
        count=len(frames),
        patches=tuple(patches),
        batches=tuple(map(len, batches)),
        original=frames.image,
    )
    return Cropped(tuple(crops), tuple(masks), record, _reports(batches, record))


def _pieces(
    frames: _Frames, options: CropOptions, separate: Separate, video: Video, smoothing: float
) -> tuple[list[_Piece], list[list[_Piece]]]:
    """What to cut, and which of it travels together."""
    if video is Video.OFF:
        pieces = [piece for index in range(len(frames)) for piece in _pieces_of(frames, index, options, separate)]
    elif separate is Separate.EACH:
        pieces = _pieces_of_all(frames, options)
    else:
        pieces = _moving_pieces(frames, options, video, smoothing)
    batches: dict[object, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        batches[piece.region or piece.plan.canvas].append(piece)
    return pieces, list(batches.values())


def _pieces_of(frames: _Frames, index: int, options: CropOptions, separate: Separate) -> list[_Piece]:
    touched, context = frames.touched(index), frames.context(index)
    picture = images.size_of(touched)
    box = bounding_box(touched)
    if box is None:
        return [_Piece(index, _of_whole(picture, options), empty=True)]
    if separate is Separate.TOGETHER:
        return [_Piece(index, plan(box, picture, options, context))]
    return [_Piece(index, region.plan, region) for region in regions(touched, options, context)]


def _pieces_of_all(frames: _Frames, options: CropOptions) -> list[_Piece]:
    """The regions of all masks at once, each in every frame."""
    touched, context = frames.touched(0), frames.context(0)
    for index in range(1, len(frames)):
        touched = torch.maximum(touched, frames.touched(index))
        other = frames.context(index)
        context = union(context, other) if context and other else context or other
    found = regions(touched, options, context)
    if not found:
        whole_plan = _of_whole(images.size_of(touched), options)
        return [_Piece(index, whole_plan, empty=True) for index in range(len(frames))]
    return [_Piece(index, region.plan, region) for region in found for index in range(len(frames))]


def _moving_pieces(frames: _Frames, options: CropOptions, video: Video, smoothing: float) -> list[_Piece]:
    """One piece for each frame, all of one size."""
    picture = images.size_of(frames.pictures(0))
    boxes = list[Box | None]()
    for index in range(len(frames)):
        box = bounding_box(frames.touched(index))
        boxes.append(None if box is None else surroundings(box, options, frames.context(index)))
    if not any(boxes):
        whole_plan = _of_whole(picture, options)
        return [_Piece(index, whole_plan, empty=True) for index in range(len(frames))]
    wanted = stable_boxes(boxes, video, smoothing)
    return [
        _Piece(index, fit(box, box, picture, options), empty=boxes[index] is None) for index, box in enumerate(wanted)
    ]


def _of_whole(picture: Size, options: CropOptions) -> CropPlan:
    everything = Box(0, 0, picture.width, picture.height)
    inside = replace(options, overflow=Overflow.INSIDE)
    return plan(everything, picture, inside)


def _cut(frames: _Frames, piece: _Piece, crop: Tensor, crop_mask: Tensor, patches: list[Patch]) -> None:
    """Write one crop [h, w, 3] and its mask [h, w], and note how it comes back."""
    mask = frames.sampler_mask(piece.picture)
    stitch_mask = mask if frames.stitch_mask is None else frames.stitch_masks(piece.picture)
    if piece.region is not None:
        mask, stitch_mask = piece.region.own(mask), piece.region.own(stitch_mask)
    crop.copy_(piece.plan.cut(frames.pictures(piece.picture)[..., :3])[0])
    crop_mask.copy_(piece.plan.cut_mask(mask)[0])
    box = piece.plan.box
    cells = _cells(piece.plan.cut_hole(mask))
    repainted = (piece.plan.uncut_mask(cells) > 0)[0].numpy()
    patches.append(Patch(piece.picture, piece.plan, levels_of(stitch_mask[0, box.rows, box.columns]), repainted))


def _cells(hole: Tensor) -> Tensor:
    """A hole [B, h, w] of 0 and 1 made of whole latent cells."""
    height, width = hole.shape[1:]
    cells = F.max_pool2d(hole[:, None], CELL, ceil_mode=True)
    return F.interpolate(cells, scale_factor=CELL)[:, 0, :height, :width]


def _reports(batches: Sequence[Sequence[_Piece]], record: CropRecord) -> tuple[str, ...]:
    lines = []
    for piece in (piece for batch in batches for piece in batch):
        box, extent = piece.plan.box, piece.plan.extent
        how = f"scaled by {piece.plan.scaled.width / extent.width:.3g}" if piece.plan.resamples else "pixel for pixel"
        where = f"{box.size} at ({box.left}, {box.top}) of {record.size}"
        if piece.plan.outside is not None:
            where += f", extended to {extent} by {piece.plan.outside.fill.value}"
        note = ", which has an empty mask and will come back as it is" if piece.empty else ""
        lines.append(f"picture {piece.picture + 1}: {where} -> {piece.plan.canvas}, {how}{note}")
    return tuple(lines)


def stitch_crops(
    record: CropRecord,
    painted: Sequence[Tensor],
    image: Tensor | None = None,
    options: StitchOptions = StitchOptions(),  # noqa: B008
    *,
    masks: Sequence[Tensor] | None = None,
    unchanged: float = UNCHANGED,
    on_image: OnImage | None = None,
) -> Stitched:
    """The painted crops put back into the pictures they were cut from, or into ``image``.

    ``painted`` are the batches of ``crop_to_mask`` as a sampler returned them, [b, h, w, 3 or 4], at the size of the
    canvas or enlarged or reduced as a whole. Where a crop is transparent the original shows. A batch that comes back k
    times as long, as its first to last crop k times over, makes k pictures of each.

    ``masks`` [b, h, w] go with ``painted``, for painters whose mask is known only afterwards, such as edit models: what
    of a crop comes back, within the mask it was cut by. Where they are 0 the crop shows what the picture shows, so
    shift and tone are measured there. Masks of the crops serve every painting of them.

    Pixels whose stitch mask is 0 keep their bits. So do those that only depend on canvas pixels which came back within
    ``unchanged`` of what was cut, and where the whole mask did, nothing is done at all. Picture i's grain comes from
    ``options.seed`` + i.

    Raises InputError for crops that do not fit the record.
    """
    originals = record.originals(image)
    cut_from = originals if record.original is None else record.originals(None)
    paintings = _paintings(record, painted)
    results = originals.expand(record.count, -1, -1, -1).repeat(len(paintings), 1, 1, 1)
    reports = [list[str]() for _ in results]
    done, total = 0, len(paintings) * len(record.patches)
    kept = [[None] * len(record.patches)] if masks is None else _kept(record, masks)
    for number, crops in enumerate(paintings):
        for patch, crop, keep in zip(record.patches, crops, kept[number % len(kept)], strict=True):
            index = number * record.count + patch.picture
            seeded = replace(options, seed=(options.seed + index) % (MAX_SEED + 1))
            joined = _put_back(patch, crop.to(originals), keep, originals, cut_from, seeded, unchanged, results[index])
            reports[index].append(joined)
            done += 1
            if on_image is not None:
                on_image(done, total)
    lines = tuple(f"picture {index + 1}: {'; '.join(said)}" for index, said in enumerate(reports))
    notices = record.notices(originals)
    return Stitched(results, (*notices, *lines), notices)


def _paintings(record: CropRecord, painted: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each painting its crops [1, h, w, C] in the order of the record's patches."""
    batches = [as_batch(batch) for batch in painted]
    cut, came = len(record.patches), sum(map(len, batches))
    if len(batches) != len(record.batches):
        # joined or taken apart on the way; the order is all that is left
        batches = [batch[None] for several in batches for batch in several]
        sizes = [1] * cut
    else:
        sizes = list(record.batches)
    times = came // cut
    if [len(batch) for batch in batches] != [size * times for size in sizes] or times == 0:
        raise InputError(
            f"{cut} {'crop was' if cut == 1 else 'crops were'} cut and {came} came back; connect every painted crop,"
            " each as often as the others."
        )
    return [
        [batch[number * size + row, None] for batch, size in zip(batches, sizes, strict=True) for row in range(size)]
        for number in range(times)
    ]


def _kept(record: CropRecord, masks: Sequence[Tensor]) -> Sequence[Sequence[Tensor | None]]:
    """For each painting the masks [1, h, w] of its crops."""
    paintings = _paintings(record, [images.as_mask_batch(mask)[..., None] for mask in masks])
    return [[mask[..., 0] for mask in painting] for painting in paintings]


def _put_back(
    patch: Patch,
    crop: Tensor,
    keep: Tensor | None,
    originals: Tensor,
    cut_from: Tensor,
    options: StitchOptions,
    unchanged: float,
    result: Tensor,
) -> str:
    """Paste one painted crop [1, h, w, C], or what the mask ``keep`` [1, h, w] keeps of it, into its picture ``result``
    [H, W, C]; what happened.
    """
    crop = images.as_images(crop)
    _check_shape(images.size_of(crop), patch.plan.canvas)
    box = patch.plan.box
    mask, repainted = patch.stitch_mask().to(originals), torch.from_numpy(patch.repainted)[None].to(originals)
    if keep is not None:
        _check_shape(images.size_of(keep), patch.plan.canvas)
        back_mask = patch.plan.uncut_mask(keep.to(originals))
        mask, repainted = mask * back_mask, repainted * (back_mask > 0)
    if not mask.any():
        return "nothing is masked"
    original = images.as_images(_at(originals, patch.picture)[:, box.rows, box.columns])
    painted, opaque = crop[..., :3], crop[..., 3:]
    back = patch.plan.uncut(painted)
    if images.size_of(crop) == patch.plan.canvas:
        before = patch.plan.cut(_at(cut_from, patch.picture)[..., :3].to(painted))
        changed = patch.plan.changed(before, painted, unchanged) > 0
        if not (changed & (mask > 0)).any():
            return "the crop came back as it was cut"
        back = torch.where(changed[..., None], back, original[..., :3])
    if opaque.shape[-1]:
        mask = mask * patch.plan.uncut_mask(opaque[..., 0])
    joined = stitch(original, back, mask, options, repainted=repainted)
    place = result[box.rows, box.columns]
    place.copy_(torch.where(mask[0, ..., None] > 0, joined.images[0], place))
    return "; ".join(joined.reports) or f"{options.blend.value} stitch"


def _check_shape(came: Size, canvas: Size) -> None:
    """Raise InputError unless ``came`` is the canvas at some scale, to the rounding of a pixel."""
    if came == canvas:
        return
    for multiple in SAMPLER_MULTIPLES:
        if came == Size(canvas.width // multiple * multiple, canvas.height // multiple * multiple):
            raise InputError(
                f"A crop of {canvas} came back as {came}, with its border cut off to a multiple of {multiple}; set"
                f" multiple to {multiple} where the crop is made."
            )
    # some scale gives both sides
    across, down = ([(side - 1) / of, (side + 1) / of] for side, of in zip(came, canvas, strict=True))
    if max(across[0], down[0]) > min(across[1], down[1]):
        raise InputError(
            f"A crop of {canvas} came back as {came}, another aspect ratio; enlarge or reduce it evenly, without"
            " cropping or padding."
        )
