"""Early stopping: the decisions alone, and then in Ray Tune, which must act on them."""

import json
import math
import os
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ray
import ray.train
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from prometheus_client.parser import text_string_to_metric_families
from ray import tune
from ray.tune.experiment import Trial

from clippo.config import SearchConfig
from clippo.errors import ConfigError
from clippo.sweep.cluster import leftovers_freed
from clippo.sweep.metrics import SweepMetrics
from clippo.sweep.scheduler import Decision, Halving, NoBetter, Rule, StoppingScheduler, epsilon_net, rule_of
from clippo.sweep.search import Proposal, Search
from clippo.train.loop import AGAIN
from tests.front.sweeps import OBJECTIVES

# few values, so that ties, duplicates and constant objectives are the rule; exact in every scale below
value = st.integers(-4, 4).map(lambda i: i / 4)


def clouds(min_size: int = 0, max_size: int = 25) -> st.SearchStrategy[list[list[float]]]:
    return st.integers(1, 3).flatmap(
        lambda m: st.lists(st.lists(value, min_size=m, max_size=m), min_size=min_size, max_size=max_size)
    )


def halving(factor: int = 3, min_epochs: int = 1, max_epochs: int = 10) -> Halving:
    return Halving(min_epochs=min_epochs, reduction_factor=factor, max_epochs=max_epochs)


def arrive(points: list[list[float]], factor: int = 3) -> list[Decision]:
    """The decisions at the first rung for trials that arrive in this order."""
    one = halving(factor)
    return [one.decide(str(i), 1, p) for i, p in enumerate(points)]


def ranks(points: list[list[float]]) -> list[int]:
    """Non-dominated ranks by their definition: one more than the worst rank of those that dominate."""

    def dominates(a: list[float], b: list[float]) -> bool:
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    found: dict[tuple[float, ...], int] = {}
    for p in sorted(points, reverse=True):  # whoever dominates a point comes before it
        found[tuple(p)] = max((found[tuple(q)] + 1 for q in points if dominates(q, p)), default=0)
    return [found[tuple(p)] for p in points]


def test_rungs_are_powers_of_the_reduction_factor_below_the_last_epoch() -> None:
    assert halving(3, 1, 10).rungs == (1, 3, 9)
    assert halving(3, 1, 9).rungs == (1, 3)
    assert halving(2, 3, 20).rungs == (3, 6, 12)
    assert halving(2, 4, 4).rungs == ()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 3, 9), "min_epochs is 0; it must be at least 1"),
     ((1, 1, 9), "reduction_factor is 1; it must be at least 2"),
     ((1, 3, 0), "max_epochs is 0; it must be at least 1")],
)  # fmt: skip
def test_numbers_that_are_too_small(numbers: tuple[int, int, int], message: str) -> None:
    min_epochs, factor, max_epochs = numbers
    with pytest.raises(ConfigError, match=message):
        halving(factor, min_epochs, max_epochs)


def test_worse_and_worse_trials() -> None:
    """Each is dominated by all before it: a third goes on, rounded up, and the first two always."""
    decisions = arrive([[-i, -i] for i in range(9)])
    assert [d.stop for d in decisions] == [False, False, *[True] * 7]
    assert [d.rank for d in decisions] == [d.place for d in decisions] == list(range(9))
    assert [d.of for d in decisions] == list(range(1, 10))


def test_better_and_better_trials_all_go_on() -> None:
    assert not any(d.stop for d in arrive([[i, i] for i in range(20)]))


def test_a_front_is_thinned_evenly() -> None:
    """Nine trials on a quarter of a circle: the middle, both ends, then the middles of the gaps."""
    arc = [[math.sin(i * math.pi / 16), math.cos(i * math.pi / 16)] for i in range(9)]
    order = epsilon_net(arc).tolist()
    assert (order[0], set(order[1:3]), set(order[3:5])) == (4, {0, 8}, {2, 6})
    late = [arrive([*arc[:i], *arc[i + 1 :], arc[i]])[-1] for i in range(9)]
    assert {d.rank for d in late} == {0}
    assert [i for i, d in enumerate(late) if not d.stop] == [0, 4, 8]


