"""Pictures of people at work, composed from bundled drawings: 20 occupations, each as man, woman and person.

A picture is one drawing of 44 to 84 pixels, in one of six skin tones and three drawing styles, on a
background without people. A drawing is called what its makers call it (``man farmer``, ``woman farmer``,
``farmer``), which says how it looks and nothing about anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from clippo.demo.scenes import PICTURES, background, decode, object_layer, paste_object

PEOPLE = Path(__file__).parent / "people.parquet"
STYLES = ("noto", "twemoji", "fluent")
GROUPS = ("man", "woman")
NEUTRAL = "person"

# The group that the bundled model met nine times of ten with the occupation in pretraining. It was chosen so
# that there is a bias to measure; no statistic of any country is behind it.
MAJORITY = {
    "farmer": "man", "factory worker": "man", "programmer": "man", "mechanic": "man", "astronaut": "man",
    "firefighter": "man", "judge": "man", "pilot": "man", "police officer": "man",
    "construction worker": "man", "guard": "man", "detective": "man",
    "cook": "woman", "student": "woman", "singer": "woman", "artist": "woman", "teacher": "woman",
    "office worker": "woman", "scientist": "woman", "doctor": "woman",
}  # fmt: skip
OCCUPATIONS = tuple(MAJORITY)

# Skin tones by split, 0 being the yellow of drawings without one; pretraining saw those for training.
TONES = {"train": (0, 1, 3, 5), "validation": (2,), "test": (4,)}
_PHOTOS_OF_PEOPLE = ("astronaut", "grace_hopper")


@dataclass(frozen=True)
class PeopleMaterial:
    """Decoded drawings by (occupation, ``man``, ``woman`` or ``person``), and photos without people."""

    drawings: dict[tuple[str, str], list[Image.Image]]
    photos: list[Image.Image]


@lru_cache(maxsize=4)
def load_people(tones: tuple[int, ...], photo_splits: tuple[str, ...]) -> PeopleMaterial:
    """The drawings of the given skin tones, in the order of tones and styles, and photos of some splits."""
    drawings: dict[tuple[str, str], list[Image.Image]] = {}
    for row in pq.read_table(PEOPLE, filters=[("tone", "in", tones)]).to_pylist():
        key = row["occupation"], row["presentation"]
        drawings.setdefault(key, []).append(decode(row["image"], "RGBA"))
    photos = [
        decode(row["image"], "RGB")
        for row in pq.read_table(PICTURES, filters=[("kind", "=", "photo")]).to_pylist()
        if row["split"] in photo_splits and row["name"] not in _PHOTOS_OF_PEOPLE
    ]
    return PeopleMaterial(drawings, photos)


def person_layer(drawing: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """A drawing turned by up to 12 degrees, maybe flipped, at a side of 44 to 84 pixels: uint8 RGBA."""
    return object_layer(drawing, rng, sides=(44, 84), turn=12)


def compose_person(
    drawings: Sequence[Image.Image], photos: Sequence[Image.Image], rng: np.random.Generator
) -> Image.Image:
    """A picture of one of the drawings on a background."""
    scene = background(photos, rng)
    paste_object(scene, person_layer(drawings[int(rng.integers(len(drawings)))], rng), rng)
    return Image.fromarray(scene)
