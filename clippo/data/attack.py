"""Typographic attacks: draw a misleading word on a picture.

The procedure is that of Defense-Prefix (Azuma and Matsui, arXiv 2304.04512): one word, font size drawn from
a range and reduced until it fits, fill and stroke in two different of eight colours, stroke one pixel wide,
uniform position, long names broken over two lines. Sizes are fractions of the shorter side, so that the same
attack serves any resolution (20 to 40 pixels at 224).

Everything random comes from ``rng.random()`` alone, so ``numpy.random.Generator`` and ``random.Random`` both
serve, and one word takes the same number of draws whatever it is.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, features

from clippo.errors import DataError

FONT_DIR = Path(__file__).parent / "fonts"

COLORS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "blue": (0, 0, 255),
    "green": (0, 128, 0),
    "red": (255, 0, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
}

# Bundled fonts by split, so that a test set's lettering is never the lettering that was tuned on.
FONTS: dict[str, tuple[str, ...]] = {
    "train": ("Roboto_700Bold.ttf", "RobotoSlab_700Bold.ttf", "Lato_700Bold.ttf"),
    "validation": ("Asap_700Bold.ttf", "Overpass_700Bold.ttf", "Rokkitt_700Bold.ttf"),
    "test": (
        "Lora_700Bold.ttf",
        "Karla_700Bold.ttf",
        "TitilliumWeb_700Bold.ttf",
        "Arvo_700Bold.ttf",
        "Vollkorn_700Bold.ttf",
    ),
}
SMALLEST_SIZE = 4.0  # pixels; in smaller lettering no letter can be told from another
FALLBACK_FONT = "DejaVuSans-Bold.ttf"  # also Greek, Cyrillic, Arabic, Hebrew, Armenian, Georgian


class Rng(Protocol):
    """Anything with ``random()`` in [0, 1)."""

    def random(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class WordStyle:
    """How a word is drawn. Sizes are fractions of the picture's shorter side."""

    fonts: tuple[str, ...] = FONTS["train"]
    """Font files: names of bundled fonts, or paths."""
    font_size: tuple[float, float] = (20 / 224, 40 / 224)
    """Range of the font size before it is reduced to fit."""
    margin: float = 4 / 224
    """Distance that the lettering keeps from the picture's edge."""


DEFAULT_STYLE = WordStyle()


def font_path(name: str) -> Path:
    """The file of a bundled font or of a path.

    Raises:
        DataError: there is no such file.
    """
    for path in (FONT_DIR / name, Path(name)):
        if path.is_file():
            return path
    bundled = ", ".join(sorted(p.name for p in FONT_DIR.glob("*.ttf")))
    raise DataError(f"font {name!r} is neither a file nor bundled; bundled fonts: {bundled}")


@lru_cache(maxsize=256)
def _characters(path: Path) -> frozenset[int]:
    with TTFont(path, lazy=True) as font:
        return frozenset(font.getBestCmap())


@lru_cache(maxsize=64)
def _load_font(path: Path, size: float, shaping: bool) -> ImageFont.FreeTypeFont:
    engine = ImageFont.Layout.RAQM if shaping else ImageFont.Layout.BASIC
    return ImageFont.truetype(path, size, layout_engine=engine)


def _needs_shaping(word: str) -> bool:
    """Whether letters join or run from right to left, which plain left-to-right layout gets wrong."""
    return any(unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.combining(c) for c in word)


def font_for(word: str, name: str) -> Path:
    """The named font if it has every character of ``word``, else the bundled fallback.

    Raises:
        DataError: neither font has the characters.
    """
    wanted = {ord(c) for c in word if not c.isspace()}
    for path in (font_path(name), font_path(FALLBACK_FONT)):
        if wanted <= _characters(path):
            return path
    missing = "".join(sorted(chr(c) for c in wanted - _characters(font_path(FALLBACK_FONT))))
    raise DataError(
        f"cannot draw {word!r}: {FALLBACK_FONT}, which stands in for {name}, has no {missing!r}; "
        "give a font that has it (fonts=...) or rename the class"
    )


