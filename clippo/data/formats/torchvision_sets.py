"""Data sets that torchvision knows, downloaded before."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clippo.data.files import is_remote, stamp
from clippo.data.formats.listing import Bytes, Listing, Picture, load_bytes
from clippo.data.local_copy import local_copy
from clippo.data.names import imagenet_names
from clippo.errors import ConfigError

_FLAG: dict[str | None, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_TEST: dict[str | None, dict[str, Any]] = {name: {"split": name} for name in ("train", "test")}
_THREE = _TRAIN_TEST | {"validation": {"split": "val"}}
_NO_SPLIT: dict[str | None, dict[str, Any]] = {None: {}}

# Of each data set with a class for each picture, the splits and how to ask for them.
TORCHVISION: dict[str, dict[str | None, dict[str, Any]]] = {
    "CIFAR10": _FLAG,
    "CIFAR100": _FLAG,
    "Caltech101": _NO_SPLIT,
    "Caltech256": _NO_SPLIT,
    "Country211": _TRAIN_TEST | {"validation": {"split": "valid"}},
    "DTD": _THREE,
    "EuroSAT": _NO_SPLIT,
    "FGVCAircraft": _THREE,
    "FashionMNIST": _FLAG,
    "Flowers102": _THREE,
    "Food101": _TRAIN_TEST,
    "GTSRB": _TRAIN_TEST,
    "ImageFolder": _NO_SPLIT,
    "ImageNet": {"train": {"split": "train"}, "validation": {"split": "val"}},
    "Imagenette": {"train": {"split": "train"}, "validation": {"split": "val"}},
    "KMNIST": _FLAG,
    "MNIST": _FLAG,
    "OxfordIIITPet": _TRAIN_TEST | {"train": {"split": "trainval"}},
    "Places365": {"train": {"split": "train-standard"}, "validation": {"split": "val"}},
    "SEMEION": _NO_SPLIT,
    "STL10": _TRAIN_TEST,
    "SUN397": _NO_SPLIT,
    "SVHN": _TRAIN_TEST,
    "StanfordCars": _TRAIN_TEST,
    "USPS": _FLAG,
}


def list_torchvision(argument: str) -> Listing:
    """``NAME:PATH``: one of torchvision's data sets, which has been downloaded to ``PATH`` before.

    torchvision reads local files only, so a remote folder is copied to this machine once. What names the
    pictures and their state comes from the store then, so that it is the same on every machine.
    """
    name, _, root = argument.partition(":")
    if name not in TORCHVISION:
        near = difflib.get_close_matches(name, TORCHVISION, 5, 0.4) or sorted(TORCHVISION)
        raise ConfigError(
            f"torchvision:{argument}: there is no such data set with classes; "
            f"near are {', '.join(near)} (torchvision:NAME:PATH)"
        )
    copy = local_copy(root) if is_remote(root) else None
    if copy is None and not os.path.isdir(os.path.expanduser(root)):
        raise ConfigError(f"torchvision:{argument}: there is no such folder (torchvision:{name}:PATH)")
    top = copy.folder if copy else Path(root).expanduser().absolute()
    parts = _torchvision_sets(name, top, root)
    names: dict[str, str] = {}
    pictures, stamps = [], []
    for split, dataset in parts.items():
        classes = _classes_of(dataset)
        names.update({c: _readable(c) for c in classes})
        for item, index in _items_of(dataset):
            label = classes[int(index)] if classes else str(int(index))
            if isinstance(item, int):
                pictures.append(Picture(f"{split or 'all'}/{item}", label, split, (split, item)))
            else:
                key = Path(item).relative_to(top).as_posix()
                pictures.append(Picture(key, label, split, Bytes(str(item))))
                if copy is None:
                    stamps.append(f"{key}:{stamp(str(item))}")
        if copy is None and hasattr(dataset, "data"):
            stamps.append(hashlib.sha256(np.ascontiguousarray(dataset.data).data).hexdigest())

    def load(place: Any) -> Image.Image:
        return load_bytes(place) if isinstance(place, Bytes) else parts[place[0]][place[1]][0].convert("RGB")

    return Listing(
        layout=f"as torchvision.datasets.{name} keeps them",
        pictures=pictures,
        load=load,
        stamps=copy.stamps if copy else stamps,
        names=imagenet_names() if name in ("ImageNet", "Imagenette") else names,
    )


def _torchvision_sets(name: str, top: Path, root: str) -> dict[str | None, Any]:
    """The splits of the data set in the folder ``top``, which the user knows as ``root``."""
    import torchvision  # takes seconds

    factory = getattr(torchvision.datasets, name)
    try:
        return {split: factory(top, **options) for split, options in TORCHVISION[name].items()}
    except ImportError as error:
        raise ConfigError(
            f"torchvision.datasets.{name} needs {error.name}; pip install {error.name}"
        ) from error
    except (RuntimeError, OSError) as error:
        remedy = f"torchvision's documentation of {name} says where they come from"
        if "download" in inspect.signature(factory).parameters:
            to, then = ("FOLDER", f" and copy FOLDER to {root}") if is_remote(root) else (str(top), "")
            remedy = f"download them with torchvision.datasets.{name}({to!r}, download=True){then}"
        place = root if is_remote(root) else str(top)
        said = " ".join(str(error).split()).replace(str(top), place)
        raise ConfigError(f"the files of {name} are not in {place} ({said}); {remedy}") from error


def _classes_of(dataset: Any) -> list[str]:
    """The classes as the data set writes them, by index; WordNet ids where it has them."""
    for name in ("wnids", "classes", "categories"):
        if hasattr(dataset, name):
            return list(getattr(dataset, name))
    return []


def _items_of(dataset: Any) -> Iterator[tuple[Any, Any]]:
    """Path, or index where pictures are no files, and class index; these have no common public name."""
    for name in ("samples", "_samples", "imgs"):
        if hasattr(dataset, name):
            yield from getattr(dataset, name)
            return
    for name in ("_image_files", "_images"):
        if hasattr(dataset, name):
            yield from zip(getattr(dataset, name), dataset._labels, strict=True)
            return
    if hasattr(dataset, "categories"):
        [folder] = Path(dataset.root).glob("*_ObjectCategories")
        for index, name in enumerate(dataset.categories):
            yield from ((path, index) for path in (folder / name).glob("*.jpg"))
        return
    yield from enumerate(dataset.targets if hasattr(dataset, "targets") else dataset.labels)


def _readable(name: str) -> str:
    """The name of a class in words.

    >>> [_readable(name) for name in ("AnnualCrop", "apse/indoor", "001.ak47", "0 - zero", "A300B4")]
    ['Annual Crop', 'apse indoor', 'ak47', 'zero', 'A300B4']
    >>> [_readable(name) for name in ("/a/airfield", "/b/basketball_court/indoor")]  # of Places365
    ['airfield', 'basketball court indoor']
    """
    name = re.sub(r"^(/[a-z]/|\d+(\.| - ))", "", name)
    if re.fullmatch(r"([A-Z][a-z]+){2,}", name):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.sub(r"[_/]", " ", name)
