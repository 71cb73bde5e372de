"""Text features of the classes, kept by the digest of what they depend on.

C classes, D embedding
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from clippo.config import digest
from clippo.model import ClipModel
from clippo.prepared.build import weights_digest
from clippo.prepared.location import Location, whole_file
from clippo.remote import locked

BATCH = 512  # prompts that are embedded together


def text_features(
    clip: ClipModel, classes: Sequence[str], templates_per_class: Sequence[Sequence[str]], location: Location
) -> Tensor:
    """The unit-length mean of the unit-length embeddings of each class's prompts, float32 (C, D).

    They are computed once for all trials and kept in ``text-<digest>.safetensors``, so that a changed prompt
    makes a new file and touches nothing else. Processes of one machine that ask at once wait for the first.

    Args:
        templates_per_class: for each class its templates, with ``{}`` in the place of its name.

    Raises:
        StoreError: the location cannot be used.
    """
    name = digest(weights_digest(clip), list(classes), [list(t) for t in templates_per_class])
    key = f"text-{name}.safetensors"
    path = location.cache / key
    if not path.exists():
        with locked(location.cache / f"text-{name}.lock"):
            if not path.exists():
                data = location.read(key) if location.shared is not None else None
                if data is None:
                    features = {"text_features": _embedded(clip, classes, templates_per_class)}
                    location.write(key, save(features))
                else:
                    with location.reporting("write to"), whole_file(path) as temporary:
                        temporary.write_bytes(data)
    return load_file(path)["text_features"]


def _embedded(
    clip: ClipModel, classes: Sequence[str], templates_per_class: Sequence[Sequence[str]]
) -> Tensor:
    prompts = [
        (c, template.format(name))
        for c, (name, templates) in enumerate(zip(classes, templates_per_class, strict=True))
        for template in templates
    ]
    sums_CD: Tensor | None = None
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        embedded_BD = clip.text_features([text for _, text in batch]).cpu()
        if sums_CD is None:
            sums_CD = embedded_BD.new_zeros(len(classes), embedded_BD.shape[1])
        sums_CD.index_add_(0, torch.tensor([c for c, _ in batch]), embedded_BD)
    assert sums_CD is not None
    return F.normalize(sums_CD, dim=-1)
