"""Decoding: odd pictures become RGB, damaged and enormous ones a DataError."""

import io
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clippo.data.decode import MAX_PIXELS, decoded
from clippo.errors import DataError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
LOSSLESS = ("PNG", "BMP", "TIFF", "PPM")
FORMATS = (*LOSSLESS, "JPEG", "WEBP", "GIF")


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decoded(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that says how large it is, and ends there."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(side: int = 30_000) -> bytes:
    """A whole black PNG of one bit a pixel: some kilobytes that unfold to gigabytes."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + -(-side // 8))) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats_keep_every_pixel(form: str) -> None:
    assert np.array_equal(pixels(saved(NOISE, form)), np.asarray(NOISE))


@pytest.mark.parametrize(
    ("image", "form", "expected"),
    [
        (Image.new("L", (4, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (200, 0, 100, 255)), "PNG", (200, 0, 100)),
        (Image.new("RGBA", (4, 4), (200, 0, 100, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (200, 0, 100, 0)), "WEBP", (255, 255, 255)),
        (Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4), "PNG", (10, 200, 30)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", (0, 255, 255)),
        (Image.new("YCbCr", (8, 8), (150, 128, 128)), "JPEG", (150, 150, 150)),
        (Image.fromarray(np.full((4, 4), 0x8000, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((4, 4), 0xFFFF, np.uint16)), "TIFF", (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0x4000, np.int32)), "TIFF", (64, 64, 64)),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF", (127, 127, 127)),
        (Image.fromarray(np.full((4, 4), 200.0, np.float32)), "TIFF", (200, 200, 200)),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF", (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(image: Image.Image, form: str, expected: tuple[int, ...]) -> None:
    found = pixels(saved(image, form))
    assert found.shape == (image.height, image.width, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_what_is_transparent_in_a_palette_is_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    found = pixels(saved(image, "PNG", transparency=0))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [0, 0, 255]


def test_a_transparent_colour_is_white() -> None:
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((2, 2), (9, 9, 9))
    found = pixels(saved(image, "PNG", transparency=(1, 2, 3)))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[2, 2].tolist() == [9, 9, 9]


# What a camera held so has stored, and how it is to be turned (EXIF 2.3, tag 274).
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_are_turned_upright(form: str, orientation: int) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    stored = Image.fromarray(blocks.repeat(16, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(saved(stored, form, exif=exif, **({} if form == "TIFF" else {"quality": 95})))
    expected = TURNS[orientation](np.asarray(stored)).astype(int)
    assert found.shape == expected.shape
    # Lossy formats blur colours at the edges of blocks, by less than blocks differ.
    assert np.abs(found - expected).mean() < (1 if form in LOSSLESS else 16)


def test_damaged_metadata_is_no_damaged_picture() -> None:
    data = saved(NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 20)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(saved(NOISE, "JPEG")))))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert pixels(data)[3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data())
def test_a_cut_off_picture_is_whole_or_refused(form: str, data: st.DataObject) -> None:
    whole = saved(NOISE, form)
    cut = data.draw(st.integers(0, len(whole) - 1))
    try:
        found = pixels(whole[:cut])
    except DataError:
        return
    assert cut > len(whole) - 30, "much is missing, and nobody noticed"
    assert np.array_equal(found, pixels(whole))


@pytest.mark.parametrize("form", FORMATS)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=20))
def test_damage_raises_nothing_but_data_errors(form: str, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(saved(NOISE.resize((12, 9)), form))
    for place, value in changes:
        damaged[place % len(damaged)] = value
    with suppress(DataError):
        assert decoded(bytes(damaged)).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is a text file called .png\n" * 40, "no picture"),
        (saved(NOISE, "JPEG")[:400], "damaged"),
        (saved(NOISE, "PNG")[:-200], "truncated"),
        (saved(NOISE, "EPS"), "no picture"),  # Pillow would start Ghostscript
        (png_header(30_000, 30_000), "100,000,000"),
        (png_header(10_001, 10_000), r"10,001 x 10,000 pixels; at most 100,000,000"),
        (png_header(9_700, 9_700), "truncated"),  # large enough for Pillow's warning, but allowed
        (png_header(10_100, 100), "100 times"),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "EPS", "bomb", "large", "within the limit", "strip"],
)
def test_what_is_refused_says_why_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        decoded(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_bomb_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    assert path.stat().st_size < 300_000
    assert MAX_PIXELS < 30_000**2
    code = f"""
import resource, sys
from clippo.data.decode import decoded
from clippo.errors import DataError
data = open({str(path)!r}, "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decoded(data)
    sys.exit("decoded")
except DataError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    # Through a shell: on Linux a process's peak begins with the memory of the process that has forked it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss [bytes]
    assert int(run.stdout) * unit < 20_000_000


def test_a_bomb_within_the_limit_is_a_picture() -> None:
    assert decoded(bomb(2_000)).size == (2_000, 2_000)


def test_a_plain_picture_is_what_pillow_makes_of_it() -> None:
    data = saved(NOISE, "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels(data), np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
