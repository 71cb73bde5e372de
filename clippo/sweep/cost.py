"""What a sweep takes: work counted from its configuration, and hours and money by a measured speed."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from clippo.config import SweepConfig, digest
from clippo.errors import ConfigError
from clippo.remote import node_cache
from clippo.results.objects import write_whole
from clippo.tasks import objectives_of, task_named
from clippo.tasks.base import joined_name

PRICES = {"CPU": 0.045, "T4": 0.526, "L4": 0.805, "A10G": 1.006, "L40S": 1.861}
"""List prices of AWS on demand in us-east-1 as of 2025 [USD an hour]: a vCPU of c7i, and the smallest
instance with such a GPU (g4dn, g6, g5 and g6e.xlarge; https://aws.amazon.com/ec2/pricing/on-demand/). Spot
costs less; prices of larger GPUs change too often to be listed."""


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        pairs: that an average trial trains on.
        measured: pictures that an average trial measures, where all of its points are measured on test
            pictures.
        prepared: pictures to prepare, once.
    """

    pairs: float
    measured: float
    prepared: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a short trial was [s]: for each pair of a step, each picture measured, each picture prepared.

    Attributes:
        device: ``CPU``, or what the GPU calls itself.
        price: of such a device for an hour, in any currency; None: the list price.
        at: when it was measured, ISO 8601.
    """

    pair: float
    measured: float
    prepared: float
    device: str = "CPU"
    price: float | None = None
    at: str = ""


def work_of(config: SweepConfig) -> Work:
    """Counts the work from the configuration and the number of pictures that there are.

    Raises:
        ClippoError: the pictures are not there.

    >>> work_of(SweepConfig()).pairs
    1536.0
    """
    task = task_named(config.task)(config.data)
    epochs = sum(config.search.epochs) / 2
    evaluation: dict[str, int] = defaultdict(int)
    for part in task.parts.values():
        for name in part.sets if part.name != "train" else ():
            evaluation[joined_name(name, part.fold)] += len(part.pictures)
    on_tower = config.model.trainable != "transform"
    curve = len(config.train.alphas if on_tower else config.train.powers)
    curve_sets = objectives_of(config).curve_sets
    # The average after every epoch; after the last also the last weights, and the curve on what counts.
    measured = (epochs - 1) * sum(n for name, n in evaluation.items() if name.startswith("validation/"))
    measured += 2 * sum(evaluation.values())
    measured += curve * sum(n for name, n in evaluation.items() if name.partition("/")[2] in curve_sets)
    return Work(
        pairs=epochs * task.n_pairs,
        measured=measured,
        prepared=sum(part.n_rows for part in task.parts.values()),
    )


def trials_of(config: SweepConfig) -> int:
    """Trials of the search and those to compare with; confirming ones come on top."""
    return config.search.trials + len(config.search.baselines)


def estimate(config: SweepConfig, work: Work, speed: Speed) -> Iterator[tuple[str, str]]:
    """Time and cost of a trial, of the sweep and of preparing, if all is as fast as a short trial was."""
    processes, search, trials = max(1, config.min_workers), config.search, trials_of(config)
    trial = (work.pairs * speed.pair + work.measured * speed.measured) / processes
    over = f", over {processes} workers without what they tell each other" if processes > 1 else ""
    yield (
        "a trial",
        f"{duration(trial)}: {work.pairs:g} pairs x {1e3 * speed.pair:.3g} ms + "
        f"{work.measured:g} measured x {1e3 * speed.measured:.3g} ms{over}",
    )
    kind = "GPU" if config.gpus_per_worker else "CPU"
    hours = trials * trial * processes * (config.gpus_per_worker or 1.0) / 3600
    yield (
        "the sweep",
        f"{3600 * search.concurrency / trial:.3g} trials an hour, {hours:.3g} {kind}-hours"
        f"{_cost(hours, speed)} and {duration(trials * trial / search.concurrency)} for {trials} trials",
    )
    yield (
        "preparing",
        f"{duration(work.prepared * speed.prepared)} of one CPU for {work.prepared} pictures, once",
    )


def _cost(hours: float, speed: Speed) -> str:
    if speed.price is not None:
        return f", {hours * speed.price:.2f} at {speed.price:g} each"
    price = price_of(speed.device, PRICES)
    if price is None:
        return f" (no list price of {speed.device}: --prices or --price-per-device-hour)"
    return f", {hours * price:.2f} USD at {price:g} each (on demand; else --prices FILE)"


def price_of(device: str, prices: Mapping[str, float]) -> float | None:
    """The price of a device by what it calls itself: of the names whose words it has, that with the most.

    Of several with as many words it is the dearest.

    >>> price_of("NVIDIA A10G", PRICES), price_of("Tesla T4", PRICES), price_of("NVIDIA H100", PRICES)
    (1.006, 0.526, None)
    >>> price_of("NVIDIA A100-SXM4-80GB", {"": 1.0, "A100": 2.0, "a100 80gb": 3.0})
    3.0
    """
    words = _words(device)
    return max(((len(_words(n)), p) for n, p in prices.items() if _words(n) <= words), default=(0, None))[1]


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", name.casefold()))


def read_prices(path: str) -> dict[str, float]:
    """A table of prices: a CSV file whose lines are a device and its price for an hour, without a header.

    Raises:
        ConfigError: there is no such file, or a line is something else.
    """
    prices = {}
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file, skipinitialspace=True), start=1):
                if not row:
                    continue
                try:
                    name, price = row[0], float(row[1])
                except (IndexError, ValueError):
                    name, price = "", math.nan
                if len(row) != 2 or not _words(name) or not 0 <= price < math.inf:
                    raise ConfigError(
                        f"--prices {path}: line {number} is {','.join(row)!r}; write a device and its price "
                        "for an hour, 0 or more, such as 'A100,3.67'"
                    )
                prices[name] = price
    except (OSError, UnicodeError, csv.Error) as error:
        raise ConfigError(f"--prices {path} cannot be read ({error}); give a CSV file") from None
    return prices


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def remember(config: SweepConfig, speed: Speed) -> None:
    """Keeps a measured speed in this machine's cache, for dry runs of sweeps that train alike."""
    now = datetime.now(timezone.utc).isoformat(timespec="minutes")
    path = _path(config)
    with contextlib.suppress(OSError):  # it only informs
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(speed) | {"at": now}).encode())


def remembered(config: SweepConfig) -> Speed | None:
    """The speed that was last measured for a sweep that trains like this one."""
    with contextlib.suppress(OSError, ValueError, TypeError):  # none, or of another version
        return Speed(**json.loads(_path(config).read_bytes()))
    return None


def _path(config: SweepConfig) -> Path:
    data = (config.data.source, config.data.picture_size, config.data.folds)
    alike = digest(config.task, config.model, config.train, config.workers, config.gpus_per_worker, *data)
    return node_cache() / "speeds" / f"{alike}.json"
