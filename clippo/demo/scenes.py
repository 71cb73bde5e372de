"""Pictures of one thing on a background, composed from the bundled sprites and photos.

A scene is 96 x 96 pixels: an object of 42 to 60 pixels anywhere on a background that is a photo crop, a
mosaic of two, shapes, fractal noise, a gradient or colour noise. Pretraining found that the variety of
backgrounds, not of objects, decides clean accuracy (docs/EXPERIMENTS.md).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

SIDE = 96
PICTURES = Path(__file__).parent / "pictures.parquet"

# Drawing styles and photos by split: a test picture shares neither with a tuning picture.
SPRITE_STYLES = {"train": ("noto", "twemoji"), "validation": ("noto", "twemoji"), "test": ("fluent",)}


@dataclass(frozen=True)
class Material:
    """Decoded sprites and photos of one split."""

    classes: tuple[str, ...]
    sprites: dict[str, list[Image.Image]]
    photos: list[Image.Image]


@lru_cache(maxsize=4)
def load_material(styles: tuple[str, ...], photo_splits: tuple[str, ...]) -> Material:
    """Sprites of the given styles and photos of the given splits, from the bundled Parquet file."""
    sprites: dict[str, list[Image.Image]] = {}
    photos = []
    for row in pq.read_table(PICTURES).to_pylist():
        if row["kind"] == "sprite" and row["style"] in styles:
            sprites.setdefault(row["name"], []).append(decode(row["image"], "RGBA"))
        elif row["kind"] == "photo" and row["split"] in photo_splits:
            photos.append(decode(row["image"], "RGB"))
    return Material(tuple(sorted(sprites)), sprites, photos)


def material_of_split(split: str) -> Material:
    """What pictures of ``train``, ``validation`` or ``test`` are composed from."""
    return load_material(SPRITE_STYLES[split], (split,))


def decode(data: bytes, mode: str) -> Image.Image:
    """An encoded picture in a PIL mode."""
    return Image.open(io.BytesIO(data)).convert(mode)


# --- backgrounds ------------------------------------------------------------------------------------------

Array = np.ndarray
_Y, _X = np.mgrid[0:SIDE, 0:SIDE] / SIDE


def _int(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _resized(tiles: Array, resample: Image.Resampling) -> Array:
    return np.asarray(Image.fromarray(tiles).resize((SIDE, SIDE), resample)).astype(np.float32)


def _photo(photos: Sequence[Image.Image], rng: np.random.Generator) -> Array:
    photo = photos[_int(rng, 0, len(photos) - 1)]
    short = min(photo.size)
    side = _int(rng, min(60, short), short)
    x, y = _int(rng, 0, photo.width - side), _int(rng, 0, photo.height - side)
    crop = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    pixels = np.rot90(np.asarray(crop), _int(rng, 0, 3) if rng.random() < 0.4 else 0).astype(np.float32)
    if rng.random() < 0.5:
        pixels = pixels[..., rng.permutation(3)]
    if rng.random() < 0.2:
        pixels = 255 - pixels
    return pixels * rng.uniform(0.5, 1.4, 3) + rng.uniform(-40, 40, 3)


def _gradient(photos: Sequence[Image.Image], rng: np.random.Generator) -> Array:
    first, second = rng.uniform(0, 255, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    share = np.clip(0.5 + (_X - 0.5) * math.cos(angle) + (_Y - 0.5) * math.sin(angle), 0, 1)[..., None]
    return first * share + second * (1 - share)


def _noise(photos: Sequence[Image.Image], rng: np.random.Generator) -> Array:
    cells = int(rng.choice([3, 4, 6, 8, 12, 16, 24, 32]))
    tiles = rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8)
    smooth = rng.random() < 2 / 3
    return _resized(tiles, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def _fractal(photos: Sequence[Image.Image], rng: np.random.Generator) -> Array:
    total = np.zeros((SIDE, SIDE, 3), np.float32)
    for cells in (3, 6, 12, 24, 48):
        tiles = rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8)
        total += _resized(tiles, Image.Resampling.BICUBIC) / cells ** rng.uniform(0.3, 1)
    total = (total - total.mean((0, 1))) / total.std((0, 1))
    return rng.uniform(40, 215, 3) + total @ rng.normal(0, 1, (3, 3)) * rng.uniform(15, 35)


def _shapes(photos: Sequence[Image.Image], rng: np.random.Generator) -> Array:
    base = (_gradient, _photo, _fractal)[_int(rng, 0, 2)](photos, rng)
    picture = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(_int(rng, 3, 14)):
        color = tuple(int(v) for v in rng.integers(0, 255, 3))
        x, y = rng.uniform(-10, SIDE, 2)
        w, h = rng.uniform(4, 60, 2)
        kind = rng.random()
        if kind < 0.35:
            draw.ellipse((x, y, x + w, y + h), fill=color if rng.random() < 0.7 else None, outline=color)
        elif kind < 0.6:
            corners = _int(rng, 3, 6)
            points = np.array([x, y]) + rng.uniform(-30, 30, (corners, 2))
            draw.polygon([(float(px), float(py)) for px, py in points], fill=color)
        elif kind < 0.8:
            points = rng.uniform(0, SIDE, (_int(rng, 2, 4), 2))
            draw.line([(float(px), float(py)) for px, py in points], fill=color, width=_int(rng, 1, 7))
        else:
            draw.rectangle((x, y, x + w, y + h), fill=color)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 2)))
    return np.asarray(picture).astype(np.float32)


def _mosaic(photos: Sequence[Image.Image], rng: np.random.Generator) -> Array:
    first = _photo(photos, rng)
    second = (_photo, _gradient, _fractal)[_int(rng, 0, 2)](photos, rng)
    if rng.random() < 0.4:
        share = rng.uniform(0.2, 0.8)
        return first * share + second * (1 - share)
    angle, x, y = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)
    side = (_X - x) * math.cos(angle) + (_Y - y) * math.sin(angle) > 0
    return np.where(side[..., None], first, second)


_KINDS: tuple[tuple[float, Callable[[Sequence[Image.Image], np.random.Generator], Array]], ...] = (
    (0.35, _photo), (0.17, _mosaic), (0.22, _shapes), (0.10, _fractal), (0.10, _gradient), (0.06, _noise),
)  # fmt: skip


def background(photos: Sequence[Image.Image], rng: np.random.Generator) -> Array:
    """A background, uint8 of shape (SIDE, SIDE, 3)."""
    kind = int(rng.choice(len(_KINDS), p=[share for share, _ in _KINDS]))
    return np.clip(_KINDS[kind][1](photos, rng), 0, 255).astype(np.uint8)


# --- objects ----------------------------------------------------------------------------------------------


def object_layer(
    sprite: Image.Image, rng: np.random.Generator, sides: tuple[int, int] = (42, 60), turn: float = 25
) -> Array:
    """A sprite turned by up to ``turn`` degrees, maybe flipped, at a side in pixels: uint8 RGBA."""
    side = _int(rng, *sides)
    turned = sprite.rotate(rng.uniform(-turn, turn), resample=Image.Resampling.BICUBIC)
    layer = np.asarray(turned.resize((side, side), Image.Resampling.LANCZOS))
    return layer[:, ::-1] if rng.random() < 0.5 else layer


def paste_object(scene: Array, layer: Array, rng: np.random.Generator) -> None:
    """Pastes an object layer into a scene, in place; up to three pixels may leave the picture."""
    side = layer.shape[0]
    x, y = _int(rng, -3, SIDE - side + 3), _int(rng, -3, SIDE - side + 3)
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, SIDE), min(y + side, SIDE)
    layer = layer[y0 - y : y1 - y, x0 - x : x1 - x]
    opacity = layer[..., 3:].astype(np.float32) / 255
    tint = rng.uniform(0.75, 1.2, 3).astype(np.float32)
    under = scene[y0:y1, x0:x1]
    scene[y0:y1, x0:x1] = under + (np.minimum(layer[..., :3] * tint, 255) - under) * opacity


def compose(material: Material, class_name: str | None, rng: np.random.Generator) -> Image.Image:
    """A picture of one thing, or of a background alone (``class_name=None``)."""
    scene = background(material.photos, rng)
    if class_name is not None:
        choices = material.sprites[class_name]
        paste_object(scene, object_layer(choices[_int(rng, 0, len(choices) - 1)], rng), rng)
    return Image.fromarray(scene)