def break_lines(word: str) -> str:
    """Names of two or more words are broken over two lines of about equal length."""
    parts = word.split()
    if len(parts) < 2:
        return "".join(parts)
    cuts = range(1, len(parts))
    best = min(cuts, key=lambda i: max(len(" ".join(parts[:i])), len(" ".join(parts[i:]))))
    return " ".join(parts[:best]) + "\n" + " ".join(parts[best:])


def word_mask(text: str, path: Path, size: float, stroke_width: float = 1) -> np.ndarray:
    """Coverage of a text by its fill and by its fill and stroke, cropped to the ink.

    Returns:
        uint8 array of shape (height, width, 2).
    """
    font = _load_font(path, size, _needs_shaping(text))
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    box = probe.multiline_textbbox((0, 0), text, font=font, stroke_width=stroke_width, align="center")
    pad = 2
    size_px = (int(box[2] - box[0]) + 2 * pad + 1, int(box[3] - box[1]) + 2 * pad + 1)
    origin = (pad - box[0], pad - box[1])
    layers = []
    for stroke in (0, stroke_width):
        layer = Image.new("L", size_px)
        ImageDraw.Draw(layer).multiline_text(
            origin, text, font=font, fill=255, stroke_width=stroke, stroke_fill=255, align="center"
        )
        layers.append(np.asarray(layer))
    mask = np.stack(layers, -1)
    rows, columns = np.flatnonzero(mask.any((1, 2))), np.flatnonzero(mask.any((0, 2)))
    if rows.size == 0:
        raise DataError(f"cannot draw {text!r}: it has no ink; rename the class")
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw_word(
    image: Image.Image, word: str, rng: Rng, *, style: WordStyle = DEFAULT_STYLE, mirrored: bool = False
) -> Image.Image:
    """Draws ``word`` at a random place of a copy of ``image``; all of it lies inside the picture.

    Args:
        image: any PIL image; it is converted to RGB and not changed.
        word: the class name; two or more words are broken over two lines.
        rng: the only source of randomness; six values are taken from it.
        style: fonts and sizes.
        mirrored: draw the same ink mirrored, which covers as much and cannot be read: the control.

    Raises:
        DataError: an empty word, a character that no font has, or a picture too small to write on.

    >>> from PIL import Image
    >>> import numpy as np
    >>> attacked = draw_word(Image.new("RGB", (96, 96)), "anchor", np.random.default_rng(0))
    >>> attacked.size, attacked.mode
    ((96, 96), 'RGB')
    """
    if not word.strip():
        raise DataError("cannot draw an empty word; every class needs a name")
    word = unicodedata.normalize("NFC", word)  # names of folders come decomposed on some systems
    picture = image.convert("RGB")
    u_font, u_size, u_fill, u_stroke, u_x, u_y = (rng.random() for _ in range(6))
    path = font_for(word, style.fonts[int(u_font * len(style.fonts))])
    if _needs_shaping(word) and not features.check("raqm"):
        raise DataError(f"cannot draw {word!r}: its script needs Pillow with libraqm")
    text = break_lines(word)

    low, high = style.font_size
    side = min(picture.size)
    margin = style.margin * side
    room = (picture.width - 2 * margin, picture.height - 2 * margin)
    size = max(SMALLEST_SIZE, (low + u_size * (high - low)) * side)
    while True:
        mask = word_mask(text, path, size)
        height, width = mask.shape[:2]
        if width <= room[0] and height <= room[1]:
            break
        if size <= SMALLEST_SIZE:
            raise DataError(f"cannot draw {word!r} on a picture of {picture.width} x {picture.height} pixels")
        # Ink grows a little less than linearly with the size, so a few rounds suffice.
        size = max(SMALLEST_SIZE, size * max(0.7, min(0.98, room[0] / width, room[1] / height)))
    if mirrored:
        mask = mask[:, ::-1]

    palette = list(COLORS.values())
    fill = palette.pop(int(u_fill * len(palette)))
    stroke = palette[int(u_stroke * len(palette))]
    x = round(margin + u_x * (room[0] - width))
    y = round(margin + u_y * (room[1] - height))
    attacked = picture.copy()
    attacked.paste(stroke, (x, y), Image.fromarray(np.ascontiguousarray(mask[..., 1])))
    attacked.paste(fill, (x, y), Image.fromarray(np.ascontiguousarray(mask[..., 0])))
    return attacked
