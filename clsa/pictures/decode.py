"""Decodes the bytes of one picture to uint8 RGB: formats, limits, and reason codes of failures."""

import contextlib
import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from jaxtyping import Bool, Num, UInt8
from PIL import Image, ImageCms, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000")
MAX_PIXELS = 64_000_000

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")
_SIGNATURES += (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_OTHERS = {  # formats that are not read, by their first bytes
    **{b"8BPS": "Photoshop", b"\0\0\1\0": "ICO", b"\0\0\2\0": "CUR", b"icns": "ICNS"},
    **{b"DDS ": "DDS", b"\x76\x2f\x31\x01": "OpenEXR", b"#?RADIANCE": "Radiance"},
    **{b"SIMPLE  =": "FITS", b"\x89HDF": "HDF5", b"qoif": "QOI", b"<svg": "SVG"},
    **{b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"II+\0": "BigTIFF"},
    **{b"P1\n": "PBM", b"P2\n": "PGM", b"P3\n": "PPM", b"P4\n": "PBM", b"P5\n": "PGM"},
    **{b"P6\n": "PPM", b"\x1aE\xdf\xa3": "Matroska or WebM"},
}
_BRANDS = {  # of the ISO container that HEIC, AVIF and MP4 share
    **{b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"},
    **{b"isom": "MP4", b"iso2": "MP4", b"mp41": "MP4", b"mp42": "MP4", b"qt  ": "QuickTime"},
}
_ORIENTATION = 0x0112
_NO_DATA = (-9999.0, -99999.0, -32768.0)  # what maps write where nothing was measured
_NO_DATA_FROM = 1e30  # and any value of this size: the ends of float32 are in use, too
_GDAL_NO_DATA = 42113  # TIFF tag: the file's own name for such values
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples per pixel, by colour type
_ADAM7 = (  # the passes of an interlaced PNG: left, top, step across, step down
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)

# Failures are reported as reasons. The filter stays, since `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DecodeError(Exception):
    """A picture that cannot be used.

    Args:
        reason: empty, not-an-image, truncated, too-large, unsupported or broken;
            unreadable if a source cannot open the file at all.
        detail: the cause in a few words.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """An opened picture. A JPEG is not decoded yet.

    Attributes:
        height, width: upright size in pixels; the boxes of crops are drawn on this size.
        held: bytes of memory that this object occupies.
    """

    height: int
    width: int
    held: int
    decode: Callable[[int], UInt8[np.ndarray, "h w 3"]]

    def pixels(self, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels, writable; a JPEG at 1 / `reduction` of its size.

        Args:
            reduction: 1, 2, 4 or 8, done in the inverse DCT, which saves most of the decoding.
                Pictures that cannot be reduced come at full size: check the shape.

        Raises:
            DecodeError: if the pixels of a JPEG cannot be decoded.
        """
        return self.decode(reduction)

    @staticmethod
    def of(pixels: UInt8[np.ndarray, "H W 3"]) -> "Picture":
        """Wrap pixels that are already decoded."""
        height, width, _ = pixels.shape
        return Picture(height, width, pixels.nbytes, lambda _: pixels)


ValueRange = tuple[float, float]
"""The values that become black and white, for gray pictures of more than 8 bits."""


def decode(data: bytes, value_range: ValueRange | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """The first frame of an encoded picture, upright and in RGB.

    Reads JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF and JPEG 2000, whatever the file is called. Applies
    EXIF orientation; lays transparent parts over white. Gray of 16 or 32 bits is scaled from
    `value_range` if given. If not, 16 bits are scaled from 0..65535, and 32 bits from the smallest
    of the ranges 0..1, 0..255 and 0..65535 that contains the picture, or else from its own range.
    No-data values of 32-bit pictures (not finite, -9999, -99999, -32768, over 1e30 in size, or as
    the TIFF names it) do not count in that range and become black. Pillow reads colour of 16 bits
    as 8 bits. Colour profiles are not applied. The result is writable.

    Raises:
        DecodeError: with a reason. A picture over 64 million pixels is too-large and is refused
            before decoding.
    """
    return open_picture(data, value_range).pixels()


def open_picture(data: bytes, value_range: ValueRange | None = None) -> Picture:
    """The first half of `decode`: gives the size of a JPEG before it is decoded.

    libjpeg-turbo, through simplejpeg, decodes JPEGs in gray, RGB or YCbCr. Pillow decodes other
    formats and every JPEG that simplejpeg refuses or warns about. Both give the same pixels.

    Raises:
        DecodeError: as `decode`, except for JPEG damage that shows only in decoding.
    """
    if not data:
        raise DecodeError("empty")
    size = _jpeg_size(data)
    if size is None:
        return Picture.of(_decode(data, value_range))
    _require_limit(*size)
    orientation = _jpeg_orientation(data)
    height, width = size[::-1] if orientation in (5, 6, 7, 8) else size
    return Picture(height, width, len(data), functools.partial(_jpeg, data, size, orientation))


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Stored height and width of a JPEG; None if Pillow has to read the picture."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (int(height), int(width)) if space in ("YCbCr", "Gray", "RGB") else None


def _jpeg_orientation(data: bytes) -> int:
    if not _may_be_turned(data):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except Exception:  # Pillow raises nearly anything; see `_decode`
        return 1


def _may_be_turned(data: bytes) -> bool:
    """Whether a JPEG has an APP1 segment (Exif or XMP) before its pixels, or an odd structure."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        if data[place + 1] == 0xDA:
            return False
        if data[place + 1] == 0xE1:
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True


def _jpeg(
    data: bytes, size: tuple[int, int], orientation: int, reduction: int
) -> UInt8[np.ndarray, "h w 3"]:
    least = [-(-side // reduction) for side in size] if reduction > 1 else [0, 0]
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except ValueError:
        return _decode(data)
    return np.ascontiguousarray(_upright(pixels, orientation))


def _decode(data: bytes, value_range: ValueRange | None = None) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _require_limit(image.height, image.width)
            image.load()
            if image.format == "PNG" and _lacks_rows(image, data):
                raise DecodeError("truncated", "rows are missing")
            return np.ascontiguousarray(_upright(_rgb(image, value_range), _orientation(image)))
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecodeError("too-large", "over the limit of 64 MP") from None
    except Exception as error:  # Pillow's readers raise nearly anything on hostile bytes
        raise _reason(error, data) from error


def _require_limit(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError("too-large", f"{height * width / 1e6:.1f} MP > limit 64 MP")


def _reason(error: Exception, data: bytes) -> DecodeError:
    detail = str(error).split(" <")[0]  # without the address of a BytesIO
    cut_webp = data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data)
    if cut_webp or "truncated" in detail.lower():
        return DecodeError("truncated", detail)
    if other := _other_format(data):
        return DecodeError("unsupported", f"{other} is not read")
    if not data.startswith(_SIGNATURES) and data[4:12] not in (b"ftypavif", b"ftypavis"):
        return DecodeError("not-an-image")
    if isinstance(error, UnidentifiedImageError) and data.startswith((b"II*\0", b"MM\0*")):
        return DecodeError("unsupported", "this kind of TIFF is not supported")
    return DecodeError("broken", detail)


def _other_format(data: bytes) -> str:
    """The name of a known format that is not read; an empty string for any other bytes."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "")
    return next((name for head, name in _OTHERS.items() if data.startswith(head)), "")


def _lacks_rows(image: Image.Image, data: bytes) -> bool:
    """Whether a loaded PNG has fewer rows than it declares; Pillow silently leaves those black.

    Missing rows are zeros at the end. So a last row with other values settles most pictures without
    inflating them a second time.
    """
    bits, colour, _, _, interlaced = struct.unpack_from(">5B", data, 24)
    if not interlaced and np.asarray(image.crop((0, image.height - 1, *image.size))).any():
        return False
    expected = 0
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = (-((left - image.width) // across), -((top - image.height) // down))
        row_bytes = 1 + (columns * bits * _PNG_SAMPLES[colour] + 7) // 8
        expected += row_bytes * rows if columns > 0 and rows > 0 else 0
    inflate, position, inflated = zlib.decompressobj(), 8, 0
    while position + 8 <= len(data) and inflated < expected:
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        position += 12 + length
        while chunk and inflated < expected and not inflate.eof:
            inflated += len(inflate.decompress(chunk, 1 << 20))
            chunk = inflate.unconsumed_tail
    return inflated < expected


def _rgb(image: Image.Image, value_range: ValueRange | None) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image), value_range or (0.0, 65535.0))
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        known = _known(image, values)
        return _gray(np.where(known, values, -np.inf), value_range or _own_range(values[known]))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return np.array(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return np.array(white)
    return np.array(image.convert("RGB"))


def _known(image: Image.Image, values: Num[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Which pixels hold a measured value."""
    none = list(_NO_DATA)
    with contextlib.suppress(AttributeError, ValueError):  # no TIFF, no such tag, no number
        none.append(float(str(image.tag_v2.get(_GDAL_NO_DATA, "")).strip(" \0")))  # pyright: ignore[reportAttributeAccessIssue]
    return (np.abs(values) < _NO_DATA_FROM) & ~np.isin(values, none)


def _own_range(values: Num[np.ndarray, " n"]) -> ValueRange:
    """The range that a 32-bit picture is scaled from if none is given."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if low < 0 or high > 65535:
        return low, high
    return 0.0, next(top for top in (1.0, 255.0, 65535.0) if high <= top)


def _gray(values: Num[np.ndarray, "H W"], value_range: ValueRange) -> UInt8[np.ndarray, "H W 3"]:
    low, high = value_range
    clipped = np.clip(values.astype(np.float64), low, high) - low
    scaled = np.rint(clipped * (255.0 / ((high - low) or 1.0))).astype(np.uint8)
    return np.repeat(scaled[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or the EXIF block is broken."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _upright(pixels: UInt8[np.ndarray, "H W 3"], orientation: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
