"""Bytes to a picture: RGB, upright, whole, and of bounded size."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from clippo.errors import DataError

MAX_PIXELS = 100_000_000
MAX_ASPECT = 100  # resized to a model's shorter side, a strip of any length would fill the memory

# Pillow knows more, among them formats that start other programs (EPS) or are no pictures (HDF5).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decoded(data: bytes) -> Image.Image:
    """The picture in a file's bytes, whatever the file is called.

    It is turned as its EXIF orientation says, what is transparent is white, 16 bits a channel become 8, and
    of an animation the first frame is taken.

    Raises:
        DataError: it is no picture of a known format, damaged or cut off, or larger than ``MAX_PIXELS`` or
            longer than ``MAX_ASPECT`` by its header, which is read first.
    """
    if not data:
        raise DataError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures and odd metadata are dealt with here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check(*image.size)
                image.load()
                return _upright(_rgb(image), image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"no picture; known formats are {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise DataError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders meet damage in every way there is: KeyError, struct.error, ...
        said = " ".join(str(error).split())
        raise DataError(f"damaged picture ({said or type(error).__name__})") from error


def _check(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{width:,} x {height:,} pixels; one side may be {MAX_ASPECT} times the other")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", layer.size, "white")
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits or of floats, which Pillow would cut off at 255."""
    grey = np.nan_to_num(np.asarray(image))
    if image.mode.startswith("I"):
        grey = grey.clip(0, 65535) // 256
    else:
        # Floats have no fixed range: 0 to 1, 0 to 255, or whatever was measured.
        top = next((t for t in (1, 255) if grey.max() <= t), grey.max())
        grey = grey.clip(0) * (255 / top)
    return Image.fromarray(grey.astype(np.uint8))


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata does not make a picture unreadable
        turn = None
    return rgb if turn is None else rgb.transpose(turn)
