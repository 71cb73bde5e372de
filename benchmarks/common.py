"""What the benchmarks share: things timed side by side, the machine, the table and the JSON of a run."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import tyro
from open_clip import factory
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from clippo.config import DataConfig, ModelConfig
from clippo.demo import CLASSES
from clippo.model import ClipModel, load_clip
from clippo.prepared import Location, PreparedSet, fetch, open_prepared, prepare, text_features
from clippo.train.step import Frozen, has_native_bf16

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Precision = Literal["auto", "fp32", "bf16", "fp16"]
BUNDLED = "clippo-demo"
TINY = "clippo-benchmark-tiny"
TINY_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
"""A vision transformer for smoke runs."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value or more.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.5, high=2.5, n=3)
        """
        low, median, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high, len(values))

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.median:.4g}"
        return f"{self.median:.4g} ({self.low:.4g}-{self.high:.4g})"


@dataclass(frozen=True)
class Line:
    """One line of a result.

    Attributes:
        unit: of the value; ``x`` for a ratio.
        goal: the bound that was set beforehand, None where there is none.
        at_least: whether the goal is a lower bound.
    """

    what: str
    value: Spread
    unit: str
    goal: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value.median >= self.goal if self.at_least else self.value.median <= self.goal


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio of each round, so that a moment when the machine was busy hits both sides of it."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def alternate(
    runs: Mapping[str, Callable[[], float]], rounds: int, console: Console
) -> dict[str, list[float]]:
    """Runs A B A B ... and returns what each run measured [seconds], round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1, rounds + 1):
        for name, run in runs.items():
            seconds[name].append(run())
            console.print(f"round {number}/{rounds}  {name}: {seconds[name][-1]:.4g} s", highlight=False)
    return seconds


def seconds_of(run: Callable[[], object], device: torch.device, *, at_least: float = 0.0) -> float:
    """Seconds of one call; calls are repeated until ``at_least`` seconds are over, and averaged."""
    synchronize(device)
    began, calls = time.perf_counter(), 0
    while True:
        run()
        calls += 1
        synchronize(device)
        if (spent := time.perf_counter() - began) >= at_least:
            return spent / calls


def synchronize(device: torch.device) -> None:
    """Waits for the device: work is handed to a GPU before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def the_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- models and pictures ------------------------------------------------------------------------------------


def random_model(name: str, folder: Path) -> ModelConfig:
    """An open_clip model with random weights, in a file, so that all that load it have the same ones.

    The bundled model comes with its own weights.
    """
    if name == BUNDLED:
        return ModelConfig()
    factory._MODEL_CONFIGS[TINY] = TINY_CONFIG  # as demo.register does
    path = folder / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        logging.disable(logging.WARNING)  # open_clip warns of random weights
        model = open_clip.create_model(name)
        logging.disable(logging.NOTSET)
        save_file({n: w.contiguous() for n, w in model.state_dict().items()}, path)
    return ModelConfig(name=name, pretrained=str(path))


def data_of(pictures: int, *, prompts: int = 64, eval_pictures: int = 1) -> DataConfig:
    """Bundled pictures of as many classes as there shall be prompts, of the 128 that there are."""
    return DataConfig(train_pictures=pictures, seen_share=prompts / len(CLASSES), eval_pictures=eval_pictures)


def prepared_folder(data: DataConfig, model: ModelConfig, folder: Path, *, workers: int = 1) -> Path:
    """Builds the prepared set below ``folder`` unless it is there."""
    threads, location = torch.get_num_threads(), Location(folder)
    built = fetch(prepare("typographic", data, model, location, workers=workers), location)
    torch.set_num_threads(threads)  # building in this process takes one
    return built


def opened(
    folder: Path, model: ModelConfig, clip: ClipModel | None = None
) -> tuple[ClipModel, PreparedSet, Frozen]:
    """The model (unless it is there), its prepared set, and the text features of the classes."""
    clip, prepared = clip or load_clip(model.name, model.pretrained), open_prepared(folder)
    templates = prepared.templates_per_class(model.prompt)
    text_CD = text_features(clip, prepared.classes, templates, Location(folder.parent))
    return clip, prepared, Frozen(text_CD, clip.logit_scale)


class NoCheckpoints:
    """Writes nothing: what is timed is training."""

    def write(self, name: str, data: bytes) -> None:
        pass

    def read(self, name: str) -> bytes | None:
        return None


# --- programs -----------------------------------------------------------------------------------------------


def the_console() -> Console:
    """A console that is wide enough for the tables where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def program(main: Callable[..., None], module_doc: str | None) -> None:
    """Runs a benchmark from its flags."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # or Tune prints tables of its own
    tyro.cli(main, description=inspect.cleandoc(module_doc or ""))


def results_folder(results: Path, smoke: bool) -> Path:
    """Where the JSON goes; that of a smoke run never replaces a measurement."""
    if smoke and results == RESULTS:
        results = Path(tempfile.mkdtemp(prefix="clippo-benchmarks-"))
    results.mkdir(parents=True, exist_ok=True)
    return results


def finish(
    name: str, lines: Sequence[Line], results: Path, console: Console, *, settings: Mapping[str, Any],
    load_before: float, **more: Any,
) -> None:  # fmt: skip
    """Prints the table of a benchmark and writes its JSON.

    Args:
        load_before: the machine's load average when the benchmark began.
        more: whatever else the JSON should hold, such as the single measurements.
    """
    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("what", overflow="fold")
    for column in ("median (quartiles)", "unit", "n", "goal", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        goal = "" if line.goal is None else f"{'>=' if line.at_least else '<='} {line.goal:g}"
        met = {True: "yes", False: "NO", None: ""}[line.met]
        table.add_row(line.what, str(line.value), line.unit, str(line.value.n), goal, met)
    console.print(table, highlight=False)
    rows = [
        {
            "what": line.what, "median": line.value.median, "quartiles": [line.value.low, line.value.high],
            "n": line.value.n, "unit": line.unit, "goal": line.goal,
            "goal_is": None if line.goal is None else "at least" if line.at_least else "at most",
            "met": line.met,
        }
        for line in lines
    ]  # fmt: skip
    content = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "command": " ".join(["python -m", _module(), *map(shlex.quote, _flags())]),
        "machine": machine(),
        "load_before_and_after": [load_before, load()],
        "settings": dict(settings),
        "lines": rows,
        **more,
    }
    path = results / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written to {path}", highlight=False, soft_wrap=True)


def load() -> float:
    """The load average of the last minute, of which this benchmark itself is a part."""
    return round(os.getloadavg()[0], 2)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    versions = {n: importlib.metadata.version(n) for n in ("torch", "ray", "open_clip_torch", "numpy")}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        "native_bf16": has_native_bf16(the_device()),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
    }


def _cpu() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _module() -> str:
    """The module that runs."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).stem


def _flags() -> list[str]:
    """The flags of this program, without folders, which are paths of this machine."""
    folders = ("--results", "--cache")
    flags: list[str] = []
    skip = False
    for word in sys.argv[1:]:
        if skip or word.startswith(folders):
            skip = word in folders
            continue
        flags.append(word)
    return flags