def test_inside_a_front_the_best_compromise_is_first() -> None:
    bulge = [[0.0, 1.0], [0.1, 0.9], [0.7, 0.6], [1.0, 0.0]]
    assert epsilon_net(bulge).tolist() == [2, 0, 3, 1]


def test_equal_trials_are_one_point_of_the_front() -> None:
    """The first of them represents it; the others come last."""
    decisions = arrive([[1, 1]] * 6)
    assert {d.rank for d in decisions} == {0}
    assert [d.place for d in decisions] == list(range(6))
    assert [d.stop for d in decisions] == [False, False, True, True, True, True]
    assert epsilon_net([[1, 0], [1, 0], [0, 1]]).tolist() == [0, 2, 1]


@given(points=clouds(min_size=1), factor=st.integers(2, 4))
@settings(deadline=None, max_examples=200)
def test_equals_brute_force(points: list[list[float]], factor: int) -> None:
    for n, decision in enumerate(arrive(points, factor), start=1):
        rank = ranks(points[:n])
        assert decision.rank == rank[-1]
        better, as_good = sum(r < rank[-1] for r in rank), rank.count(rank[-1])
        assert better <= decision.place < better + as_good
        assert decision.stop == (n >= factor and decision.place >= math.ceil(n / factor))
        assert (decision.rung, decision.of) == (1, n)


@given(points=clouds(min_size=1), factor=st.integers(2, 4))
@settings(deadline=None, max_examples=100)
def test_places_are_a_ranking_and_no_more_are_stopped_than_asked_for(
    points: list[list[float]], factor: int
) -> None:
    """Were each the last to arrive, at least a share of 1 / factor of them would go on."""
    late = []
    for i in range(len(points)):
        one = halving(factor)
        for j, p in enumerate(points):
            one.record(str(j), 1, p)
        late.append(one.decide(str(i), 1, points[i]))
    assert sorted(d.place for d in late) == list(range(len(points)))
    going_on = sum(not d.stop for d in late)
    assert going_on == (math.ceil(len(points) / factor) if len(points) >= factor else len(points))
    by_place = [d.rank for d in sorted(late, key=lambda d: d.place)]
    assert by_place == sorted(by_place)


@given(points=clouds(), data=st.data())
@settings(deadline=None, max_examples=100)
def test_units_of_the_objectives_do_not_matter(points: list[list[float]], data: st.DataObject) -> None:
    m = len(points[0]) if points else 1
    scales = data.draw(st.lists(st.sampled_from([2.0**-20, 0.5, 1.0, 2.0**30]), min_size=m, max_size=m))
    moved = [[x * s + s for x, s in zip(p, scales, strict=True)] for p in points]
    assert arrive(moved) == arrive(points)


@given(points=clouds(min_size=1))
@settings(deadline=None, max_examples=100)
def test_an_epsilon_net_is_greedy(points: list[list[float]]) -> None:
    """Every next point is one of those farthest from all before it, after scaling to the unit square."""
    array = np.array(points)
    span = np.ptp(array, axis=0)
    scaled = (array - array.min(axis=0)) / np.where(span > 0, span, 1)
    order = epsilon_net(points).tolist()
    assert sorted(order) == list(range(len(points)))
    assert scaled[order[0]].sum() == pytest.approx(scaled.sum(axis=1).max())
    for k in range(1, len(order)):
        gap = [min(math.dist(scaled[i], scaled[j]) for j in order[:k]) for i in order[k:]]
        assert gap[0] == pytest.approx(max(gap))


