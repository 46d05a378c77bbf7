"""Decoding of every kind of picture, compared with the stored arrays and with Pillow."""

import io
import struct
import tarfile
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from clsa.pictures.decode import DecodeError, decode, open_picture
from clsa.pictures.named_sets import CLIPART
from tests.support.pictures import encoded, photograph

RGB = photograph(0, 40, 56)
GRAY = RGB[..., 0]


def reason(data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data)
    return caught.value.reason


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return rgb * share + 255 * (1 - share)


def difference(data: bytes, expected: np.ndarray) -> float:
    got = decode(data)
    assert got.dtype == np.uint8 and got.shape == expected.shape and got.flags.writeable
    return float(np.abs(got.astype(np.float64) - expected).max())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, idat: bytes, colour: int = 2, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, interlaced)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", idat) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 98, "subsampling": 0}, 9),
    ],
)
def test_formats_keep_their_pixels(kind: str, options: dict, tolerance: int) -> None:
    assert difference(encoded(RGB, kind, **options), RGB) <= tolerance


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_equal_pillow_to_the_bit(subsampling: int, progressive: bool) -> None:
    for seed, (height, width) in enumerate([(61, 83), (64, 48), (1, 7), (130, 33)]):
        options = {"quality": 80, "subsampling": subsampling, "progressive": progressive}
        data = encoded(photograph(seed, height, width), "JPEG", **options)
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(decode(data), np.asarray(image))
    gray = encoded(photograph(9, 61, 83)[..., 0], "JPEG", quality=80)
    with Image.open(io.BytesIO(gray)) as image:
        np.testing.assert_array_equal(decode(gray), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_the_picture_made_smaller(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(4, 200, 312), "JPEG", quality=95, exif=exif)
    picture = open_picture(data)
    whole = picture.pixels()
    assert whole.shape[:2] == (picture.height, picture.width)
    for reduction in (2, 4, 8):
        reduced = picture.pixels(reduction)
        sides = [-(-side // reduction) for side in (picture.height, picture.width)]
        assert list(reduced.shape[:2]) == sides and reduced.flags.writeable
        small = Image.fromarray(whole).resize((sides[1], sides[0]), Image.Resampling.BOX)
        assert np.abs(reduced - np.asarray(small, dtype=float)).mean() < 2


def test_other_formats_are_never_reduced() -> None:
    image = photograph(5, 40, 60)
    np.testing.assert_array_equal(open_picture(encoded(image)).pixels(8), image)


def test_a_truncated_jpeg_opens_but_does_not_decode() -> None:
    data = encoded(photograph(0, 90, 120), "JPEG")
    opened = open_picture(data[: len(data) // 2])
    assert (opened.height, opened.width) == (90, 120)
    with pytest.raises(DecodeError, match="truncated"):
        opened.pixels()


def test_embedded_drawings_equal_pillow() -> None:
    with tarfile.open(CLIPART) as tar:
        for _, member in zip(range(20), tar, strict=False):
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            np.testing.assert_array_equal(decode(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_gray_becomes_three_equal_channels() -> None:
    assert difference(encoded(GRAY), np.stack([GRAY] * 3, 2)) == 0


def test_one_bit_is_black_and_white() -> None:
    bits = GRAY > 128
    assert difference(encoded(Image.fromarray(bits)), np.stack([bits * 255] * 3, 2)) == 0


def test_transparency_is_laid_over_white() -> None:
    alpha = np.linspace(0, 255, GRAY.size).reshape(GRAY.shape).astype(np.uint8)
    rgba = np.dstack([RGB, alpha])
    assert difference(encoded(rgba), over_white(RGB, alpha)) <= 1
    assert difference(encoded(rgba, "WEBP", lossless=True, exact=True), over_white(RGB, alpha)) <= 1
    la = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(alpha)])
    assert difference(encoded(la), over_white(np.stack([GRAY] * 3, 2), alpha)) <= 1


def test_palette_with_and_without_transparency() -> None:
    indices = (np.arange(40 * 56).reshape(40, 56) % 4).astype(np.uint8)
    colours = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200], [90, 90, 90]], np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    assert difference(encoded(image), colours[indices]) == 0
    alphas = np.array([0, 128, 255, 255], np.uint8)
    expected = over_white(colours[indices], alphas[indices])
    assert difference(encoded(image, transparency=alphas.tobytes()), expected) <= 1
    expected = over_white(colours[indices], np.array([255, 0, 255, 255])[indices])
    assert difference(encoded(image, "GIF", transparency=1), expected) == 0


def test_a_transparent_colour_is_laid_over_white() -> None:
    rgb = RGB.copy()
    rgb[:10] = (1, 2, 3)
    expected = np.where((rgb == (1, 2, 3)).all(2, keepdims=True), 255, rgb)
    assert difference(encoded(rgb, transparency=(1, 2, 3)), expected) == 0


def test_cmyk_is_not_inverted() -> None:
    image = Image.fromarray(RGB).convert("CMYK")
    assert difference(encoded(image, "TIFF"), RGB) <= 1
    assert difference(encoded(image, "JPEG", quality=98, subsampling=0), RGB) <= 12


def test_lab_and_ycbcr_become_rgb() -> None:
    lab = np.dstack([np.full((8, 8), 128), np.zeros((8, 8)), np.zeros((8, 8))]).astype(np.uint8)
    image = Image.frombytes("LAB", (8, 8), lab.tobytes())
    gray = decode(encoded(image, "TIFF"))  # L* of 50 is gray 119 in sRGB
    assert np.abs(gray.astype(int) - 119).max() <= 2
    image = Image.fromarray(RGB).convert("YCbCr")
    assert difference(encoded(image, "TIFF"), np.asarray(image.convert("RGB"))) == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 512).astype(np.uint16), (4, 1))
    data = encoded(Image.fromarray(ramp), kind)
    assert difference(data, np.repeat((ramp / 257).round()[..., None], 3, 2)) == 0
    assert len(np.unique(decode(data))) >= 250


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 70000.0])
def test_float_gray_is_scaled_from_its_range(top: float) -> None:
    ramp = np.tile(np.linspace(0, top, 300, dtype=np.float32), (4, 1))
    expected = np.repeat(np.rint(ramp.astype(np.float64) / top * 255)[..., None], 3, 2)
    assert difference(encoded(Image.fromarray(ramp), "TIFF"), expected) <= 1


