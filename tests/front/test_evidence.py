"""Whether intervals of hypervolumes and chances hold what they promise, simulated where the truth is known.

Shapes: P points, S sets (2 attacked, 3 kept), N pictures.
"""

import numpy as np
import pytest

from clippo.front import evidence, hypervolume, pareto_mask
from clippo.front.choice import best_of
from clippo.front.evidence import HV_REFERENCE_POINT, Evidence, Noise, distances
from clippo.front.front import CHANCE
from clippo.front.split import SplitCounts
from tests.front.sweeps import OBJECTIVES

PICTURES = 384


def counts(accuracy_PS: np.ndarray, total: float) -> SplitCounts:
    return SplitCounts(
        correct_PS=accuracy_PS * total,
        total_PS=np.full(accuracy_PS.shape, total),
        goal=OBJECTIVES.goal,
        counted=2,
    )


def noise(points: int, curve_P: np.ndarray | None = None, correlation: float = 0.0) -> Noise:
    return Noise(
        curve_P=np.arange(points) if curve_P is None else curve_P,
        correlation=correlation,
        owner_P=np.arange(points),
        sd_PM=np.zeros((points, 2)),
        dof=0,
    )


def truth(points: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """True accuracies along a bent trade-off, some way below it; the first point is the untouched model."""
    moved = rng.uniform(0, 1, points)
    robustness = 0.38 + 0.55 * moved**0.7
    kept = [0.97 - 0.01 * moved, 0.9 - 0.02 * moved, 0.95 * (1 - 0.3 * moved**4)]
    accuracy_PS = np.stack([robustness + 0.02, robustness - 0.02, *kept], axis=1)
    accuracy_PS -= np.abs(rng.normal(0, spread, accuracy_PS.shape))
    accuracy_PS[0] = 0.40, 0.36, 0.97, 0.9, 0.95
    return np.clip(accuracy_PS, 0.01, 0.995)


def measured(accuracy_PS: np.ndarray, shared: float, rng: np.random.Generator) -> np.ndarray:
    """Shares of pictures; on a share of them all points are right or wrong alike."""
    points, sets = accuracy_PS.shape
    common = rng.random((1, sets, PICTURES))
    own = rng.random((points, sets, PICTURES))
    ease = np.where(rng.random(own.shape) < shared, common, own)
    return (ease < accuracy_PS[..., None]).mean(axis=-1)


def test_distances_are_to_the_best_that_is_as_good_in_the_other_objective() -> None:
    points_PM = np.random.default_rng(0).integers(0, 9, (200, 2)) / 8
    for point, off in zip(points_PM, distances(points_PM), strict=True):
        for m in (0, 1):
            as_good = points_PM[points_PM[:, 1 - m] >= point[1 - m]]
            assert off[m] == as_good[:, m].max() - point[m]


def test_equal_counts_are_equal_robustness() -> None:
    """Shares of 300 pictures are rounded, so that sums of them would differ where the counts do not."""
    correct_PS = np.array([[200.0, 0.0, 300.0], [194.0, 6.0, 300.0], [181.0, 19.0, 299.0]])
    made = SplitCounts(
        correct_PS=correct_PS, total_PS=np.full((3, 3), 300.0), goal=OBJECTIVES.goal, counted=2
    )
    assert made.objectives()[:, 0].tolist() == [1 / 3] * 3


@pytest.mark.parametrize("shared", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("points", "spread", "sweeps"), [(30, 0.05, 70), (150, 0.0, 40)])
def test_90_percent_of_a_hypervolume_and_of_a_gain_cover_at_least_87(
    points: int, spread: float, sweeps: int, shared: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "DRAWS", 60)
    monkeypatch.setattr(evidence, "HV_DRAWS", 60)
    rng = np.random.default_rng(0)
    everything, part = np.ones(points, dtype=bool), np.arange(points) < points // 3
    covered = []
    for _ in range(sweeps):
        true_PS = truth(points, spread, rng)
        values = counts(true_PS, 1).objectives()
        whole, less = (hypervolume(values[f], HV_REFERENCE_POINT) for f in (everything, part))
        split = counts(measured(true_PS, shared, rng), PICTURES)
        found = Evidence.of(split, noise(points), [everything, part])
        volumes = found.volumes(everything)
        gain, gain_interval = volumes.above(found.volumes(part))
        assert gain_interval[0] <= gain <= gain_interval[1]
        low, high = volumes.interval
        covered.append((low <= whole <= high, gain_interval[0] <= whole - less <= gain_interval[1]))
    assert (np.mean(covered, axis=0) >= 0.87).all()


def test_equal_points_that_share_their_pictures() -> None:
    """The best of 60 equal points is luck, which is all that is above the truth."""
    rng = np.random.default_rng(0)
    true_PS = np.tile([0.8, 0.8, 0.93, 0.85, 0.8], (60, 1))
    true_PS[0] = 0.40, 0.36, 0.97, 0.9, 0.95
    whole = hypervolume(counts(true_PS, 1).objectives(), HV_REFERENCE_POINT)
    everything, covered, bias = np.ones(60, dtype=bool), [], []
    for _ in range(40):
        split = counts(measured(true_PS, 0.8, rng), PICTURES)
        volumes = Evidence.of(split, noise(60), [everything]).volumes(everything)
        covered.append(volumes.interval[0] <= whole <= volumes.interval[1])
        bias.append(volumes.measured - whole)
    assert np.mean(bias) > 0.01
    assert np.mean(covered) >= 0.87


def straight(points: int, rng: np.random.Generator) -> np.ndarray:
    """True accuracies of which none is dominated: whatever is more robust keeps less, 0.94 to 1."""
    moved = rng.uniform(0, 1, (points, 1))
    accuracy_PS = np.hstack([0.38 + 0.55 * moved**0.7] * 2 + [(1 - 0.06 * moved) * [0.97, 0.9, 0.95]])
    accuracy_PS[0] = 0.38, 0.38, 0.97, 0.9, 0.95
    return accuracy_PS


def retention_of_the_chosen(
    true_SPS: list[np.ndarray], shared: float, min_retention: float, rng: np.random.Generator
) -> np.ndarray:
    """What the recommended point truly retains, in one draw of counts from each of some truths."""
    found = []
    for true_PS in true_SPS:
        split, everything = (
            counts(measured(true_PS, shared, rng), PICTURES),
            np.ones(len(true_PS), dtype=bool),
        )
        made = Evidence.of(split, noise(len(true_PS)), [everything])
        chosen = best_of(made.measured_PM, pareto_mask(made.measured_PM), made.chance(min_retention))
        found.append(counts(true_PS, 1).objectives()[chosen, 1])
    return np.array(found)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "DRAWS", 300)
    monkeypatch.setattr(evidence, "HV_DRAWS", 2)


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_the_chance_of_a_point_by_itself_holds(shared: float) -> None:
    """A point that keeps just less than asked for is taken for one that keeps it in a tenth of the cases."""
    rng = np.random.default_rng(0)
    true_PS = np.array([[0.38, 0.38, 0.97, 0.9, 0.95], [0.8, 0.8, 0.95, 0.88, 0.931]])
    kept = counts(true_PS, 1).objectives()[1, 1]
    taken = []
    for _ in range(300):
        split, everything = counts(measured(true_PS, shared, rng), PICTURES), np.ones(2, dtype=bool)
        taken.append(Evidence.of(split, noise(2), [everything]).chance(kept + 1e-6)[1] >= CHANCE)
    assert np.mean(taken) <= 0.13


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("shared", [0.0, 0.7])
@pytest.mark.parametrize("min_retention", [0.9, 0.98])
def test_the_recommended_point_of_a_bent_front_keeps_enough(shared: float, min_retention: float) -> None:
    rng = np.random.default_rng(0)
    truths = [truth(40, 0.0, rng) for _ in range(80)]
    kept = retention_of_the_chosen(truths, shared, min_retention, rng)
    assert (kept < 1).mean() > 0.9, "it is hardly ever the untouched model"
    assert (kept >= min_retention).mean() >= 0.87


