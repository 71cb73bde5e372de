"""Whatever is reported has been measured on test pictures, and little else."""

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from clippo.evaluate import Counts
from clippo.front.points import read_front
from clippo.sweep.contenders import Contenders
from tests.front.sweeps import OBJECTIVES, Sweep, make_sweep


def counts_of(sweep: Sweep) -> dict[str, list[Counts]]:
    """What each trial measured after its last epoch."""
    epochs = {r["trial_id"]: r.get("epochs", 0) for r in sweep.trials}
    found: dict[str, list[Counts]] = {}
    for row in sweep.evals.to_pylist():
        if row["epoch"] == epochs[row["trial_id"]]:
            names = ("eval_set", "variant", "n_correct", "n_total", "n_fooled")
            found.setdefault(row["trial_id"], []).append(Counts(**{n: row[n] for n in names}))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pictures", [49, 384], ids=["many equal", "few equal"])
def test_what_is_reported_was_worth_testing(pictures: int, seed: int) -> None:
    sweep = make_sweep(24, seed=seed, pictures=pictures)
    counts = counts_of(sweep)
    contenders = Contenders(reference=tuple(counts["reference"]), objectives=OBJECTIVES, rivals=())
    running: list[tuple[str, Contenders]] = []
    tested: dict[str, set[str]] = {"reference": {"reference"}}
    for trial_id in sorted(i for i in counts if i.isdigit()):
        running.append((trial_id, contenders))  # it knows what has ended before it began
        if len(running) == 3:
            ended, known = running.pop(0)
            mine = [c for c in counts[ended] if c.eval_set.startswith("validation/")]
            tested[ended] = known(mine)
            contenders = contenders.after(mine)
    assert sum(map(len, tested.values())) < 0.35 * sum(len({c.variant for c in counts[i]}) for i in tested)

    gone = {i for i, _ in running}  # they have not ended
    trials = pa.Table.from_pylist(
        [r for r in sweep.trials if r["trial_id"] not in gone], schema=sweep.trial_table.schema
    )
    on_test = pc.starts_with(sweep.evals["eval_set"], "test/").to_pylist()
    kept = [
        not test or i not in tested or v in tested[i]
        for test, i, v in zip(
            on_test, *(sweep.evals[n].to_pylist() for n in ("trial_id", "variant")), strict=True
        )
    ]
    whole, partly = (
        read_front("made", trials, e, OBJECTIVES) for e in (sweep.evals, sweep.evals.filter(kept))
    )
    reported = [*partly.front, partly.recommended, *(p for c in partly.comparisons for p in c.front)]
    reported += [c.best for c in partly.comparisons]
    assert all({"robustness", "retention"} <= p.test.keys() for p in reported)
    assert any(p.test == {} for p in partly.points)
    assert [p.test for p in partly.front] == [p.test for p in whole.front]
    assert partly.hypervolume_interval == whole.hypervolume_interval


def test_without_rivals_everything_is_worth_testing() -> None:
    sweep = make_sweep(1)
    counts = counts_of(sweep)
    everything = Contenders(reference=tuple(counts["reference"]), objectives=OBJECTIVES, rivals=None)
    assert everything.after(counts["00000"])(counts["00000"]) == {c.variant for c in counts["00000"]}
