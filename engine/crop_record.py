"""What a crop has to remember to be put back, in memory and on disk.

On disk a record is one JSON file and 16-bit PNG masks beside it. It holds no picture: whoever stitches brings the
original again, and a digest of what lies outside the masks tells whether it is the same.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .crop import CropPlan, Outside
from .fill import FillMethod
from .images import as_images, check_tensor, size_of, to_bytes
from .outpaint import Padding
from .types import MAX_PIXELS, MAX_SIDE, Box, InputError, Size, check_area

FORMAT, VERSION = "mend-crop", 1
FILE_NAME = "record.json"
"""What a record that is saved to a folder is called in it."""
LEVELS = 65535
"""Stitch masks have the levels of a 16-bit PNG from the start, so that saving them changes nothing."""
MAX_PATCHES = 100_000
MAX_BYTES = 64 * 2**20
"""Of a record's JSON."""

Levels = npt.NDArray[np.uint16]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Patch:
    """One crop of one picture, and what of it comes back."""

    picture: int
    """Which picture of the result it belongs to."""
    plan: CropPlan
    mask: Levels
    """The stitch mask, [box height, box width]; LEVELS = 1."""
    repainted: Flags
    """[box height, box width]: where the sampler was free to change the picture."""

    def stitch_mask(self) -> Tensor:
        """float32 [1, box height, box width], 0..1."""
        return torch.from_numpy(self.mask.astype(np.float32) / np.float32(LEVELS))[None]


@dataclass(frozen=True, eq=False)
class CropRecord:
    """Everything ``stitch_crops`` needs besides the painted crops."""

    size: Size
    """Of each picture."""
    count: int
    """How many pictures come out, for one painting of each crop."""
    patches: tuple[Patch, ...]
    """In the order in which their crops go out."""
    batches: tuple[int, ...]
    """How many crops travel together as one batch; in sum all of them."""
    original: Tensor | None = field(default=None, repr=False)
    """The pictures, [count or 1, H, W, C]; not on disk."""
    digests: tuple[str, ...] = ()
    """Of each picture outside its masks; from disk."""

    def originals(self, image: Tensor | None) -> Tensor:
        """The pictures to stitch into, [count or 1, H, W, C]: ``image``, else the ones that were cut.

        Raises InputError when there are none, or they do not fit.
        """
        if image is None:
            if self.original is None:
                raise InputError(
                    "A crop record from disk holds no picture; connect the original image that the crop was cut from."
                )
            return as_batch(self.original)
        pictures = as_batch(image)
        if size_of(pictures) != self.size:
            raise InputError(
                f"The crop was cut from a picture of {self.size}, but the original is {size_of(pictures)}; connect the"
                " picture that the crop was cut from."
            )
        if pictures.shape[0] not in (1, self.count):
            raise InputError(
                f"The crop record is for {self.count} pictures, but there are {pictures.shape[0]} originals; connect"
                " the batch that was cut."
            )
        return pictures

    def notices(self, pictures: Tensor) -> tuple[str, ...]:
        """A sentence when the pictures [count or 1, H, W, C] are not those that a record from disk was made of."""
        if not self.digests:
            return ()
        pictures = pictures.expand(self.count, -1, -1, -1)
        other = [n for n, digest in enumerate(self.digests) if _digest(pictures[n], self._of(n)) != digest]
        if not other:
            return ()
        which = "The original is" if self.count == 1 else f"{len(other)} of the {self.count} originals are"
        return (f"{which} not what was cut, as pixels outside the mask show; check that it is the same picture.",)

    def _of(self, picture: int) -> list[Patch]:
        return [patch for patch in self.patches if patch.picture == picture]


def as_batch(image: Tensor) -> Tensor:
    """``as_images`` of a batch too large to look at all at once: its shape, without checking every value."""
    check_tensor("image", image)
    batch = image[None] if image.ndim == 3 else image
    first = as_images(batch[:1])
    return batch.to(first.dtype).expand(-1, -1, -1, first.shape[-1])


def levels_of(mask: Tensor) -> Levels:
    """0..1 in any shape -> the nearest of the 16-bit levels."""
    rounded: Levels = np.rint(mask.detach().cpu().numpy().astype(np.float64) * LEVELS).astype(np.uint16)
    return rounded


