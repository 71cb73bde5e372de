"""What weights want of who loads them, from open_clip or their file, and the lines of Python that do so."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import open_clip
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError, safe_open

from clippo import demo

PREPROCESSING = {
    "image_mean": "mean", "image_std": "std", "image_interpolation": "interpolation",
    "image_resize_mode": "resize_mode",
}  # fmt: skip
"""Flags of open_clip.create_model_and_transforms, by what they set."""
ARCHITECTURE, PREPROCESSED = "clippo.architecture", "clippo.preprocessing"
"""Keys of the metadata of an exported file."""


def published(name: str, pretrained: str | None) -> dict[str, Any]:
    """What open_clip says of published weights: their preprocessing and activation; empty of others."""
    return dict(open_clip.get_pretrained_cfg(name, pretrained)) if pretrained else {}


def architecture(name: str, pretrained: str | None) -> str:
    """The name under which open_clip makes the very architecture that the weights want."""
    other = f"{name}-quickgelu"
    wanted = published(name, pretrained).get("quick_gelu") and other in open_clip.list_models()
    return other if wanted else name


class Wanted(NamedTuple):
    """What weights in a file want of who loads them; empty: nobody says."""

    architecture: str
    preprocessing: dict[str, Any]


def metadata_of(name: str, pretrained: str | None, preprocessing: Mapping[str, Any]) -> dict[str, str]:
    """What is written into a file of weights that were tuned from a model, for `wanted_by`."""
    kept = {key: preprocessing[key] for key in PREPROCESSING.values() if key in preprocessing}
    return {ARCHITECTURE: architecture(name, pretrained), PREPROCESSED: json.dumps(kept)}


def wanted_by(pretrained: str | None) -> Wanted:
    """What an exported file says; empty of a tag and of other files.

    >>> wanted_by("openai").architecture
    ''
    """
    metadata: dict[str, str] = {}
    if pretrained and pretrained.endswith(".safetensors") and os.path.isfile(pretrained):
        with contextlib.suppress(SafetensorError, OSError), safe_open(pretrained, "pt") as file:
            metadata = file.metadata() or {}
    kept = json.loads(metadata.get(PREPROCESSED, "{}"))
    preprocessing = {key: tuple(v) if isinstance(v, list) else v for key, v in kept.items()}
    return Wanted(metadata.get(ARCHITECTURE, ""), preprocessing)


def usage(name: str, pretrained: str | None, out: str, preprocessing: Mapping[str, Any] | None = None) -> str:
    """Python that loads weights tuned from a model, with the preprocessing that it was tuned with.

    Args:
        out: the exported file, or the exported folder of a model from ``hf-hub:`` or ``local-dir:``.
        preprocessing: of the loaded model; None: that of its published weights, or what their file says.
    """
    lines = ["import open_clip"]
    if name == demo.MODEL_NAME:
        lines += ["from clippo import demo", "", "demo.register()"]
    if ":" in name:
        called = quoted(f"local-dir:{out}")
    else:
        known = published(name, pretrained) | wanted_by(pretrained).preprocessing
        taken = known if preprocessing is None else preprocessing
        usual = asdict(PreprocessCfg())
        others = {flag: taken[key] for flag, key in PREPROCESSING.items() if key in taken}
        flags = "".join(f", {f}={v!r}" for f, v in others.items() if v != usual[PREPROCESSING[f]])
        called = f"{quoted(architecture(name, pretrained))}, pretrained={quoted(out)}{flags}"
    return "\n".join([*lines, f"model, _, preprocess = open_clip.create_model_and_transforms({called})"])


def quoted(text: str) -> str:
    r"""A Python string in double quotes.

    >>> print(quoted("tuned.safetensors"), quoted('a "b"\\c'))
    "tuned.safetensors" "a \"b\"\\c"
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
