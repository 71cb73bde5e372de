"""Runs a sweep: prepare, search, confirm, keep the rows, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any

from ray import tune
from rich.console import Console
from rich.text import Text

from clippo.config import SweepConfig, absolute, digest
from clippo.data.prompts import without_file
from clippo.errors import ConfigError, StoreError
from clippo.evaluate import Counts
from clippo.front.counts import REFERENCE
from clippo.front.front import PREFERENCE, Front
from clippo.front.points import front_of
from clippo.prepared import fetch, open_prepared
from clippo.results import ENDED, INTERRUPTED, RUNNING, SpooledStore
from clippo.sweep import confirm
from clippo.sweep.callback import SweepCallback
from clippo.sweep.checks import check_settings
from clippo.sweep.cluster import check_resources, joined_ray, preparing_workers
from clippo.sweep.contenders import Contenders
from clippo.sweep.earlier import budget_of, in_search, is_finished, started_trials
from clippo.sweep.examples import write_examples
from clippo.sweep.metrics import SweepMetrics
from clippo.sweep.mirror import Mirror
from clippo.sweep.preparing import prepared_for
from clippo.sweep.progress import ProgressView
from clippo.sweep.rows import FinishedTrial, Scorer, TrialRows, finished_trials
from clippo.sweep.scheduler import StoppingScheduler, rule_of
from clippo.sweep.search import Numbers, Proposal, Search, slowness
from clippo.sweep.space import baseline
from clippo.sweep.stored import is_resumed, stored
from clippo.sweep.tracking import Tracking
from clippo.sweep.trial import tune_trial
from clippo.sweep.tuning import refuse_unfinished, run_trials
from clippo.sweep.warm_start import known_trials
from clippo.tasks import resolved, task_named
from clippo.train.batches import check_batches
from clippo.train.ray_train import measure_reference


def run_sweep(config: SweepConfig, console: Console) -> Front:
    """Runs or resumes a sweep and returns its front. A finished sweep is only read.

    Raises:
        ConfigError: a setting that cannot be used, or a name that belongs to another configuration.
        StoreError: the result store cannot be used.
        ResourceError: more asked for than the cluster has.
    """
    config = named(absolute(config))
    check_settings(config)
    prompt = without_file(config.model.prompt)
    config = resolved(dataclasses.replace(config, model=dataclasses.replace(config.model, prompt=prompt)))
    # What the store does not take while it is away waits on local disk.
    with SpooledStore(config.results, report=partial(_say, console)) as store:
        store.check()
        resumed = is_resumed(store, config)
        finished = finished_trials(store, config.name) if resumed else {}
        began = f" {'resumed' if resumed else 'started'}, results in {store.uri}"
        _say(console, Text.assemble("sweep ", (config.name, "bold"), began))
        if not is_finished(config, store, finished):
            if resumed and (store.state(config.name) or {}).get("state") == RUNNING:
                _say(console, "its last driver did not end in good order; if it still runs, stop one of them")
            with joined_ray(config):
                told = check_resources(config)
                if config.autoscaling:
                    _say(console, told)
                _Sweep(config, store, console, finished, resumed).run()
        return front_of(store, config.name)


def named(config: SweepConfig) -> SweepConfig:
    """The configuration with a name; a new one is made of date and digest."""
    if config.name:
        return config
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return dataclasses.replace(config, name=f"{config.task}-{stamp}-{digest(config)[:6]}")


class _Sweep:
    """One run of a sweep: what it has found in the store, and what all of its steps need."""

    def __init__(
        self, config: SweepConfig, store: SpooledStore, console: Console,
        finished: Mapping[str, FinishedTrial], resumed: bool,
    ) -> None:  # fmt: skip
        self._config, self._store, self._console, self._finished = config, store, console, finished
        self._scorer = Scorer(config)
        self._objectives = self._scorer.objectives
        self._watchers: list[Tracking | SweepMetrics] = []
        if config.track:
            self._watchers.append(Tracking(config, self._score, self._say))
        self._known, left_out = known_trials(config)
        if config.search.warm_start:
            self._say(
                f"warm start from {len(self._known)} trials"
                + (f"; {left_out} others lie outside of this search's ranges" if left_out else "")
            )
        if (slow := slowness(config.search, len(self._known))) is not None:
            self._say(slow)
        self._shared = prepared_for(config, store, console, workers=preparing_workers(config))
        self._prepared = open_prepared(fetch(self._shared.prepared, self._shared.location))
        for kind in config.search.pairs or ("",):
            for without in (None, *range(self._prepared.folds)):
                pairs = len(self._prepared.pairs(kind, without).clean)
                check_batches(pairs, config.train.batch_size, max(1, config.max_workers))
        self._reference = self._measured_reference(resumed)
        self._numbers = {i: self._scorer.outcome(t, self._reference) for i, t in finished.items()}
        self._contenders = Contenders(
            reference=tuple(self._reference), objectives=self._objectives, rivals=self._rivals()
        )

    def run(self) -> None:
        """Searches, confirms, and keeps pictures for the report."""
        config, store = self._config, self._store
        untouched = self._scorer.numbers(self._reference, self._reference)
        total = config.search.trials + len(config.search.baselines) + config.search.confirm
        view = ProgressView(self._console, total, self._objectives, untouched)
        ended = [o.numbers for i, o in self._numbers.items() if i != REFERENCE]
        reached = [n for n in ended if n]
        view.resumed(reached, failed=len(ended) - len(reached))
        known = [untouched, *reached]
        self._watchers.append(SweepMetrics(config.name, self._score, self._objectives, known))
        with self._noted(total):
            if store.examples(config.name).num_rows:  # of an earlier end; it would be out of date
                store.write_examples(config.name, [])
            with view:
                if (reason := self._search(view, untouched)) is not None:
                    self._say(f"no more trials: {reason}")
                self._confirm(view)
            write_examples(config, store, self._shared)

    @contextlib.contextmanager
    def _noted(self, trials: int) -> Iterator[None]:
        """Tells those who follow the sweep that it runs, and how that ended."""
        note = partial(self._store.write_state, self._config.name, trials=trials)
        note(RUNNING)
        self._store.sweep_began()
        try:
            yield
        except BaseException:
            with contextlib.suppress(StoreError):  # what ended the sweep is said
                note(INTERRUPTED)
            raise
        note(ENDED)

    def _measured_reference(self, resumed: bool) -> list[Counts]:
        """The counts of the untouched model; they open a new sweep.

        Raises:
            ConfigError: the pictures or the weights are not those that the sweep began with, or the
                objectives cannot be computed.
        """
        config, measured = self._config, self._finished.get(REFERENCE)
        if measured is not None:
            if measured.prepared_digest != self._prepared.digest:
                raise ConfigError(
                    f"the pictures or the weights of sweep {config.name!r} are not those that it began with; "
                    "bring them back or choose another --name"
                )
            return measured.counts
        began = time.time()
        reference = measure_reference(self._shared, gpus=config.gpus_per_worker)
        self._scorer.numbers(reference, reference)
        # The name is taken when nothing can be wrong with the configuration any more.
        if not resumed:
            self._store.write_config(config.name, stored(config))
        report = {
            "epoch": 0, "step": 0, "metrics": {}, "busy_s": 0.0, "precision": config.train.precision,
            "evals": [dataclasses.asdict(c) for c in reference],
        }  # fmt: skip
        TrialRows(config, self._store, self._prepared).write(REFERENCE, 0, {}, [report], began=began)
        return reference

    def _rivals(self) -> tuple[tuple[float, float], ...] | None:
        """What a trial's points must not be beaten by to be measured on test pictures; None: all are.

        Methods are compared with each other, so the points of the search have only each other as rivals. The
        mean of several seeds may be on the front when none of them is, and other objectives have a front of
        their own.
        """
        search = self._config.search
        if search.replicates > 1 or set(search.objectives) != set(self._objectives.names):
            return None
        if not any(i.isdigit() for i in self._finished):
            return ()
        front = front_of(self._store, self._config.name)
        own = [p for p in front.points if p.method == PREFERENCE]
        return tuple((self._objectives.goal.gain(p.goal), p.retention) for p in own)

    def _search(self, view: ProgressView, untouched: Numbers) -> str | None:
        """Runs the trials of the search and those to compare with; says why it ended before its last one."""
        config, search_config = self._config, self._config.search
        budget = budget_of(config, self._objectives, untouched, self._finished, self._numbers)
        started = started_trials(self._store, config.name)
        unfinished = [p for i, p in started.items() if i not in self._finished and in_search(i)]
        seed, task = {"seed": search_config.seed}, task_named(config.task)
        others = [
            Proposal(name, 0, baseline(name, search_config, config.model.trainable, task) | seed)
            for name in search_config.baselines
            if name not in started
        ]
        mirror = None
        if search_config.mirror:
            mirror = Mirror(search_config, self._objectives, config.name, self._store.uri, self._say)

        def ended(trial_id: str, device_s: float, numbers: Numbers | None, counts: list[Counts]) -> None:
            budget.spend(device_s, numbers, searched=trial_id.isdigit())
            if trial_id.isdigit() and numbers is not None:
                self._contenders = self._contenders.after(counts)

        callback = SweepCallback(TrialRows(config, self._store, self._prepared), self._score, view, ended)
        scheduler = self._scheduler(callback)
        search = Search(
            search_config,
            self._score,
            self._objectives,
            trainable=config.model.trainable,
            finished={
                int(i): (t.settings, self._numbers[i]) for i, t in self._finished.items() if i.isdigit()
            },
            unfinished=unfinished,
            others=others,
            known=self._known,
            exhausted=budget.exhausted,
            was_stopped=scheduler.stopped.__contains__ if scheduler else lambda trial_id: False,
            on_start=partial(self._note_start, callback),
            context=lambda trial_id: {"rivals": self._contenders.rivals if trial_id.isdigit() else None},
            on_told=mirror.told if mirror else lambda trial: None,
        )
        run_trials(config, self._trainable(config), search, callback, self._watchers, scheduler)
        return search.ended

    def _confirm(self, view: ProgressView) -> None:
        """Trains settings of the front once more."""
        wanted = confirm.proposals(self._config, front_of(self._store, self._config.name))
        started = started_trials(self._store, self._config.name)
        missing = [started.get(p.trial_id, p) for p in wanted if p.trial_id not in self._finished]
        if not missing:
            return
        config = confirm.with_workers(self._config)
        callback = SweepCallback(TrialRows(config, self._store, self._prepared), self._score, view)
        again = [p for p in missing if p.trial_id in started]
        search = Search(
            dataclasses.replace(config.search, trials=1),
            self._score,
            self._objectives,
            unfinished=again,
            others=[p for p in missing if p not in again],
            on_start=partial(self._note_start, callback),
            exhausted=lambda: "only the settings of the front",
        )
        run_trials(config, self._trainable(config), search, callback, self._watchers)

    def _note_start(
        self, callback: SweepCallback, trial_id: str, attempt: int, settings: dict[str, Any]
    ) -> None:
        """Notes that a trial has begun; none does any more once the store was away from one for too long.

        Raises:
            StoreError: it was; or another driver has begun this trial.
        """
        refuse_unfinished(callback)
        self._store.write_started(self._config.name, trial_id, attempt, settings)

    def _score(self, report: Mapping[str, Any]) -> Numbers | None:
        return self._scorer.of_report(report, self._reference)

    def _scheduler(self, callback: SweepCallback) -> StoppingScheduler | None:
        """Early stopping, which knows how trials of earlier runs stood at the rungs."""
        search = self._config.search
        if (rule := rule_of(search)) is None:
            return None

        def maximised(numbers: Numbers) -> list[float]:
            own = self._objectives
            return [numbers[o] if own.is_maximised(o) else -numbers[o] for o in search.objectives]

        def score(report: Mapping[str, Any]) -> list[float] | None:
            numbers = self._score(report)
            return None if numbers is None else maximised(numbers)

        for trial_id, trial in sorted(self._finished.items(), key=lambda item: item[1].finished_at):
            for epoch, counts in trial.by_epoch.items() if trial_id.isdigit() else ():
                if epoch == trial.settings["epochs"]:
                    continue  # it had finished, and was compared with nobody
                spent = trial.device_s * epoch / max(trial.by_epoch)
                numbers = self._scorer.numbers(counts, self._reference, spent)
                rule.record(trial_id, epoch, maximised(numbers))
        return StoppingScheduler(rule, score, on_decision=callback.decided)

    def _trainable(self, config: SweepConfig) -> Any:
        return tune.with_parameters(
            tune_trial, sweep=config, store=self._store, shared=self._shared, contenders=self._contenders
        )

    def _say(self, line: str) -> None:
        _say(self._console, line)


def _say(console: Console, line: str | Text) -> None:
    """Prints a line as it is: in a plain string rich would read brackets of a path as styles."""
    console.print(Text(line) if isinstance(line, str) else line, soft_wrap=True)