def _digest(picture: Tensor, patches: list[Patch]) -> str:
    """SHA-256 of a picture [H, W, C] at 256 levels, black where something is pasted; alpha does not count."""
    pixels = to_bytes(picture[..., :3])
    for patch in patches:
        pixels[patch.plan.box.rows, patch.plan.box.columns][patch.mask > 0] = 0
    return hashlib.sha256(pixels.tobytes()).hexdigest()


# --- to disk


def record_file(path: str | Path) -> Path:
    """The JSON file of a record at ``path``: itself where it ends in .json or is a file, else FILE_NAME in it."""
    path = Path(path)
    return path if path.suffix.lower() == ".json" or path.is_file() else path / FILE_NAME


def files_of(record: CropRecord, path: str | Path) -> list[Path]:
    """What ``save`` would write: the JSON file, then the masks, of which several crops may share one."""
    file = record_file(path)
    names: dict[int, str] = {}
    for array, name in _arrays(record, file.stem):
        names.setdefault(id(array), name)
    return [file, *(file.with_name(name) for name in names.values())]


def save(record: CropRecord, path: str | Path, *, force: bool = False) -> Path:
    """Write the record to a .json file or into a folder, its masks beside it, and return the JSON file.

    Missing folders are made. The JSON appears last and complete. Existing files are replaced only with ``force``.
    Raises InputError for them, and for what the file system refuses.
    """
    file = record_file(path)
    written: list[Path] = []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not force:
            raise FileExistsError(file)
        names: dict[int, str] = {}
        for array, name in _arrays(record, file.stem):
            if id(array) not in names:
                with file.with_name(name).open("wb" if force else "xb") as target:
                    written.append(file.with_name(name))
                    Image.fromarray(array).save(target, "PNG")
                names[id(array)] = name
        content = json.dumps(_as_json(record, names), indent=1)
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
        written.append(temporary)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(file)
    except FileExistsError as error:
        _remove(written)
        raise InputError(f"{file} or one of its masks exists already; choose another name.") from error
    except OSError as error:
        _remove(written)
        raise InputError(f"{file} cannot be written: {error.strerror or error}.") from error
    return file


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _arrays(record: CropRecord, stem: str) -> Iterator[tuple[Levels | Flags, str]]:
    """The masks and the name each would get; several patches may share one."""
    for number, patch in enumerate(record.patches, start=1):
        yield patch.mask, f"{stem}-mask-{number}.png"
        yield patch.repainted, f"{stem}-repainted-{number}.png"


def _as_json(record: CropRecord, names: dict[int, str]) -> dict[str, Any]:
    digests = record.digests
    if not digests and record.original is not None:
        pictures = record.originals(None).expand(record.count, -1, -1, -1)
        digests = tuple(_digest(pictures[n], record._of(n)) for n in range(record.count))
    return {
        "format": FORMAT,
        "version": VERSION,
        "size": record.size,
        "count": record.count,
        "digests": digests,
        "batches": record.batches,
        "patches": [
            {
                "picture": patch.picture,
                "box": patch.plan.box,
                "scaled": patch.plan.scaled,
                "canvas": patch.plan.canvas,
                "outside": None if patch.plan.outside is None else _outside_as_json(patch.plan.outside),
                "mask": names[id(patch.mask)],
                "repainted": names[id(patch.repainted)],
            }
            for patch in record.patches
        ],
    }


def _outside_as_json(outside: Outside) -> dict[str, Any]:
    sides = outside.padding
    return {
        "padding": (sides.left, sides.top, sides.right, sides.bottom),
        "fill": outside.fill.value,
        "masked": outside.masked,
    }


# --- from disk


