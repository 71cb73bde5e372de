"""The lines of Python that load tuned weights, from what open_clip knows of the model."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError, safe_open

from clippo import demo

PREPROCESSING = {
    "image_mean": "mean", "image_std": "std", "image_interpolation": "interpolation",
    "image_resize_mode": "resize_mode",
}  # fmt: skip
"""Flags of open_clip.create_model_and_transforms, by what they set."""


def published(name: str, pretrained: str | None) -> dict[str, Any]:
    """What open_clip says of published weights: their preprocessing and activation; empty of others."""
    return dict(open_clip.get_pretrained_cfg(name, pretrained)) if pretrained else {}


def architecture(name: str, pretrained: str | None) -> str:
    """The name under which open_clip makes the very architecture that the weights want."""
    other = f"{name}-quickgelu"
    wanted = published(name, pretrained).get("quick_gelu") and other in open_clip.list_models()
    return other if wanted else name


def described(name: str, pretrained: str | None, preprocessing: Mapping[str, Any]) -> dict[str, str]:
    """What is written into a file of tuned weights, since open_clip asks its user for it: `described_in`."""
    kept = {key: preprocessing[key] for key in PREPROCESSING.values() if key in preprocessing}
    return {"architecture": architecture(name, pretrained), "preprocessing": json.dumps(kept)}


def described_in(path: str | None) -> tuple[str, dict[str, Any]]:
    """Architecture and preprocessing that a file says its weights want; empty of what is no such file.

    >>> described_in("openai")
    ('', {})
    """
    metadata: dict[str, str] = {}
    if path and path.endswith(".safetensors") and os.path.isfile(path):
        with contextlib.suppress(SafetensorError), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    kept = json.loads(metadata.get("preprocessing", "{}"))
    preprocessing = {key: tuple(v) if isinstance(v, list) else v for key, v in kept.items()}
    return metadata.get("architecture", ""), preprocessing


def usage(name: str, pretrained: str | None, out: str, preprocessing: Mapping[str, Any] | None = None) -> str:
    """Python that loads weights tuned from a model, with the preprocessing that it was tuned with.

    Args:
        out: the exported file, or the exported folder of a model from ``hf-hub:`` or ``local-dir:``.
        preprocessing: of the loaded model; None: that of its published weights.
    """
    lines = ["import open_clip"]
    if name == demo.MODEL_NAME:
        lines += ["from clippo import demo", "", "demo.register()"]
    if ":" in name:
        called = quoted(f"local-dir:{out}")
    else:
        taken = published(name, pretrained) if preprocessing is None else preprocessing
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