@pytest.mark.usefixtures("few_draws")
def test_the_chance_leaves_out_that_the_point_was_picked() -> None:
    """Why the recommendation says so: of 200 points along a line the best that seems sure is often lucky."""
    rng = np.random.default_rng(0)
    kept = retention_of_the_chosen([straight(200, rng) for _ in range(60)], 0.0, 0.98, rng)
    assert 0.5 < (kept >= 0.98).mean() < 0.8, "if it keeps enough more often, table.py need not warn"
    assert kept.min() > 0.95, "it misses by little"


def test_points_of_a_curve_move_together() -> None:
    """A step that is better than its neighbour stays so when both were measured on the same pictures."""
    accuracy_PS = np.array(
        [[0.4, 0.4, 0.97, 0.9, 0.95], [0.6, 0.6, 0.9, 0.8, 0.7], [0.61, 0.61, 0.91, 0.81, 0.71]]
    )
    split, everything = counts(accuracy_PS, 1000), np.ones(3, dtype=bool)
    alone = Evidence.of(split, noise(3), [everything]).probability()
    curve = noise(3, np.array([0, 1, 1]), correlation=0.99)
    together = Evidence.of(split, curve, [everything]).probability()
    assert alone[1] > 0.3
    assert together[1] < 0.05
    assert together[2] > 0.95


