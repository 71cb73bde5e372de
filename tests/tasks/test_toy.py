"""A third task is one file and one registry line: all that follows knows it by its answers alone."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from clippo.config import DataConfig, ModelConfig, SearchConfig, SweepConfig, TrainConfig
from clippo.evaluate import Counts, max_skew
from clippo.evaluate.rankings import mean_skew
from clippo.export import export
from clippo.front.front import Front
from clippo.front.points import front_of
from clippo.front.table import print_front
from clippo.model import policy_of
from clippo.prepared import Location, PreparedSet, prepare
from clippo.results import ResultStore
from clippo.results.checkpoints import StoreCheckpoints, checkpoint_folder
from clippo.sweep.contenders import Contenders
from clippo.sweep.cost import work_of
from clippo.sweep.examples import write_examples
from clippo.sweep.rows import Scorer, TrialRows, finished_trials
from clippo.sweep.stored import stored
from clippo.tasks import TASKS, Task, resolved
from clippo.train import TrialSettings, fit, measure
from clippo.train.ray_train import measure_reference
from clippo.train.shared import Shared, load_shared
from tests.tasks.toy import SquaresTask

NAME = "squares"
CONFIG = SweepConfig(
    task=NAME,
    name=NAME,
    model=ModelConfig(trainable="transform"),
    data=DataConfig(train_pictures=80, eval_pictures=120),
    train=TrainConfig(batch_size=16, precision="fp32"),
    search=SearchConfig(epochs=(1, 6), pairs=("colours", "grounds")),
)


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    task: type[Task] = SquaresTask  # mypy holds it against the protocol
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, NAME, task)
        yield


@dataclasses.dataclass(frozen=True)
class Swept:
    """What a sweep of two trials leaves; ``report`` is the last of the second one."""

    config: SweepConfig
    store: ResultStore
    shared: Shared
    prepared: PreparedSet
    reference: list[Counts]
    report: dict[str, Any]

    @property
    def front(self) -> Front:
        return front_of(self.store, NAME)


@pytest.fixture(scope="module")
def swept(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """All that a sweep does, without Ray."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("squares")
    config, store = resolved(CONFIG), ResultStore(folder / "results")
    location = Location(folder / "cache")
    name = prepare(NAME, config.data, config.model, location)
    shared = Shared(model=config.model, train=config.train, prepared=name, location=location)
    clip, prepared, frozen = load_shared(shared)
    reference, scorer, rows = (
        measure_reference(shared, gpus=0),
        Scorer(config),
        TrialRows(config, store, prepared),
    )
    store.write_config(NAME, stored(config))
    first = {
        "epoch": 0, "step": 0, "metrics": {}, "busy_s": 0.0, "precision": "fp32",
        "evals": [dataclasses.asdict(c) for c in reference],
    }  # fmt: skip
    rows.write("reference", 0, {}, [first], began=0.0)
    for number, kind in enumerate(config.search.pairs):
        settings = TrialSettings(
            loss="dpo", beta=0.5, kl_weight=0.1, learning_rate=5e-3, epochs=6, seed=0, orthogonality=0.1,
            pairs=kind,
        )  # fmt: skip
        trial_id, reports = f"{number:05d}", list[dict[str, Any]]()
        fit(
            policy_of(clip, "transform"), prepared, frozen, settings, config.train, report=reports.append,
            checkpoints=StoreCheckpoints(store, checkpoint_folder(NAME, trial_id)),
            curve_sets=scorer.objectives.sets, reference_counts=reference,
            worth_testing=Contenders(
                reference=tuple(reference), objectives=scorer.objectives, rivals=()
            ),
        )  # fmt: skip
        rows.write(trial_id, 0, dataclasses.asdict(settings), reports, began=0.0)
    return Swept(config, store, shared, prepared, reference, reports[-1])


def test_kinds_that_compare_two_pictures_are_known(swept: Swept) -> None:
    tables = {kind: swept.prepared.pairs(kind) for kind in SquaresTask.pair_kinds}
    across = [kind for kind, table in tables.items() if (table.picture_w != table.picture_l).any()]
    assert across == list(SquaresTask.image_kinds)


