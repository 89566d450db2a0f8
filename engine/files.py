"""Pictures and masks on disk: read into the engine's tensors, written without ever losing a file.

What is read: PNG, JPEG, WebP, AVIF, GIF and BMP, the first frame of an animation, upright by the EXIF orientation,
CMYK and palettes as RGB, transparency as a fourth channel. What is written: PNG of 8 or 16 bits, lossless WebP, or JPEG
(quality 95, no chroma subsampling), with the parameters that made the picture as one JSON object: in the ``parameters``
text chunk of a PNG, in the EXIF UserComment of the other two. ``read_parameters`` gives them back.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import struct
import warnings
import zlib
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .images import to_bytes
from .types import MAX_PIXELS, MAX_SIDE, InputError

READABLE = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP")
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

COLOURED = 0.25
"""Difference between a pixel's largest and smallest channel from which it counts as coloured."""
COLOURED_SHARE = 0.02
"""A mask with more coloured pixels than this is a photograph, or painted in a colour whose luminance misleads."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)
"""What Pillow's decoders raise on damaged data."""
_USER_COMMENT_PREFIX = b"ASCII\0\0\0"
_JPEG_EXIF_LIMIT = 65000
_PNG_COLOUR_TYPE = {1: 0, 3: 2, 4: 6}
_PNG_FILTER_UP = 2
_PNG_EFFORT = 4
"""Of zlib's 9; the noise in the low bytes does not get smaller by more."""
_DEEP_COLOUR = ("RGB;16B", "RGBA;16B")
"""Pillow's names for the samples of a 16-bit PNG in colour, which it reads as 8 bits."""


class MaskChannel(str, Enum):
    """Where a mask file says what to repaint."""

    LUMINANCE = "luminance"
    """White = repaint. Where the file is transparent nothing is painted, so nothing is repainted."""
    ALPHA = "alpha"
    """Transparent = repaint, as in ComfyUI's mask editor and in the hosted edit APIs."""


def read_image(path: str | Path) -> Tensor:
    """The picture at ``path`` as float32 [1, H, W, 3], or [1, H, W, 4] when it has transparency; 0..1.

    PNG files of 16 bits keep their precision, except grey with an alpha channel.
    Raises InputError, naming the file, when it is missing, no picture, damaged, or larger than MAX_SIDE / MAX_PIXELS.
    """
    path = Path(path)
    pixels = _colour_array(_load(path))
    low = _low_bytes(_open(path))
    if low is not None:
        channels = low.shape[-1]
        pixels[..., :channels] = (np.rint(pixels[..., :channels] * 255) * 256 + low) / 65535
    return torch.from_numpy(pixels)[None]


def read_mask(path: str | Path, channel: MaskChannel = MaskChannel.LUMINANCE) -> Tensor:
    """The mask at ``path`` as float32 [1, H, W] in 0..1, 1 = repaint.

    By luminance (ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B) a fully opaque alpha channel changes nothing. Raises
    InputError as ``read_image`` does, for a colour picture read by luminance, and for one without transparency read
    by alpha.
    """
    path = Path(path)
    pixels = _colour_array(_load(path))
    alpha = pixels[..., 3] if pixels.shape[-1] == 4 else np.ones(pixels.shape[:2], np.float32)
    if channel is MaskChannel.ALPHA:
        if alpha.min() == 1:
            raise InputError(f"{path} has no transparent pixels; erase what to change, or use a white-on-black mask.")
        return torch.from_numpy(1 - alpha)[None]
    colour = pixels[..., :3]
    share = float(((np.ptp(colour, axis=-1) * alpha) > COLOURED).mean())
    if share > COLOURED_SHARE:
        raise InputError(
            f"{path} is a colour picture ({share:.0%} of it is coloured), not a mask: the image comes first, then the"
            " mask, which is white where the picture may change and black elsewhere."
        )
    luminance = colour @ np.array([0.299, 0.587, 0.114], np.float32)
    # the three weights add up to 1 only to rounding; grey must stay exactly itself
    grey = colour.max(-1) == colour.min(-1)
    return torch.from_numpy(np.where(grey, colour[..., 0], luminance) * alpha)[None]


def read_profile(path: str | Path) -> bytes | None:
    """The ICC profile of an RGB picture, to be passed to ``write_image`` so that its colours keep their meaning."""
    profile = _open(Path(path)).info.get("icc_profile")
    # bytes 16..20 of the header name the colour space; a CMYK or grey profile would be wrong for what we write
    return profile if profile and profile[16:20] == b"RGB " else None


