"""Measures a policy on evaluation sets: counts and rankings, never shares.

B batch, C classes, D embedding, N pictures of a set, Q queries
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clippo.config import TrainConfig
from clippo.evaluate import Counts
from clippo.evaluate.counts import between, count_predictions, is_attacked, rank_and_world, sum_over_ranks
from clippo.evaluate.rankings import Ranking, ranked
from clippo.model import Policy, Weights
from clippo.prepared import EvalData, PreparedSet, Queries
from clippo.train.step import Frozen, autocast, class_logps, resolved_precision

EVAL_BATCH, EVAL_BYTES = 512, 16 * 2**20
"""What is evaluated at once: so many pictures, if what is stored of them has no more bytes than that.

Where little is left to compute of a picture, more of them are faster; pixels of 224 x 224 are 111 pictures.
"""
AVERAGED, LAST = "averaged", "last"

Tuned = Sequence[Weights]
"""The weights of one variant: those tuned on all pairs, and then those tuned without each of the folds."""

Measure = Callable[[Sequence[EvalData], Mapping[str, Tuned]], list[Counts]]
"""Counts of some variants of the weights on some sets."""

WorthTesting = Callable[[Sequence[Counts]], Collection[str]]
"""From the counts on validation pictures, the variants that are worth measuring on test pictures too."""


def all_variants(counts: Sequence[Counts]) -> set[str]:
    """Whatever was measured is worth testing."""
    return {c.variant for c in counts}


def evaluate_tuned(
    measure: Measure, prepared: PreparedSet, variants: Mapping[str, Tuned],
    curve: Callable[[], Iterator[tuple[str, Tuned]]], *,
    curve_sets: Collection[str], reference: Sequence[Counts], worth_testing: WorthTesting,
) -> list[Counts]:  # fmt: skip
    """All that is measured of a trial after its last epoch.

    The variants on every set and the points of the curve on the ``curve_sets``: of validation all of them,
    of test the averaged weights, which stand for the trial, and those that are worth it. The ends of the
    curve are not measured again: it starts at the untouched model, whose counts are ``reference`` (none: it
    is measured), and ends at the averaged weights.
    """

    def of_split(split: str, wanted: Collection[str] | None) -> list[Counts]:
        sets = prepared.evaluation_of(split)
        on_curve = [s for s in sets if s.name.partition("/")[2] in curve_sets]
        names = {s.name for s in on_curve}
        counts = measure(sets, {v: w for v, w in variants.items() if wanted is None or v in wanted})
        ends = {"0": reference, "1": [c for c in counts if c.variant == AVERAGED]}
        for name, weights in curve():  # one copy of the weights at a time
            if end := ends.get(name.partition("=")[2]):
                counts += [replace(c, variant=name) for c in end if c.eval_set in names]
            elif wanted is None or name in wanted:
                counts += measure(on_curve, {name: weights})
        return counts

    counts = of_split("validation", None)
    return counts + of_split("test", {AVERAGED, *worth_testing(counts)})


def evaluate_folds(
    policy: Policy, sets: Sequence[EvalData], frozen: Frozen, variants: Mapping[str, Tuned],
    cast: Callable[[], AbstractContextManager[Any]], device: torch.device,
) -> list[Counts]:  # fmt: skip
    """`evaluate_policy` with the weights that each set asks for; the sets of all folds are one."""
    counts: list[Counts] = []
    n_weights = len(next(iter(variants.values()), ()))
    for place, fold in enumerate((None, *range(n_weights - 1))):
        own = [s for s in sets if s.fold == fold]
        weights = {name: tuned[place] for name, tuned in variants.items()}
        counts += evaluate_policy(policy, own, frozen, weights, cast, device) if own else []
    return joined(counts)


def joined(counts: Sequence[Counts]) -> list[Counts]:
    """Counts of the same set and variant as one, such as those of all folds.

    Their pictures are different ones, so their places in rankings are counted through.
    """
    found: dict[tuple[str, str], Counts] = {}
    for c in counts:
        key = (c.variant, c.eval_set)
        if (known := found.get(key)) is None:
            found[key] = c
            continue
        moved = tuple(replace(r, pictures=tuple(p + known.n_total for p in r.pictures)) for r in c.rankings)
        found[key] = replace(
            known,
            n_correct=known.n_correct + c.n_correct,
            n_total=known.n_total + c.n_total,
            n_fooled=known.n_fooled + c.n_fooled,
            rankings=(*known.rankings, *moved),
        )
    return list(found.values())


@torch.no_grad()
def evaluate_policy(
    policy: Policy, sets: Sequence[EvalData], frozen: Frozen, variants: Mapping[str, Weights],
    cast: Callable[[], AbstractContextManager[Any]], device: torch.device,
) -> list[Counts]:  # fmt: skip
    """Counts of every variant of the weights on every set; the ranks share the work and all get the sums.

    The policy holds the weights of the last variant afterwards.
    """
    rank, world = rank_and_world()
    totals = torch.zeros(len(sets), len(variants), 3, dtype=torch.int64, device=device)
    rankings: dict[tuple[str, str], tuple[Ranking, ...]] = {}
    for v, (variant, weights) in enumerate(variants.items()):
        policy.load_weights(weights)
        policy_text_CD = policy.text(frozen.text_CD.to(device))
        for i, data in enumerate(sets):
            text_CD = policy_text_CD[list(data.candidates)]
            columns = torch.full((len(frozen.text_CD) + 1,), -2)
            columns[list(data.candidates)] = torch.arange(len(data.candidates))
            mine = range(rank, len(data.rows), world)
            at_once = max(1, min(EVAL_BATCH, EVAL_BYTES // data.rows.inputs.bytes_of_one))
            scores_NQ = scores_of(data, device)
            for start in range(0, len(mine), at_once):
                chosen = mine[start : start + at_once]
                with cast():
                    image_BD = policy.embed(data.rows.inputs(chosen).to(device))
                logps_BC = class_logps(image_BD, text_CD, frozen.logit_scale)
                if data.queries is not None:
                    queries_QD = policy_text_CD[list(data.queries.captions)]
                    scores_NQ[list(chosen)] = image_BD @ queries_QD.T
                labels = columns[data.rows.labels[list(chosen)]].to(device)
                attacks = columns[data.rows.attack_labels[list(chosen)]].to(device)
                if data.pairwise:
                    logps_BC = between(logps_BC, labels, attacks)
                totals[i, v] += count_predictions(logps_BC, labels, attacks)
            if data.queries is not None:
                rankings[variant, data.name] = ranked_by(sum_over_ranks(scores_NQ), data, data.queries)
    sums = sum_over_ranks(totals)
    return [
        # A clean twin may be judged against the word that is on the other; nothing fools there.
        Counts(
            eval_set=data.name,
            variant=name,
            n_correct=correct,
            n_total=total,
            n_fooled=fooled if is_attacked(data.name) else 0,
            rankings=rankings.get((name, data.name), ()),
        )
        for v, name in enumerate(variants)
        for data, (correct, total, fooled) in zip(sets, sums[:, v].tolist(), strict=True)
    ]


def scores_of(data: EvalData, device: torch.device) -> Tensor:
    """Room for the cosines of pictures and queries, float32 (N, Q); 0 where another rank has the picture."""
    queries = 0 if data.queries is None else len(data.queries.captions)
    return torch.zeros(len(data.rows), queries, device=device)


def ranked_by(scores_NQ: Tensor, data: EvalData, queries: Queries) -> tuple[Ranking, ...]:
    """The pictures that have a group, in the order of each query's scores."""
    shown = torch.nonzero(data.rows.groups >= 0)[:, 0]
    groups, scores = data.rows.groups[shown].numpy(), scores_NQ.cpu()[shown].numpy()
    majority = queries.majority or (None,) * len(queries.captions)
    found = [
        ranked(score, groups, queries.k, query=query, group_names=queries.groups, majority=usual)
        for score, query, usual in zip(scores.T, data.asked, majority, strict=True)
    ]
    # Places are rows of the set, also where some of its pictures have no group.
    return tuple(replace(r, pictures=tuple(shown[list(r.pictures)].tolist())) for r in found)


def evaluate_reference(
    policy: Policy,
    prepared: PreparedSet,
    frozen: Frozen,
    config: TrainConfig,
    device: torch.device | None = None,
) -> list[Counts]:
    """Counts of the untouched model on all sets, through the same computation as any policy's."""
    device = device or torch.device("cpu")
    policy.to(device).eval()
    cast = autocast(resolved_precision(config.precision, device), device)
    untouched = {"reference": [policy.trainable_weights()] * (1 + prepared.folds)}
    return evaluate_folds(policy, prepared.evaluation, frozen, untouched, cast, device)
