"""Where labelled pictures come from: folders, tables, WebDataset shards, torchvision's data sets.

Each format lists the pictures of a place without reading them. What all have in common from there on (splits,
the choice of pictures) is in ``datasets.py``.
"""

from collections.abc import Callable

from clippo.data.formats.folder import list_folder
from clippo.data.formats.listing import SPLITS, Listing, Picture
from clippo.data.formats.table import list_table
from clippo.data.formats.torchvision_sets import list_torchvision
from clippo.data.formats.webdataset import list_webdataset

__all__ = ["FORMATS", "SPLITS", "Listing", "Picture"]

FORMATS: dict[str, Callable[[str], Listing]] = {
    "folder": list_folder,
    "table": list_table,
    "webdataset": list_webdataset,
    "torchvision": list_torchvision,
}