def test_32_bit_gray_may_be_negative() -> None:
    ramp = np.tile(np.linspace(-5000, 5000, 300).astype(np.int32), (4, 1))
    got = decode(encoded(Image.fromarray(ramp), "TIFF"))
    assert got[0, 0, 0] == 0 and got[0, -1, 0] == 255 and len(np.unique(got)) >= 250


@pytest.mark.parametrize("none", [-9999.0, -3.4028235e38, float("nan"), float("inf")])
@pytest.mark.parametrize("top", [1.0, 255.0])
def test_no_data_values_are_black_and_leave_the_others_their_scale(none: float, top: float) -> None:
    values = np.array([[none, 0, 0.2 * top, 0.6 * top, top]], np.float32)
    got = decode(encoded(Image.fromarray(values), "TIFF"))
    assert got[0, :, 0].tolist() == [0, 0, 51, 153, 255]


def test_a_tiff_may_name_its_own_no_data_value() -> None:
    file = io.BytesIO()
    values = np.array([[-77, 0, 51, 102, 255]], np.float32)
    named = ImageFileDirectory_v2()
    named[42113] = "-77"
    Image.fromarray(values).save(file, "TIFF", tiffinfo=named)
    assert decode(file.getvalue())[0, :, 0].tolist() == [0, 0, 51, 102, 255]


def test_a_picture_of_no_data_alone_is_black() -> None:
    assert not decode(encoded(Image.fromarray(np.full((3, 4), -9999, np.float32)), "TIFF")).any()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("TIFF", np.float32)],
)
def test_a_given_range_scales_every_kind_of_gray(kind: str, dtype: type) -> None:
    """12 bits: 819 of 4095 is a fifth, 51 of 255; what is outside becomes black or white."""
    ramp = np.array([[0, 819, 1638, 4095, 6000]], dtype)
    got = decode(encoded(Image.fromarray(ramp), kind), (0.0, 4095.0))
    assert got[0, :, 0].tolist() == [0, 51, 102, 255, 255]
    assert decode(encoded(Image.fromarray(ramp), kind), (819.0, 4914.0))[0, :, 0].tolist() == [
        *(0, 0, 51, 204, 255)
    ]


def test_a_given_range_keeps_the_ratio_of_two_pictures() -> None:
    for top, white in ((1.0, 100), (1.02, 102)):  # 255 / 2.55 = 100
        data = encoded(Image.fromarray(np.array([[0, top]], np.float32)), "TIFF")
        assert decode(data, (0.0, 2.55))[0, :, 0].tolist() == [0, white]


def test_pictures_of_8_bits_do_not_know_a_range() -> None:
    for kind in ("JPEG", "PNG"):
        data = encoded(Image.fromarray(RGB), kind)
        assert np.array_equal(decode(data, (0.0, 9.0)), decode(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_gives_the_same_pixels(kind: str) -> None:
    turned_back = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,  # turned by 270 degrees when shown
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ]
    for orientation, turn in enumerate(turned_back, 1):
        upright = Image.fromarray(RGB)
        stored = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}
        data = encoded(stored, kind, exif=exif, **options.get(kind, {}))
        assert difference(data, RGB) <= (9 if kind == "JPEG" else 0), orientation
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(decode(data), expected)


def test_a_jpeg_turned_by_xmp_alone_is_upright() -> None:
    upright = photograph(1, 60, 40)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stored = np.ascontiguousarray(np.rot90(upright))
    data = encoded(stored, "JPEG", quality=95, xmp=xmp)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert (open_picture(data).height, open_picture(data).width) == (60, 40)
    np.testing.assert_array_equal(decode(data), expected)