@given(points=clouds(min_size=1), data=st.data())
@settings(deadline=None, max_examples=100)
def test_trials_without_finite_values_stop_and_count_for_nothing(
    points: list[list[float]], data: st.DataObject
) -> None:
    one, asked = halving(), []
    for i, p in enumerate(points):
        if data.draw(st.booleans()):
            bad = [*p[:-1], data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))]
            decision = one.decide(f"bad{i}", 1, bad)
            assert decision.stop
            assert decision.place == decision.of - 1 == i
        asked.append(one.decide(str(i), 1, p))
    assert asked == arrive(points)


def test_between_rungs_all_finite_trials_go_on() -> None:
    one = halving()
    assert one.decide("a", 2, [0.0, 0.0]) == Decision(stop=False)
    assert one.decide("a", 2, [math.nan, 0.0]) == Decision(stop=True)
    assert one.counts() == {}


def test_a_trial_that_reports_again_gets_the_same_answer_and_counts_once() -> None:
    one = halving()
    first = [one.decide(str(i), 1, [i % 3, -i]) for i in range(12)]
    assert [one.decide(str(i), 1, [i % 3, -i]) for i in range(12)] == first
    # not even other values, or a late recovery, change what was decided
    assert [one.decide(str(i), 1, [99, 99]) for i in range(12)] == first
    nan = one.decide("nan", 1, [math.nan, 0])
    assert one.decide("nan", 1, [0, 0]) == nan
    assert one.counts()[1] == (12, sum(d.stop for d in first) + 1)


def test_rungs_do_not_know_each_other() -> None:
    one = halving()
    for i in range(6):
        one.decide(str(i), 1, [i, i])
    assert one.decide("0", 3, [0, 0]) == Decision(stop=False, rung=3, rank=0, place=0, of=1)


def test_a_trial_of_an_earlier_run_is_compared_with_and_is_decided_anew() -> None:
    one = halving()
    for i in range(3):
        one.record(str(i), 1, [i, i])
        one.record(str(i), 1, [i, i])
        one.record(str(i), 2, [i, i])
    assert one.counts() == {1: (3, 0)}
    assert one.decide("new", 1, [-1, -1]) == Decision(stop=True, rung=1, rank=3, place=3, of=4)
    assert one.decide("0", 1, [0, 0]) == Decision(stop=True, rung=1, rank=2, place=2, of=4)


@given(points=clouds(min_size=2), data=st.data())
@settings(deadline=None, max_examples=50)
def test_restored_it_goes_on_as_if_nothing_had_happened(
    points: list[list[float]], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(points)))
    before = halving()
    decisions = [before.decide(str(i), 1, p) for i, p in enumerate(points[:cut])]
    before.decide("nan", 1, [math.nan] * len(points[0]))
    before.decide("0", 3, points[0])
    state: Any = json.loads(json.dumps(before.state()))
    after = halving()
    after.decide("forgotten", 1, points[0])
    after.restore(state)
    assert after.state() == before.state()
    assert [after.decide(str(i), 1, p) for i, p in enumerate(points[:cut])] == decisions
    rest = [after.decide(str(i), 1, p) for i, p in enumerate(points) if i >= cut]
    assert decisions + rest == arrive(points)


# --- no better, no further ----------------------------------------------------------------------------------


def no_better(min_epochs: int = 2, min_gain: float = 0.25) -> NoBetter:
    return NoBetter(min_epochs=min_epochs, min_gain=min_gain)


def test_who_has_come_no_farther_than_others_is_stopped() -> None:
    rule = no_better()
    assert rule.decide("a", 1, [0, 0]) == Decision(stop=False), "every trial gets its first epochs"
    assert rule.decide("a", 2, [0.5, 0.5]) == Decision(False, 2, 0, 0, 1)
    assert rule.decide("b", 2, [0.5, 1.0]) == Decision(False, 2, 0, 0, 2), "better in one objective"
    assert rule.decide("c", 2, [0.75, 0.25]) == Decision(True, 2, 1, 2, 3), "as far are a and b"
    assert rule.decide("d", 2, [0.25, 0.25]) == Decision(True, 2, 1, 3, 4), "as far are a, b and c"
    assert rule.decide("e", 2, [1.25, 0.25]) == Decision(False, 2, 0, 0, 5)


