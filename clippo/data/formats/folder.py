"""A folder per class."""

from __future__ import annotations

from clippo.data.files import find
from clippo.data.formats.listing import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    Bytes,
    Listing,
    Picture,
    load_bytes,
)


def list_folder(root: str) -> Listing:
    """``class/picture``, or ``split/class/picture``."""
    files = [f for f in find(root, 3) if f.name.lower().endswith(IMAGE_SUFFIXES) and "/" in f.name]
    tops = {f.name.split("/")[0] for f in files}
    by_split = tops.issuperset(SPLITS) or tops.issubset(SPLIT_NAMES)
    pictures, stamps = [], []
    for file in files:
        *above, label, _ = file.name.split("/")
        if len(above) == by_split and (not by_split or above[0] in SPLIT_NAMES):
            split = SPLIT_NAMES[above[0]] if by_split else None
            pictures.append(Picture(file.name, label, split, Bytes(file.path)))
            stamps.append(f"{file.name}:{file.stamp}")
    return Listing(
        layout="each a folder of pictures named after the class",
        pictures=pictures,
        load=load_bytes,
        stamps=stamps,
        indexed=False,
    )