def test_broken_exif_leaves_the_picture_as_it_is() -> None:
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0junk", b"Exif\0\0"):
        assert difference(encoded(RGB, "PNG", exif=exif), RGB) == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert difference(data, np.full((10, 20, 3), (255, 0, 0))) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_half_a_file_is_truncated(kind: str) -> None:
    data = encoded(RGB, kind)
    assert reason(data[: len(data) // 2]) == "truncated"


def test_ten_bytes_short_is_truncated() -> None:
    for kind in ("JPEG", "WEBP", "BMP", "TIFF"):
        assert reason(encoded(RGB, kind)[:-10]) == "truncated"


def test_png_with_rows_missing_is_truncated() -> None:
    rows = [b"\0" + row.tobytes() for row in RGB]
    assert difference(png(56, 40, zlib.compress(b"".join(rows))), RGB) == 0
    assert reason(png(56, 40, zlib.compress(b"".join(rows[:39])))) == "truncated"
    assert reason(png(56, 40, zlib.compress(b"".join(rows[:4])))) == "truncated"


def test_png_that_ends_in_black_is_whole() -> None:
    black = RGB.copy()
    black[20:] = 0
    assert difference(encoded(black), black) == 0
    assert difference(encoded(np.zeros((9, 7), np.uint8)), np.zeros((9, 7, 3))) == 0
    bits = Image.new("1", (13, 5))
    assert difference(encoded(bits), np.zeros((5, 13, 3))) == 0


def test_interlaced_png_is_counted_by_its_passes() -> None:
    assert (
        difference(png(1, 1, zlib.compress(b"\0\1\2\3"), interlaced=1), np.array([[[1, 2, 3]]]))
        == 0
    )
    # 5 x 5 gray: passes of 1x1, 1x1, 2x1, 1x2, 3x1, 2x3 and 5x2 pixels (columns x rows)
    passes = [(1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (2, 3), (5, 2)]
    raw = b"".join((b"\0" + bytes([7] * columns)) * rows for columns, rows in passes)
    whole = png(5, 5, zlib.compress(raw), colour=0, interlaced=1)
    assert difference(whole, np.full((5, 5, 3), 7)) == 0
    assert reason(png(5, 5, zlib.compress(raw[:-6]), colour=0, interlaced=1)) == "truncated"


def test_reason_codes() -> None:
    assert reason(b"") == "empty"
    assert reason(b"this is a text file, named .jpg") == "not-an-image"
    assert reason(b"<html><body>404</body></html>") == "not-an-image"
    for head in (b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        assert reason(head + bytes(200)) == "not-an-image"
    for head in (b"<svg xmlns='http://x'/>", b"8BPS\0\1", b"\0\0\0\x18ftypheic", b"qoif"):
        assert reason(head + bytes(200)) == "unsupported"
    with pytest.raises(DecodeError, match=r"unsupported \(PPM is not read\)"):
        decode(encoded(RGB, "PPM"))
    corrupt = bytearray(encoded(RGB, "PNG"))
    corrupt[len(corrupt) // 2] ^= 255
    assert reason(bytes(corrupt)) == "broken"
    assert reason(b"\x89PNG\r\n\x1a\n" + bytes(50)) == "broken"
    assert reason(b"II*\0" + bytes(50)) == "unsupported"


def test_random_damage_never_escapes_as_another_error() -> None:
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        whole = encoded(RGB, kind)
        for _ in range(60):
            data = bytearray(whole)
            for position in rng.integers(0, len(data), 4):
                data[position] = rng.integers(256)
            try:
                assert decode(bytes(data)).shape[2] == 3
            except DecodeError as error:
                assert error.reason in {"truncated", "broken", "not-an-image", "unsupported"} | {
                    "too-large"
                }


def test_bombs_are_refused_before_decoding() -> None:
    bombs = [png(13000, 13000, zlib.compress(bytes(1000))), png(60000, 2900, b"")]
    bombs += [png(20000, 20000, b""), png(8001, 8000, b"")]
    start = time.perf_counter()
    assert [reason(bomb) for bomb in bombs] == ["too-large"] * len(bombs)
    assert time.perf_counter() - start < 0.8
    with pytest.raises(DecodeError, match=r"64\.0 MP > limit 64 MP"):
        decode(bombs[-1])


def test_the_suffix_does_not_matter_and_extremes_are_fine() -> None:
    assert difference(encoded(RGB[:1, :1]), RGB[:1, :1]) == 0
    line = np.arange(20000, dtype=np.uint8)[None]
    assert difference(encoded(line), np.repeat(line[..., None], 3, 2)) == 0
    trailing = encoded(RGB, "JPEG") + b"PK\3\4" + bytes(100)
    assert decode(trailing).shape == RGB.shape