def test_a_trial_that_stands_still_is_stopped_and_later_epochs_of_others_do_not_count() -> None:
    rule = no_better()
    assert not rule.decide("a", 2, [0, 0]).stop
    assert not rule.decide("a", 3, [0.5, 0]).stop
    assert rule.decide("a", 4, [0.75, 0]) == Decision(True, 4, 1, 1, 3), "its third epoch was as good"
    assert rule.decide("b", 2, [0.5, 0]) == Decision(False, 2, 0, 0, 2), "a needed an epoch more for that"
    assert rule.decide("b", 3, [0.75, 0]) == Decision(True, 3, 1, 2, 4), "a's third and its own second"


@given(points=clouds(min_size=1), gain=st.sampled_from([0.0, 0.25, 0.5]), data=st.data())
@settings(deadline=None, max_examples=200)
def test_no_better_equals_its_definition(points: list[list[float]], gain: float, data: st.DataObject) -> None:
    """Trials whose epochs come in any order that Tune may report them in."""
    rule, before, epochs = no_better(2, gain), [], dict.fromkeys("abcd", 0)
    for values in points:
        trial_id = data.draw(st.sampled_from("abcd"))
        epochs[trial_id] += 1
        epoch = epochs[trial_id]
        decision = rule.decide(trial_id, epoch, values)
        assert rule.decide(trial_id, epoch, [9.0] * len(values)) == decision, "asked again, the same"
        if epoch < 2:
            assert decision == Decision(stop=False)
            continue
        rivals = [v for e, v in before if e <= epoch]
        as_far = sum(
            all(b > a - gain or b == a - gain for a, b in zip(values, v, strict=True)) for v in rivals
        )
        assert decision == Decision(as_far > 0, epoch, int(as_far > 0), as_far, len(rivals) + 1)
        before.append((epoch, values))


