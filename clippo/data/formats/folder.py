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
    """``class/picture``, or ``split/class/picture`` with any of ``SPLIT_NAMES``, in any case."""
    files = [f for f in find(root, 3) if f.name.lower().endswith(IMAGE_SUFFIXES) and "/" in f.name]
    split_of = {top: SPLIT_NAMES.get(top.lower()) for top in {f.name.split("/")[0] for f in files}}
    found = set(split_of.values())
    by_split = found.issuperset(SPLITS) or None not in found
    pictures, stamps = [], []
    for file in files:
        *above, label, _ = file.name.split("/")
        if len(above) == by_split and (not by_split or split_of[above[0]]):
            split = split_of[above[0]] if by_split else None
            pictures.append(Picture(file.name, label, split, Bytes(file.path)))
            stamps.append(f"{file.name}:{file.stamp}")
    return Listing(
        layout="each a folder of pictures named after the class",
        pictures=pictures,
        load=load_bytes,
        stamps=stamps,
        indexed=False,
    )