def read_bits(path: str | Path) -> int:
    """How many bits ``read_image`` gets from each channel of a file: 16 or 8; to be passed to ``write_image``."""
    picture = _open(Path(path))
    return 16 if picture.mode.startswith("I") or _sample_order(picture) in _DEEP_COLOUR else 8


def numbered(path: str | Path, count: int) -> list[Path]:
    """Where ``count`` pictures go: ``out.png`` for one, ``out-1.png``, ``out-2.png``, ... for more."""
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, count + 1)]


def check_outputs(
    pictures: Iterable[Path], *, others: Iterable[Path] = (), inputs: Iterable[Path] = (), force: bool = False
) -> None:
    """Raise the InputError that writing ``pictures`` and ``others``, files of any format, would end in, before the work
    is done rather than after.

    An existing file is refused unless ``force``; a file of ``inputs``, or one named twice, is refused always.
    """
    pictures = list(pictures)
    for path in pictures:
        _format_of(path)
    sources = {path.resolve() for path in inputs}
    seen: set[Path] = set()
    for path in [*pictures, *others]:
        if path.resolve() in seen:
            raise InputError(f"{path} is named twice; give each result a name of its own.")
        seen.add(path.resolve())
        if path.resolve() in sources:
            raise InputError(f"{path} is also an input; write to another name, so that the original is kept.")
        if path.is_dir():
            raise InputError(f"{path} is a folder; add a file name such as {path / 'out.png'}.")
        if path.exists() and not force:
            raise _taken(path)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{path} cannot be written: {folder} is no folder that you may write to.")


def write_image(
    path: str | Path,
    image: Tensor,
    parameters: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    profile: bytes | None = None,
    bits: int = 8,
) -> Path:
    """Write [H, W, C] or [1, H, W, C] (C = 1, 3 or 4; 0..1) in the format of the suffix, rounded to the nearest of
    256 levels, or of 65536 where ``bits`` is 16 and the format PNG, and return the path.

    The file appears complete or not at all, missing folders are made, and an existing file is replaced only with
    ``force``. Raises InputError for an unknown suffix, transparency in a JPEG, values that are not finite, and what
    the file system refuses.
    """
    path = Path(path)
    pixels = _pixels(path, image)
    if bits == 16 and _format_of(path) == "PNG":
        encoded = _encode_deep(pixels, dict(parameters or {}), profile)
    else:
        encoded = _encode(_picture(path, pixels), _format_of(path), dict(parameters or {}), profile)
    # beside the target, so that the rename stays within one file system
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(encoded)
            _publish(temporary, path, force)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The parameters that ``write_image`` stored; {} for a picture that carries none of ours."""
    picture = _open(Path(path))
    if picture.format == "PNG":
        picture.load()  # text chunks may follow the pixels
        text = getattr(picture, "text", {}).get("parameters", "")
    else:
        comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        comment = comment.encode("latin-1", "replace") if isinstance(comment, str) else comment
        text = comment.removeprefix(_USER_COMMENT_PREFIX).decode("ascii", "replace")
    try:
        parameters = json.loads(text)
    except json.JSONDecodeError:  # another program's parameters
        return {}
    return parameters if isinstance(parameters, dict) else {}


def _open(path: Path) -> ImageFile.ImageFile:
    """The file with its header read, within the limits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the limit here
            picture = Image.open(path, formats=READABLE)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}; check the name and the folder.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; name one picture in it.") from error
    except PermissionError as error:
        raise InputError(f"{path} may not be read; check its permissions.") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path} is not a picture that can be read; give a PNG, JPEG, WebP, AVIF, GIF or BMP file."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is larger than {MAX_PIXELS // 10**6} megapixels; scale it down first.") from error
    except _BROKEN as error:
        raise InputError(f"{path} is damaged ({error}); export it again.") from error
    if max(picture.size) > MAX_SIDE or picture.width * picture.height > MAX_PIXELS:
        raise InputError(
            f"{path} is {picture.width}x{picture.height}; at most {MAX_SIDE} pixels a side and"
            f" {MAX_PIXELS // 10**6} megapixels can be worked on, so scale it down first."
        )
    return picture


def _load(path: Path) -> Image.Image:
    """The first frame, decoded and upright."""
    picture = _open(path)
    try:
        picture.load()
        if picture.mode == "CMYK":
            return _cmyk_to_rgb(ImageOps.exif_transpose(picture), picture.info.get("icc_profile"))
        return ImageOps.exif_transpose(picture)
    except _BROKEN as error:
        raise InputError(f"{path} is damaged ({error}); export it again.") from error