def test_no_better_knows_earlier_runs_and_forgets_what_is_not_finite() -> None:
    rule = no_better()
    rule.record("old", 2, [0.5, 0.5])
    rule.record("old", 1, [9, 9])
    bad = rule.decide("bad", 2, [math.nan, 1])
    assert bad == Decision(True, 2, 1, 1, 2)
    assert rule.decide("bad", 1, [math.inf, 1]) == Decision(stop=True)
    assert rule.decide("new", 2, [0.5, 0.5]) == Decision(True, 2, 1, 1, 2)
    after = no_better()
    after.restore(json.loads(json.dumps(rule.state())))
    assert after.state() == rule.state()
    assert after.decide("bad", 2, [0, 0]) == bad
    assert after.decide("late", 2, [0.5, 0.5]) == Decision(True, 2, 1, 2, 3)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 0.1), "min_epochs is 0; it must be at least 1"),
     ((1, -0.1), "min_gain is -0.1; it must be at least 0")],
)  # fmt: skip
def test_numbers_of_no_better_that_are_too_small(numbers: tuple[int, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        no_better(*numbers)


def test_a_search_asks_for_a_rule() -> None:
    assert rule_of(SearchConfig(stopping="none")) is None
    plain = rule_of(SearchConfig(stopping="no_better", min_epochs=4, min_gain=0.5, epochs=(1, 9)))
    assert plain is not None
    assert [plain.is_rung(e) for e in range(1, 8)] == [False] * 3 + [True] * 4
    assert plain.decide("a", 4, [0, 0]) == Decision(False, 4, 0, 0, 1)
    assert plain.decide("b", 4, [0.5, 0.5]).stop, "half is too little"
    halving = rule_of(SearchConfig(stopping="halving", min_epochs=2, reduction_factor=2, epochs=(1, 9)))
    assert isinstance(halving, Halving)
    assert halving.rungs == (2, 4, 8)


# --- in Ray Tune --------------------------------------------------------------------------------------------


def trial_of(ray_id: str, ours: str, epochs: int = 4) -> Trial:
    """A trial as the scheduler sees it, which nobody runs."""
    config = {"trial_id": ours, "attempt": 0, "settings": {"epochs": epochs}}
    return Trial("anything", trial_id=ray_id, config=config, stub=True)


def values_of(report: Mapping[str, Any]) -> list[float] | None:
    numbers = numbers_of(report)
    return None if numbers is None else list(numbers.values())


def numbers_of(report: Mapping[str, Any]) -> dict[str, float] | None:
    numbers = {name: report.get(name, math.nan) for name in ("robustness", "retention")}
    return numbers if all(map(math.isfinite, numbers.values())) else None


def report_of(epoch: int, value: float, iteration: int = 1) -> dict[str, Any]:
    return {"epoch": epoch, "robustness": value, "retention": value, "training_iteration": iteration}


def with_evidence() -> Rule:
    """Two trials of an earlier run, both mediocre."""
    one = Halving(min_epochs=1, reduction_factor=2, max_epochs=4)
    for rung in one.rungs:
        one.record("90", rung, [0.5, 0.5])
        one.record("91", rung, [0.6, 0.4])
    return one


def test_epochs_are_counted_and_not_reports() -> None:
    """Tune's own count starts anew after a restart, and the trial reports again what it had reported."""
    seen: list[tuple[str, int, Decision]] = []
    scheduler = StoppingScheduler(with_evidence(), values_of, lambda *decision: seen.append(decision))
    good = trial_of("r0", "00000")
    for epoch, iteration in [(1, 1), (2, 2), (1, 1), (2, 2), (3, 3), (4, 4)]:
        assert scheduler.on_trial_result(None, good, report_of(epoch, 0.7, iteration)) == "CONTINUE"
    one, two = Decision(False, 1, 0, 0, 3), Decision(False, 2, 0, 0, 3)
    assert seen == [("00000", e, d) for e, d in [(1, one), (2, two), (1, one), (2, two)]]
    assert scheduler.stopped == {}


def test_a_resumed_trial_is_not_stopped_where_it_had_gone_on() -> None:
    seen: list[tuple[str, int, Decision]] = []
    scheduler = StoppingScheduler(with_evidence(), values_of, lambda *decision: seen.append(decision))
    weak = trial_of("r0", "00000")
    for _ in range(2):
        assert scheduler.on_trial_result(None, weak, report_of(1, 0.1) | {AGAIN: True}) == "CONTINUE"
    assert scheduler.debug_string().startswith("Halving; epoch 1: 3 trials, 0 stopped"), "it is recorded"
    assert seen == 2 * [("00000", 1, Decision(False, 1, 1, 2, 3))], "its metrics still tell of the rung"
    assert scheduler.on_trial_result(None, weak, report_of(2, 0.1) | {AGAIN: False}) == "STOP"


def test_who_is_never_stopped() -> None:
    scheduler = StoppingScheduler(with_evidence(), values_of)
    for ours in ("cross_entropy", "confirm-00003-0"):
        assert scheduler.on_trial_result(None, trial_of("r0", ours), report_of(1, 0.0)) == "CONTINUE"
    last_epoch = trial_of("r1", "00000", epochs=1)
    assert scheduler.on_trial_result(None, last_epoch, report_of(1, 0.0)) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial_of("r2", "00001"), {"failure": "no memory"}) == "CONTINUE"
    assert scheduler.debug_string() == "Halving; epoch 1: 2 trials, 0 stopped; epoch 2: 2 trials, 0 stopped"
    assert scheduler.on_trial_result(None, trial_of("r3", "00002"), report_of(1, 0.0)) == "STOP"
    assert scheduler.on_trial_result(None, trial_of("r4", "00003"), report_of(3, math.nan)) == "STOP"
    assert scheduler.stopped == {"r3": Decision(True, 1, 1, 2, 3), "r4": Decision(True)}


def test_the_scheduler_is_saved_and_restored(tmp_path: Path) -> None:
    before, after = StoppingScheduler(with_evidence(), values_of), StoppingScheduler(halving(2), values_of)
    before.on_trial_result(None, trial_of("r0", "00000"), report_of(1, 0.0))
    before.save(str(tmp_path / "state"))
    after.restore(str(tmp_path / "state"))
    assert after.stopped == before.stopped == {"r0": Decision(True, 1, 1, 2, 3)}
    assert after.debug_string().startswith("Halving; epoch 1: 3 trials, 1 stopped; epoch 2: 2 trials, 0")


def test_it_takes_no_metric() -> None:
    scheduler = StoppingScheduler(halving(), values_of)
    assert not scheduler.set_search_properties("robustness", "max")
    assert scheduler.set_search_properties(None, None)
    assert isinstance(scheduler.metric, str)
    assert not scheduler.supports_buffered_results


def small_trial(workers: int, folder: str) -> Callable[[dict[str, Any]], None]:
    """A trial that trains nothing: each setting's learning rate is what it reaches. Workers take all CPUs."""
    cpus = ray.cluster_resources()["CPU"]

    def train(config: dict[str, Any]) -> None:
        report = ray.train.report if workers else ray.tune.report
        value, epochs = config["settings"]["learning_rate"], config["settings"]["epochs"]
        for epoch in range(1, epochs + 1):
            value = math.nan if config["trial_id"] == "00003" else value
            report({"epoch": epoch, "robustness": value, "retention": value, "process": os.getpid()})
            if workers and value < 0.5:
                time.sleep(600)  # only a STOP gets it out of here

    def run(config: dict[str, Any]) -> None:
        from ray.train.v2.api.config import RunConfig, ScalingConfig
        from ray.tune.integration.ray_train import TuneReportCallback

        from clippo.train.ray_train import LeanTrainer

        LeanTrainer(
            train,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=workers, resources_per_worker={"CPU": cpus / workers} if workers else None
            ),
            run_config=RunConfig(
                name=config["trial_id"],
                storage_path=folder,
                callbacks=[TuneReportCallback()] if workers else [],
            ),
        ).fit()

    return run