def test_pictures_are_ranked_by_the_cosines_of_the_weights(swept: Swept) -> None:
    clip, prepared, frozen = load_shared(swept.shared)
    (data,) = prepared.evaluation_of("test")
    text = policy_of(clip, "transform").text(frozen.text_CD)
    (counts,) = (c for c in swept.reference if c.eval_set == "test/colour")
    for query, ranking in enumerate(counts.rankings):
        scores = (data.rows.reference @ text[query]).detach().numpy()
        order = np.argsort(-scores, kind="stable")
        assert ranking.query == ("red square", "blue square")[query]
        assert list(ranking.pictures) == order[:24].tolist()
        assert mean_skew([ranking]) == pytest.approx(max_skew(scores, data.rows.groups.numpy(), 6))
        assert (ranking.pool, ranking.majority) == ((60, 60), 0)


def test_pictures_are_ranked_alike_in_one_batch_and_in_many(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any(counts.rankings for counts in swept.reference)
    monkeypatch.setattr(measure, "EVAL_BATCH", 7)
    assert measure_reference(swept.shared, gpus=0) == swept.reference


def test_rows_come_back_as_they_were_measured(swept: Swept) -> None:
    trials = finished_trials(swept.store, NAME)
    assert trials["reference"].counts == swept.reference
    measured = [Counts.of(e) for e in swept.report["evals"] if e["variant"] == "averaged"]
    assert sorted(trials["00001"].counts, key=repr) == sorted(measured, key=repr)
    assert trials["00001"].settings["pairs"] == "grounds"
    numbers = Scorer(swept.config).of_report(swept.report, swept.reference)
    assert numbers is not None
    assert numbers.keys() == {"ground_skew", "retention", "device_s"}


def test_the_front_has_the_goal_in_its_own_unit_and_less_is_better(swept: Swept) -> None:
    front, scorer = swept.front, Scorer(swept.config)
    untouched = scorer.numbers(swept.reference, swept.reference)
    assert front.reference.goal == untouched["ground_skew"]
    found = {(p.trial_id, p.variant): p for p in front.points}
    by_variant: dict[str, list[Counts]] = {}
    for e in swept.report["evals"]:
        by_variant.setdefault(e["variant"], []).append(Counts.of(e))
    for variant, counts in by_variant.items():
        if variant in ("t=0", "t=1"):
            continue
        values, point = scorer.numbers(counts, swept.reference), found["00001", variant]
        assert (point.goal, point.retention) == (values["ground_skew"], values["retention"])
        low, high = point.goal_interval
        assert low <= point.goal <= high
    assert len({p.goal for p in front.points}) >= 4
    for p in front.front:
        assert not any(o.goal <= p.goal and o.retention > p.retention for o in front.points)
    # Pairs that prefer light grounds move the skew, in either direction of the knob.
    best = min(front.points, key=lambda p: p.goal)
    assert best.goal < front.reference.goal or front.reference.goal == 0
    assert {
        "ground_skew",
        "retention",
        "max_skew/colour",
        "majority_share/colour",
    } <= front.reference.test.keys()
    assert front.reference.test["ground_skew"] == front.reference.test["max_skew/colour"]


def test_json_table_report_and_card_use_the_words_of_the_task(swept: Swept, tmp_path: Path) -> None:
    write_examples(swept.config, swept.store, swept.shared)
    plain = json.loads(json.dumps(swept.front.to_json()))
    assert plain["reference"]["ground_skew"] == swept.front.reference.goal
    assert "robust" not in json.dumps(plain)

    with (tmp_path / "table").open("w") as file:
        print_front(swept.front, Console(file=file, width=80))
    printed = (tmp_path / "table").read_text()
    assert "most even" in printed
    assert "colour: accuracy of reading the colour" in printed
    assert "robust" not in printed.lower()

    from clippo.front.report import report_of

    page = report_of(swept.store, NAME)
    page = page.partition("<footer")[0] + page.partition('id="data"')[2].partition("</script>")[0]
    for part in ("ground skew", "Along the curve", "red square: untouched", "The first pictures for each"):
        assert part in page
    assert "robust" not in page.lower()
    shown = [json.loads(e["predictions_json"])["places"] for e in swept.store.examples(NAME).to_pylist()]
    for model in ("reference", *({m for at in shown for m in at} - {"reference"})):
        assert sorted(at[model] for at in shown if model in at) == sorted([*range(8)] * 2)

    written = export(swept.store, NAME, "00001", tmp_path / "squares.safetensors", power=0.5)
    card = written.card.read_text()
    assert "ground skew" in card
    assert SquaresTask.words.card in card
    assert "robust" not in card


def test_the_work_is_counted(swept: Swept) -> None:
    work = work_of(swept.config)
    assert (work.pairs, work.prepared) == (3.5 * 80, 80 + 240)
    assert len(swept.prepared.pairs("grounds").clean) == 40