def _low_bytes(picture: ImageFile.ImageFile) -> np.ndarray | None:
    """The second byte of each channel of a colour PNG of 16 bits, upright [H, W, 3 or 4]; None for other files.

    Pillow keeps the first byte alone; told that the bytes are the other way round, it keeps the second.
    """
    order = _sample_order(picture)
    if order not in _DEEP_COLOUR:
        return None
    codec, extents, offset, _ = picture.tile[0]
    picture.tile = [(codec, extents, offset, order.replace("16B", "16L"))]  # type: ignore[list-item]
    return np.asarray(ImageOps.exif_transpose(picture)).astype(np.float32)


def _sample_order(picture: ImageFile.ImageFile) -> str:
    """How the samples of a PNG lie in the file, in Pillow's words; "" for other files."""
    return str(picture.tile[0][3]) if picture.format == "PNG" and picture.tile else ""


def _cmyk_to_rgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """By the picture's own profile where it has a usable one: the plain conversion turns print colours neon."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted
    return picture.convert("RGB")


def _colour_array(picture: Image.Image) -> np.ndarray:
    """float32 [H, W, 3 or 4], 0..1."""
    if picture.mode.startswith("I"):  # 16-bit grey
        levels = np.asarray(picture)
        channels = [levels.astype(np.float32) / 65535] * 3
        if (transparent := picture.info.get("transparency")) is not None:
            channels.append((levels != transparent).astype(np.float32))
        return np.stack(channels, axis=-1)
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    return np.asarray(picture.convert(mode)).astype(np.float32) / 255


def _format_of(path: Path) -> str:
    try:
        return WRITABLE[path.suffix.lower()]
    except KeyError:
        raise InputError(
            f"{path.name or 'The output'} has the ending {path.suffix or '(none)'}; name a .png, .jpg or .webp file."
        ) from None


def _pixels(path: Path, image: Tensor) -> Tensor:
    """[H, W, 1, 3 or 4], finite."""
    pixels = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
        raise InputError(f"A picture of shape {tuple(image.shape)} cannot be written; give [height, width, channels].")
    if not torch.isfinite(pixels).all():
        raise InputError(f"{path} was not written: the picture holds NaN values; try --dtype float32.")
    return pixels


def _picture(path: Path, pixels: Tensor) -> Image.Image:
    levels = to_bytes(pixels)
    if levels.shape[-1] == 4 and _format_of(path) == "JPEG":
        if levels[..., 3].min() < 255:
            raise InputError(f"{path} cannot hold transparency; name a .png or .webp file.")
        levels = levels[..., :3]
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def _encode(picture: Image.Image, kind: str, parameters: dict[str, Any], profile: bytes | None) -> bytes:
    options: dict[str, Any] = {"icc_profile": profile} if profile and picture.mode != "L" else {}
    if kind == "PNG":
        if parameters:
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text("parameters", json.dumps(parameters, ensure_ascii=False))
            options["pnginfo"] = chunks
    else:
        exif = _exif(parameters) if parameters else b""
        if kind == "WEBP" or len(exif) <= _JPEG_EXIF_LIMIT:
            options["exif"] = exif
        # exact: otherwise the colours under full transparency change
        options |= {"lossless": True, "exact": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0}
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _encode_deep(pixels: Tensor, parameters: dict[str, Any], profile: bytes | None) -> bytes:
    """A PNG of 16 bits a channel, which Pillow writes in grey alone; each row as its difference from the one above."""
    levels = np.rint(pixels.detach().float().cpu().clamp(0, 1).numpy() * np.float32(65535)).astype(">u2")
    height, width, channels = levels.shape
    samples = levels.view(np.uint8).reshape(height, -1)
    rows = np.full((height, 1 + samples.shape[1]), _PNG_FILTER_UP, np.uint8)
    rows[:, 1:] = np.diff(samples, axis=0, prepend=np.zeros_like(samples[:1]))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR_TYPE[channels], 0, 0, 0))]
    if profile and channels > 1:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
    if parameters:
        chunks.append((b"tEXt", b"parameters\0" + json.dumps(parameters).encode("ascii")))
    chunks += [(b"IDAT", zlib.compress(rows.tobytes(), _PNG_EFFORT)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _exif(parameters: dict[str, Any]) -> bytes:
    exif = Image.Exif()
    comment = _USER_COMMENT_PREFIX + json.dumps(parameters).encode("ascii")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def _publish(temporary: Path, path: Path, force: bool) -> None:
    """Give the finished file its name."""
    if force:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, fails when the name is taken
    except OSError as error:
        if path.exists():
            raise _taken(path) from error
        temporary.replace(path)  # a file system without hard links


def _taken(path: Path) -> InputError:
    return InputError(f"{path} exists already; choose another name, or add --force to replace it.")