class Log(tune.Callback):
    """What Tune reported, and which trials were known to be stopped when they ended."""

    def __init__(self) -> None:
        self.reports: dict[str, list[int]] = {}
        self.processes: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self.reports.setdefault(trial.config["trial_id"], []).append(result["epoch"])
        self.processes.add(result["process"])


class Swept(NamedTuple):
    search: Search
    scheduler: StoppingScheduler
    log: Log
    decisions: list[tuple[str, int, bool]]


def sweep_of(
    proposals: list[Proposal], workers: int, folder: Path, watchers: Sequence[tune.Callback] = ()
) -> Swept:
    """Runs these trials, one at a time."""
    decisions: list[tuple[str, int, bool]] = []
    scheduler = StoppingScheduler(
        with_evidence(), values_of, lambda i, epoch, decision: decisions.append((i, epoch, decision.stop))
    )
    search = Search(
        SearchConfig(
            trials=1, epochs=(1, 3), learning_rate=(0.01, 1.0), losses=("dpo",), objectives=OBJECTIVES.names
        ),
        numbers_of,
        OBJECTIVES,
        unfinished=[p for p in proposals if p.trial_id.isdigit()],
        others=[p for p in proposals if not p.trial_id.isdigit()],
        was_stopped=scheduler.stopped.__contains__,
    )
    log = Log()
    tuner = tune.Tuner(
        tune.with_resources(small_trial(workers, str(folder / "train")), {"trial_driver": 1}),
        tune_config=tune.TuneConfig(
            search_alg=search, scheduler=scheduler, num_samples=-1, max_concurrent_trials=1,
            reuse_actors=workers == 0,
        ),
        run_config=tune.RunConfig(
            name="sweep", storage_path=str(folder / "tune"), verbose=0, callbacks=[log, *watchers],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )  # fmt: skip
    with leftovers_freed():
        tuner.fit()
    return Swept(search, scheduler, log, decisions)


def proposal(trial_id: str, value: float, epochs: int) -> Proposal:
    chosen = {"loss": "dpo", "beta": 0.1, "kl_weight": 1.0, "learning_rate": value, "epochs": epochs}
    return Proposal(trial_id, 0, chosen)


def test_ray_stops_trials_in_their_own_process(own_ray: None, tmp_path: Path) -> None:
    swept = sweep_of(
        [
            proposal("00000", 0.1, 3),  # stopped
            proposal("00001", 0.1, 1),  # its first epoch is its last
            proposal("00002", 0.8, 3),  # goes through both rungs
            proposal("00003", 0.8, 3),  # never finite
            proposal("cross_entropy", 0.1, 3),  # is compared with nobody
        ],
        workers=0,
        folder=tmp_path,
        watchers=[SweepMetrics("watched", numbers_of, OBJECTIVES, [{"robustness": 0.0, "retention": 1.0}])],
    )
    epochs = {"00000": [1], "00001": [1], "00002": [1, 2, 3], "00003": [1], "cross_entropy": [1, 2, 3]}
    assert swept.log.reports == epochs
    assert swept.decisions == [
        ("00000", 1, True), ("00002", 1, False), ("00002", 2, False), ("00003", 1, True)
    ]  # fmt: skip
    assert len(swept.log.processes) == 1  # a process that was stopped takes the next trial
    ended = {t.user_attrs["trials"][0]: t for t in swept.search.study.trials}
    states = {n: t.state for n, t in ended.items()}
    assert states == {
        0: TrialState.PRUNED, 1: TrialState.COMPLETE, 2: TrialState.COMPLETE, 3: TrialState.FAIL
    }  # fmt: skip
    assert ended[0].user_attrs["partial"] == [{"robustness": 0.1, "retention": 0.1}]
    assert [d.stop for d in swept.scheduler.stopped.values()] == [True, True]
    expected = {
        ("trials_ended", "completed"): 3, ("trials_ended", "stopped_early"): 1, ("trials_ended", "failed"): 1,
        ("epochs", ""): 9, ("trials_running", ""): 0, ("hypervolume", ""): 0.8 * 0.8,
    }  # fmt: skip
    deadline = time.monotonic() + 60
    while (found := scraped("watched")) != pytest.approx(expected):
        assert time.monotonic() < deadline, found  # Ray exports every few seconds
        time.sleep(0.5)


def scraped(sweep: str) -> dict[tuple[str, str], float]:
    """What Prometheus would read of a sweep, by name and status."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except OSError:  # it does not listen yet
        return {}
    return {
        (
            sample.name.removeprefix("ray_clippo_").removesuffix("_total"),
            sample.labels.get("status", ""),
        ): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("sweep") == sweep
    }


def test_the_workers_of_a_trial_that_is_stopped_are_freed(
    own_ray: None, other_ray: None, tmp_path: Path
) -> None:
    """Two workers take all CPUs, so the second trial runs only if those of the first are free again.

    After the last trial, which is stopped too, they must be free, as the Ray may be somebody else's.
    """
    trials = [proposal("00000", 0.1, 3), proposal("00001", 0.8, 2), proposal("00002", 0.1, 3)]
    swept = sweep_of(trials, workers=2, folder=tmp_path)
    assert swept.log.reports == {"00000": [1], "00001": [1, 2], "00002": [1]}
    states = [t.state for t in swept.search.study.trials]
    assert states == [TrialState.PRUNED, TrialState.COMPLETE, TrialState.PRUNED]
    deadline = time.monotonic() + 10
    while (free := ray.available_resources()) != ray.cluster_resources():
        assert time.monotonic() < deadline, f"only {free} is free"
        time.sleep(0.1)