def load(path: str | Path) -> CropRecord:
    """The record that ``save`` wrote to ``path``, a .json file or a folder.

    Everything is checked, as the files may come from anywhere: only plain numbers and PNG masks of the sizes they must
    have are read, and only from the record's own folder. Raises InputError that names the file and what is wrong.
    """
    file = record_file(path)
    content = _read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{file} is no crop record; choose a file that was saved as one.")
    if content.get("version") != VERSION:
        raise InputError(
            f"{file} is a crop record of version {content.get('version')}, and this is made for version {VERSION};"
            " update the pack, or cut again."
        )
    try:
        return _Reader(file.parent).record(content)
    except (KeyError, TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{file} is damaged ({what}); cut and save again.") from error


def _read_json(file: Path) -> Any:
    content = _read(file)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no crop record: it does not hold JSON.") from error


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError(f"{file} is no crop record: it is larger than {MAX_BYTES // 2**20} MB.")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"There is no crop record {file}; check the name and the folder.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error


class _Reader:
    """Parsed JSON -> CropRecord; raises ValueError, TypeError or KeyError where it is not as ``save`` writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.masks: dict[str, npt.NDArray[Any]] = {}

    def record(self, content: dict[str, Any]) -> CropRecord:
        size = Size(*self.numbers(content["size"], 2, low=1, high=MAX_SIDE))
        (count,) = self.numbers([content["count"]], 1, low=1, high=MAX_PATCHES)
        entries = content["patches"]
        if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_PATCHES:
            raise ValueError("its patches are no list of crops")
        patches = tuple(self.patch(entry, size, count) for entry in entries)
        batches = tuple(self.numbers(content["batches"], None, low=1, high=MAX_PATCHES))
        if sum(batches) != len(patches):
            raise ValueError(f"its batches have {sum(batches)} crops and {len(patches)} are listed")
        digests = content["digests"]
        if not isinstance(digests, list) or len(digests) not in (0, count) or not all(map(_is_text, digests)):
            raise ValueError("its digests do not match its pictures")
        return CropRecord(size, count, patches, batches, digests=tuple(digests))

    def patch(self, entry: dict[str, Any], picture: Size, count: int) -> Patch:
        (number,) = self.numbers([entry["picture"]], 1, low=0, high=count - 1)
        box = Box(*self.numbers(entry["box"], 4, low=0, high=MAX_SIDE))
        if not (box.left < box.right <= picture.width and box.top < box.bottom <= picture.height):
            raise ValueError(f"the box {tuple(box)} is not inside a picture of {picture}")
        scaled = Size(*self.numbers(entry["scaled"], 2, low=1, high=MAX_SIDE))
        canvas = Size(*self.numbers(entry["canvas"], 2, low=1, high=MAX_SIDE))
        if scaled.width > canvas.width or scaled.height > canvas.height or canvas.width * canvas.height > MAX_PIXELS:
            raise ValueError(f"a crop of {scaled} does not lie on a canvas of {canvas}")
        plan = CropPlan(box, scaled, canvas, self.outside(entry["outside"]))
        check_area(plan.extent)
        mask = self.mask(entry["mask"], box.size, np.uint16)
        return Patch(number, plan, mask, self.mask(entry["repainted"], box.size, np.bool_))

    def outside(self, entry: Any) -> Outside | None:
        if entry is None:
            return None
        padding = Padding(*self.numbers(entry["padding"], 4, low=0, high=MAX_SIDE))
        if not isinstance(entry["masked"], bool):
            raise ValueError("masked is neither true nor false")
        return Outside(padding, FillMethod(entry["fill"]), entry["masked"])

    def mask(self, name: Any, size: Size, kind: type[np.generic]) -> npt.NDArray[Any]:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".png"):
            raise ValueError(f"{name!r} is no mask file beside the record")
        if name not in self.masks:
            with Image.open(self.folder / name, formats=("PNG",)) as stored:
                if stored.size != tuple(size):
                    raise ValueError(f"{name} is {stored.width}x{stored.height} instead of {size}")
                self.masks[name] = np.array(stored)
        array = self.masks[name]
        if kind is np.uint16 and array.dtype == np.int32:  # how older versions of Pillow hold 16 bits
            array = self.masks[name] = array.astype(np.uint16)
        if array.shape != (size.height, size.width) or array.dtype != kind:
            raise ValueError(f"{name} is no mask of {size} with the right depth")
        return array

    @staticmethod
    def numbers(values: Any, count: int | None, low: int, high: int) -> list[int]:
        if not isinstance(values, list) or (count is not None and len(values) != count):
            raise ValueError(f"{values!r} is no list of {'numbers' if count is None else f'{count} numbers'}")
        for value in values:
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{value!r} is no whole number from {low} to {high}")
        return values


def _is_text(value: object) -> bool:
    return isinstance(value, str)