def test_only_points_that_may_matter_are_drawn() -> None:
    rng = np.random.default_rng(0)
    true_PS = truth(3000, 0.1, rng)
    split, everything = counts(measured(true_PS, 0.0, rng), PICTURES), np.ones(3000, dtype=bool)
    found = Evidence.of(split, noise(3000), [everything])
    assert len(found.near_C) < 1500
    assert found.near_C[0] == 0
    on_front = np.flatnonzero(pareto_mask(found.measured_PM))
    assert set(on_front) <= set(found.near_C.tolist())
    far = np.setdiff1d(np.arange(3000), found.near_C)
    assert (found.probability()[far] == 0).all()
    assert np.isnan(found.chance(0.98)[far]).all()
    assert found.chance(0.5)[found.near_C].min() > 0.9


def test_all_of_the_front_is_drawn_whatever_ties_with_it() -> None:
    """More points than are drawn have the best retention there is, and more than that are equal."""
    rng = np.random.default_rng(0)
    tied_PS = np.full((4000, 5), 0.8)
    tied_PS[:, :2] = rng.uniform(0.3, 0.9, size=(4000, 1))
    equal_PS = np.full((1500, 5), 0.95)
    for accuracy_PS in (tied_PS, equal_PS):
        split = counts(accuracy_PS, 400)
        found = Evidence.of(split, noise(len(accuracy_PS)), [np.ones(len(accuracy_PS), dtype=bool)])
        on_front = np.flatnonzero(pareto_mask(found.measured_PM))
        assert set(on_front) <= set(found.near_C.tolist())
        best = int(on_front[-1])
        assert set(on_front) - {best} <= set(found.alike(best).tolist())


def test_what_cannot_be_told_apart() -> None:
    accuracy_PS = np.tile([0.8, 0.8, 0.93, 0.85, 0.8], (4, 1))
    accuracy_PS[0] = 0.40, 0.36, 0.97, 0.9, 0.95
    accuracy_PS[2, :2] += 0.01
    accuracy_PS[3, :2] += 0.1
    found = Evidence.of(counts(accuracy_PS, 400), noise(4), [np.ones(4, dtype=bool), np.arange(4) < 3])
    assert found.alike(1).tolist() == [2]
    assert found.alike(3).tolist() == []


def test_draws_repeat() -> None:
    split, everything = counts(truth(40, 0.05, np.random.default_rng(0)), 400), np.ones(40, dtype=bool)
    first, again = (Evidence.of(split, noise(40), [everything]) for _ in range(2))
    assert (first.draws_RCM == again.draws_RCM).all()
    assert first.volumes(everything).interval == again.volumes(everything).interval


@pytest.mark.parametrize("draws", [1, 7, 1000])
def test_portions_are_all_of_the_draws(draws: int) -> None:
    for numbers in (1, 300, evidence.CHUNK, 10 * evidence.CHUNK):
        assert sum(evidence._chunks(draws, numbers)) == draws
