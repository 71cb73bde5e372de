"""Sources of labelled pictures, by name."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clippo import demo
from clippo.demo import scenes
from clippo.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class LabelledImage:
    """A picture that is decoded when it is asked for.

    Attributes:
        key: names the picture within its source, stable over runs and machines.
        label: class index.
    """

    key: str
    label: int
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class ImageSource:
    """Labelled pictures of named classes.

    Attributes:
        pictures: ``pictures(split, labels, n)`` gives up to ``n`` pictures of the given classes, the same
            ones on every call, spread evenly over the classes.
        background: ``background(split, group, index)`` is a picture of nothing, to write a word on.
        fingerprint: changes when the pictures change.
    """

    name: str
    classes: tuple[str, ...]
    pictures: Callable[[str, Sequence[int], int], list[LabelledImage]]
    background: Callable[[str, str, int], LabelledImage]
    fingerprint: str


def open_source(spec: str, seed: int) -> ImageSource:
    """Opens ``name`` or ``name:argument``.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
        DataError: the source has no usable pictures.
    """
    name, _, argument = spec.partition(":")
    if name not in SOURCES:
        raise ConfigError(f"data.source is {spec!r}; it must be one of: {', '.join(SOURCES)} (folder:PATH)")
    return SOURCES[name](argument, seed)


def _demo(argument: str, seed: int) -> ImageSource:
    """The bundled things, composed on the fly; no split has another's photos, nor test another's style."""
    if argument:
        raise ConfigError(f"data.source demo takes no argument, got {argument!r}")

    def scene(split: str, name: str | None, index: int) -> Callable[[], Image.Image]:
        place = [seed, SPLITS.index(split), demo.CLASSES.index(name) if name else len(demo.CLASSES), index]
        return lambda: scenes.compose(scenes.material_of_split(split), name, np.random.default_rng(place))

    def pictures(split: str, labels: Sequence[int], n: int) -> list[LabelledImage]:
        chosen = [(labels[i % len(labels)], i // len(labels)) for i in range(n)]
        return [
            LabelledImage(f"{split}/{demo.CLASSES[c]}/{k}", c, scene(split, demo.CLASSES[c], k))
            for c, k in chosen
        ]

    def background(split: str, group: str, index: int) -> LabelledImage:
        return LabelledImage(
            f"{split}/{group}/{index}", -1, scene(split, None, zlib.crc32(f"{group}/{index}".encode()))
        )

    content = hashlib.sha256(scenes.PICTURES.read_bytes()).hexdigest()[:16]
    return ImageSource("demo", demo.CLASSES, pictures, background, f"demo-{content}")


def _folder(argument: str, seed: int) -> ImageSource:
    """A folder per class, or ``train``, ``validation`` and ``test`` folders of such.

    Without split folders each picture's split is a hash of its path: 60 % train, 20 % validation, 20 % test.
    """
    root = Path(argument).expanduser()
    if not argument or not root.is_dir():
        raise ConfigError(f"data.source is folder:{argument}; there is no such folder")
    has_splits = all((root / split).is_dir() for split in SPLITS)
    files: dict[str, dict[str, list[Path]]] = {split: {} for split in SPLITS}
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()):
        parts = path.relative_to(root).parts
        if len(parts) != (3 if has_splits else 2):
            continue
        split = parts[0] if has_splits else _split_of("/".join(parts))
        if split in files:
            files[split].setdefault(parts[-2], []).append(path)
    classes = tuple(sorted({name for per_class in files.values() for name in per_class}))
    if len(classes) < 4:
        raise DataError(
            f"folder:{argument} has pictures of {len(classes)} classes; at least 4 are needed, "
            "each a folder of pictures named after the class"
        )
    for split, per_class in files.items():
        if not per_class:
            raise DataError(
                f"folder:{argument} has no {split} pictures; add some, or make {'/'.join(SPLITS)} folders"
            )

    def labelled(path: Path, label: int) -> LabelledImage:
        return LabelledImage(path.relative_to(root).as_posix(), label, lambda: _decoded(path))

    def pictures(split: str, labels: Sequence[int], n: int) -> list[LabelledImage]:
        order = np.random.default_rng([seed, SPLITS.index(split)])
        shuffled = {c: _shuffled(files[split].get(classes[c], []), order) for c in range(len(classes))}
        columns = [[labelled(p, c) for p in shuffled[c]] for c in labels]
        deepest = max((len(column) for column in columns), default=0)
        rows = [column[i] for i in range(deepest) for column in columns if i < len(column)]
        return rows[:n]

    def background(split: str, group: str, index: int) -> LabelledImage:
        # A folder has no pictures of nothing, so words are read on plain colours.
        key = f"{split}/{group}/{index}"
        shade = np.random.default_rng([seed, zlib.crc32(key.encode())]).integers(0, 256, 3)
        red, green, blue = (int(v) for v in shade)
        return LabelledImage(key, -1, lambda: Image.new("RGB", (224, 224), (red, green, blue)))

    listing = [
        f"{p.relative_to(root).as_posix()}:{p.stat().st_size}:{p.stat().st_mtime_ns}"
        for s in SPLITS
        for c in files[s].values()
        for p in c
    ]
    content = hashlib.sha256("\n".join(sorted(listing)).encode()).hexdigest()[:16]
    return ImageSource(
        "folder", tuple(c.replace("_", " ") for c in classes), pictures, background, f"folder-{content}"
    )


def _shuffled(paths: list[Path], rng: np.random.Generator) -> list[Path]:
    return [paths[i] for i in rng.permutation(len(paths))]


def _split_of(key: str) -> str:
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.6 else "validation" if share < 0.8 else "test"


def _decoded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


SOURCES: dict[str, Callable[[str, int], ImageSource]] = {"demo": _demo, "folder": _folder}
