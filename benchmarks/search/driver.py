"""What the driver itself costs: processor time per trial for proposing settings and taking in a result.

The trials do nothing. Each sampler of the sweep is given so many finished trials, and then some more are
proposed and ended, one after another while others run. A sampler that is too slow for that is stopped after a
while, and what it had done by then is what there is. Processor time, of all threads, since the other
processes of a machine do not change it much.
"""

from __future__ import annotations

import logging
import multiprocessing
import resource
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import optuna

from benchmarks.common import RESULTS, Line, Spread, finish, load, program, results_folder, the_console
from benchmarks.search.simulate import OBJECTIVES
from clippo.config import SearchConfig
from clippo.sweep.search import Outcome, Search
from clippo.sweep.space import draw

SAMPLERS: tuple[str, ...] = get_args(get_type_hints(SearchConfig)["sampler"])
TPE_GOAL = 0.5
RUNNING = 4  # trials that are under way while one is proposed


def numbers(settings: Mapping[str, Any], rng: np.random.Generator) -> dict[str, float]:
    """Objectives that pull in two directions, with some noise: what is tuned harder forgets more."""
    hard = np.log(settings["learning_rate"] / settings["kl_weight"])
    robustness = 1 / (1 + np.exp(-0.5 * (hard + 10)))
    noise_2 = rng.normal(0, 0.02, 2)
    return {"robustness": float(robustness + noise_2[0]), "retention": float(1 - robustness**4 + noise_2[1])}


def history(n: int, seed: int) -> list[tuple[Mapping[str, Any], Outcome]]:
    """Finished trials with random settings."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    rng, config = np.random.default_rng(seed), SearchConfig()
    drawn = [draw(study.ask(), config, "image") for _ in range(n)]
    return [(settings, Outcome(numbers(settings, rng))) for settings in drawn]


def work(sampler: str, finished: int, repeats: int, measured: Connection) -> None:
    """Sends the processor time of the preparation and then of each proposed and ended trial [s]."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    logging.disable(logging.WARNING)
    known = history(finished, seed=0)
    config = SearchConfig(
        trials=finished + repeats + RUNNING, concurrency=RUNNING, sampler=sampler,  # type: ignore[arg-type]
        objectives=OBJECTIVES.names,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    began = time.process_time()
    search = Search(config, lambda report: numbers(report["settings"], rng), OBJECTIVES, known=known)
    proposed = [search.suggest(str(i)) for i in range(RUNNING)]
    measured.send(time.process_time() - began)
    for i in range(repeats):
        began = time.process_time()
        oldest = proposed.pop(0)
        assert isinstance(oldest, dict)
        search.on_trial_complete(str(i), oldest)
        proposed.append(search.suggest(str(i + RUNNING)))
        measured.send(time.process_time() - began)
    measured.close()


def measure(sampler: str, finished: int, repeats: int, bound: float) -> tuple[list[float], float]:
    """Processor time of the preparation and of each trial, fewer than asked for when ``bound`` is over [s].

    And what the whole process took, which is a bound where not even one trial was done.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sampler, finished, repeats, sending))
    before = _of_children()
    process.start()
    sending.close()
    seconds: list[float] = []
    end = time.monotonic() + bound
    try:
        while receiving.poll(max(0.0, end - time.monotonic())):
            seconds.append(receiving.recv())
    except EOFError:  # it is done
        process.join()
        if process.exitcode:
            raise SystemExit(f"{sampler} with {finished} trials failed") from None
    process.terminate()
    process.join()
    return seconds, _of_children() - before


def _of_children() -> float:
    """Processor time of the processes that have ended [s]."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def lines_of(sampler: str, finished: int, seconds: Sequence[float], spent: float) -> list[Line]:
    """The line of one sampler and size; where not even one trial was done in time, what was spent on it."""
    largest_tpe = sampler == "tpe" and finished >= 5000
    goal = TPE_GOAL if largest_tpe else None
    what = f"{sampler}, {finished} finished trials"
    if len(seconds) < 2:
        return [Line(f"{what}: not one after", Spread.of([spent]), "s", goal, at_least=False)]
    return [Line(what, Spread.of(seconds[1:]), "s", goal, at_least=False)]


def main(
    *, sizes: tuple[int, ...] = (100, 1_000, 5_000), samplers: tuple[str, ...] = SAMPLERS,
    repeats: int = 20, bound: float = 60.0, smoke: bool = False, results: Path = RESULTS,
) -> None:  # fmt: skip
    """Times the driver.

    Args:
        sizes: trials that have finished before [count].
        samplers: which samplers.
        repeats: trials that are timed for each [count].
        bound: wall time for each sampler and size, preparation included [s].
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
    """
    if smoke:
        sizes, samplers, repeats = (8,), ("tpe", "random"), 2
    console, load_before = the_console(), load()
    lines, seconds = [], {}
    for sampler in samplers:
        for finished in sizes:
            found, spent = measure(sampler, finished, repeats, bound)
            seconds[f"{sampler}-{finished}"] = found
            lines += lines_of(sampler, finished, found, spent)
            console.print(f"{lines[-1].what}: {lines[-1].value} s", highlight=False)
    finish(
        "search-driver", lines, results_folder(results, smoke), console,
        settings={
            "sizes": sizes, "samplers": samplers, "repeats": repeats, "bound": bound, "running": RUNNING,
        },
        load_before=load_before, seconds=seconds,
    )  # fmt: skip


if __name__ == "__main__":
    program(main, __doc__)
