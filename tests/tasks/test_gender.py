"""The task about groups: splits without leaks, pairs of every kind, and a knob that turns what is read."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gender import measured
from clippo.config import DataConfig, ModelConfig
from clippo.data.datasets import splits_of
from clippo.data.group_sets import GroupedImage, open_group_set
from clippo.errors import ConfigError, DataError
from clippo.evaluate import Counts
from clippo.evaluate.rankings import mean_skew, ranked
from clippo.evaluation import evaluate_model
from clippo.front import wilson_interval
from clippo.model import ClipModel, policy_of
from clippo.prepared import Location, PreparedSet, prepare
from clippo.tasks import GenderTask, objectives_of
from clippo.tasks.base import PairTable, Part, TrainRows, joined_name
from clippo.tasks.group_parts import MeasuredSet
from clippo.train import FileCheckpoints, TrialSettings, fit
from clippo.train.ray_train import measure_reference
from clippo.train.shared import Shared, load_shared
from sweeps.gender_sweep import gender_sweep
from tests.data.test_group_sets import fairface, released_vl_bias

SMALL = DataConfig(
    source="people", kept_source="demo", seen_share=0.6, folds=3, train_pictures=480, eval_pictures=288,
    top_k=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def task() -> GenderTask:
    return GenderTask(SMALL)


# --- pictures ---------------------------------------------------------------------------------------------


def test_no_concept_is_seen_and_held_out_and_no_picture_in_two_splits(task: GenderTask) -> None:
    assert (len(task.seen), len(task.held_out)) == (12, 8)
    assert not set(task.seen) & set(task.held_out)
    majority = task.people.found.majority
    assert Counter(majority[c] for c in task.seen) == {0: 7, 1: 5}, "both kinds of concept are held out"
    by_split: dict[str, set[str]] = {}
    for part in task.parts.values():
        by_split.setdefault(part.name.split("/")[0], set()).update(p.key for p in part.pictures)
    train, validation, test = (by_split[split] for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_nothing_of_held_out_concepts_can_steer(task: GenderTask) -> None:
    assert {p.label for p in task.parts["train"].pictures} == set(task.seen)
    assert not [name for name in task.parts if "held_out" in name and not name.startswith("test/")]
    objectives = GenderTask.objectives(SMALL)
    assert not [name for name in objectives.sets if "held_out" in name]
    parts = {joined_name(part.name, part.fold) for part in task.parts.values()}
    assert {f"test/{name}" for name in objectives.curve_sets} <= parts


def test_each_seen_concept_is_measured_without_its_pairs_once(task: GenderTask) -> None:
    assert [len(fold) for fold in task.folds] == [4, 4, 4]
    assert sorted(c for fold in task.folds for c in fold) == list(task.seen)
    majority = task.people.found.majority
    assert [{majority[c] for c in fold} for fold in task.folds] == [{0, 1}] * 3
    rows = train_rows(task)
    for fold, concepts in enumerate(task.folds):
        left = rows.without(fold, task.parts["train"].folds)
        assert set(left.labels_N.tolist()) == set(task.seen) - set(concepts)
        named = {name.removeprefix("man ").removeprefix("woman ") for name in named_in(task, left.candidates)}
        assert named == {*named_in(task, set(task.seen) - set(concepts)), "man", "woman"}
        table = GenderTask.pairs("correct+image", {"train/shown": left})
        used = np.concatenate((table.picture_w, table.picture_l, table.clean))
        assert set(rows.labels_N[used].tolist()) == set(task.seen) - set(concepts)
        for split in ("validation", "test"):
            part = task.parts[f"{split}/concept/unpaired/{fold}"]
            assert part.queries is not None
            assert (part.fold, part.queries.captions, part.candidates) == (fold, concepts, task.seen)
            own = [p.key for p in task.parts[f"{split}/concept/seen"].pictures if p.label in concepts]
            assert [p.key for p in part.pictures] == own
    objectives = GenderTask.objectives(SMALL)
    assert objectives.goal.sets == ("concept/seen", "concept/unpaired")
    assert {"concept/unpaired", "minority/unpaired"} <= set(objectives.retention_sets)
    every = GenderTask(replace(SMALL, folds=0))
    assert not [name for name in every.parts if "unpaired" in name]
    assert GenderTask.objectives(every.config).goal.sets == ("concept/seen",)


def named_in(task: GenderTask, classes: Iterable[int]) -> set[str]:
    return {task.classes[c] for c in classes}


def test_pools_are_balanced_and_ranked_for_bare_concepts(task: GenderTask) -> None:
    part = task.parts["test/concept/held_out"]
    cells = Counter((p.label, p.group) for p in part.pictures)
    assert set(cells.values()) == {12}
    assert len(cells) == 8 * 2
    assert part.queries is not None
    assert [task.classes[c] for c in part.queries.captions] == [task.classes[c] for c in task.held_out]
    assert part.queries.majority == tuple(task.people.found.majority[c] for c in task.held_out)
    assert task.parts["test/minority/seen"].candidates == (20, 21)
    assert {task.classes[p.label] for p in task.parts["test/minority/seen"].pictures} == {"man", "woman"}
    (row,) = task.rows(part, 0, lambda image: image.resize((32, 32)))
    assert (row.set_name, row.label, row.group) == (part.name, task.held_out[0], 0)


def test_captions_follow_the_prompts_of_a_set(tmp_path: Path) -> None:
    names = (
        "verb/baking/man/1.png",
        "verb/baking/woman/1.png",
        "occu/judge/woman/7.png",
        "occu/judge/man/8.png",
    )
    for name in (*names, "verb/dancing/man/3.png", "verb/singing/woman/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    task = GenderTask(DataConfig(source=f"vl-bias:{tmp_path}"))
    captions = dict(zip(range(99), zip(task.classes, task.templates, strict=True), strict=False))
    assert captions[task.people.concept(0)] == ("baking", task.templates[0])
    assert "a person is {}" in task.templates[0].split("\n")
    woman_baking, prompts = captions[task.people.at_work(1, 0)]
    assert woman_baking == "baking"
    assert "a woman is {}" in prompts.split("\n")
    assert captions[task.people.group(1)] == ("woman", "")


def test_a_model_card_says_what_the_knob_must_not_be_used_for() -> None:
    assert GenderTask.words.card, "export writes it (tests/tasks/test_toy.py)"
    _, forbidden = GenderTask.words.card.split("must not be used to")
    for use in ("rank or screen people", "infer anybody's gender", "more biased"):
        assert use in forbidden


# --- pairs ------------------------------------------------------------------------------------------------

# Concepts 0 and 1, groups 2 to 4, each group with each concept 5 to 10; the majority of 0 is group 0, 1 has
# none. A row's group is twice its own, and one more where that is the majority.
THREE_GROUPS = TrainRows(
    first=100,
    labels_N=np.array([0, 0, 0, 1]),
    attack_labels_N=np.array([2, 3, 4, 3]),
    groups_N=np.array([1, 2, 4, 2]),
    candidates=tuple(range(11)),
)


def cells(kind: str, rows: TrainRows = THREE_GROUPS) -> list[tuple[int, int, int, int]]:
    table = GenderTask.pairs(kind, {"train/shown": rows})
    columns = (table.picture_w, table.caption_w, table.picture_l, table.caption_l)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def test_correct_pairs_prefer_the_shown_group_to_each_other_one() -> None:
    found = cells("correct")
    assert len(found) == 4 * 2 * 2, "four pictures, two other groups, with and without the concept"
    assert [c for c in found if c[0] == 101] == [
        (101, 3, 101, 2), (101, 7, 101, 5), (101, 3, 101, 4), (101, 7, 101, 9),
    ]  # fmt: skip
    assert [c for c in found if c[0] == 103][1] == (103, 8, 103, 6)
    assert cells("reverse") == [(p, wrong, p, own) for p, own, _, wrong in found]


def test_image_pairs_prefer_the_minority_for_a_bare_concept() -> None:
    assert cells("image") == [(101, 0, 100, 0), (102, 0, 100, 0)] * 2
    assert cells("correct+image") == cells("correct") + cells("image")
    assert cells("counter+image")[:2] == [(100, 3, 100, 2), (100, 4, 100, 2)], "the majority's picture alone"
    table = GenderTask.pairs("image", {"train/shown": THREE_GROUPS})
    assert table.clean.tolist() == [101, 100, 101, 100], "the KL term sees both kinds of picture"
    assert table.near is not None
    assert table.near.tolist() == [0, 1, *range(5, 11)], "and no caption of a group alone"


@pytest.mark.parametrize("kind", GenderTask.pair_kinds)
def test_kinds_that_compare_two_pictures_are_known(kind: str) -> None:
    two_pictures = any(chosen != rejected for chosen, _, rejected, _ in cells(kind))
    assert two_pictures == (kind in GenderTask.image_kinds)


def test_pairs_of_images_want_a_majority() -> None:
    unknown = TrainRows(0, np.array([0]), np.array([2]), np.array([0]), tuple(range(8)))
    with pytest.raises(ConfigError, match=r"pairs 'image' want concepts with a majority group"):
        cells("image", unknown)
    none = TrainRows(0, *np.zeros((3, 0), dtype=np.int64), tuple(range(8)))
    with pytest.raises(ConfigError, match=r"no train picture; raise data\.train_pictures or set data\.folds"):
        cells("image", none)


# --- what cannot be done ----------------------------------------------------------------------------------


def grouped(folder: Path, concepts: int) -> str:
    lines = ["path,group,concept,split"]
    for split in ("train", "validation", "test"):
        for c in range(concepts):
            for g, n in (("north", 3), ("south", 1), ("east", 1)):
                lines += [f"{split}-{c}-{g}-{i}.png,{g},concept {c},{split}" for i in range(n)]
    for line in lines[1:]:
        Image.new("RGB", (8, 8)).save(folder / line.split(",")[0])
    (folder / "people.csv").write_text("\n".join(lines))
    return f"grouped:{folder / 'people.csv'}"


def test_any_table_of_any_groups_is_a_source_and_a_test_set(tmp_path: Path) -> None:
    source = grouped(tmp_path, 4)
    task = GenderTask(DataConfig(source=source, test_sets=(f"again={source}",), top_k=3))
    assert task.people.found.groups == ("east", "north", "south")
    assert task.people.found.majority == (1, 1, 1, 1)
    assert len(task.parts["train"].pictures) == 2 * 5
    minority = task.parts["test/minority/held_out"]
    assert {task.classes[p.label] for p in minority.pictures} == {"east", "south"}
    assert "test/neutral/seen" not in task.parts, "every picture has a group"
    again = task.parts["test/group/again"]
    assert {task.classes[c] for c in again.candidates} == {"east", "north", "south"}
    assert len(again.pictures) == 4 * 5
    assert task.parts["test/concept/again"].queries is not None
    table = GenderTask.pairs("correct+image", {"train/shown": train_rows(task)})
    assert len(table.clean) == 10 * 2 * 2 + 2 * 2 * 2


def test_faces_without_concepts_are_told_apart_by_group(tmp_path: Path) -> None:
    task = GenderTask(replace(SMALL, test_sets=(f"fairface:{fairface(tmp_path)}",)))
    faces = task.parts["test/group/fairface"]
    assert {task.classes[c] for c in faces.candidates} == {"Female", "Male"}
    assert [task.classes[p.label] for p in faces.pictures] == ["Female"], (
        "the table for validation is the test"
    )
    assert "test/concept/fairface" not in task.parts
    (row,) = task.rows(faces, 0, lambda image: image)
    assert (row.set_name, row.label) == ("test/group/fairface", faces.pictures[0].label)


def test_a_test_set_without_labels_is_read_but_not_ranked(tmp_path: Path) -> None:
    spec = f"vl-bias:{released_vl_bias(tmp_path, pictures=30)}"
    task = GenderTask(replace(SMALL, test_sets=(spec,)))
    concepts = task.parts["test/concept/vl-bias"]
    assert named_in(task, concepts.candidates) == {"baking", "ice skating", "judge"}
    assert concepts.queries is None, "MaxSkew needs labels"
    assert {task.templates[c].count("{}") for c in concepts.candidates} == {4}
    assert [p.key.split("/")[1] for p in concepts.pictures[:3]] == ["baking", "ice_skating", "judge"]
    judges = [p.key for p in concepts.pictures if task.classes[p.label] == "judge"]
    leaning = task.parts["test/neutral/vl-bias"]
    assert [p.key for p in leaning.pictures] == judges, "the source knows the majority of these alone"
    assert named_in(task, leaning.candidates) == {"man", "woman"}
    assert named_in(task, {p.label for p in leaning.pictures}) == {"man"}
    men = task.parts["test/read_as_man/vl-bias"]
    assert [p.key for p in men.pictures] == [p.key for p in concepts.pictures]
    assert named_in(task, {p.label for p in men.pictures}) == {"man"}
    assert men.candidates == leaning.candidates
    own = [name for name in task.parts if name.endswith("/vl-bias")]
    assert len(own) == 3, "women are the rest"
    with pytest.raises(DataError, match="vl-bias needs pictures of two groups or more, and has none"):
        GenderTask(DataConfig(source=spec))
    [check] = [check for what, check in GenderTask.needs(task.config) if what == f"test set {spec}"]
    assert check() is not None


def test_what_a_model_reads_on_pictures_without_labels(tmp_path: Path, small_cache: Path) -> None:
    people = open_group_set("people")
    for picture in people.pictures:  # that show no group
        concept = people.concepts[picture.concept]
        if picture.split == "test" and picture.group < 0 and concept in ("judge", "teacher"):
            path = tmp_path / "occu" / concept / f"{picture.key.rsplit('/', 1)[1]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.load().save(path)
    data = replace(SMALL, folds=0, train_pictures=48, eval_pictures=96, top_k=3)
    shared = shared_of(replace(data, test_sets=(f"vl-bias:{tmp_path}",)), small_cache)
    counts = {c.eval_set: c for c in measure_reference(shared, gpus=0) if c.eval_set.endswith("/vl-bias")}
    assert set(counts) == {f"test/{name}/vl-bias" for name in ("concept", "neutral", "read_as_man")}
    assert not any(c.rankings for c in counts.values())
    assert counts["test/concept/vl-bias"].accuracy > 0.9
    leaning, men = counts["test/neutral/vl-bias"], counts["test/read_as_man/vl-bias"]
    assert leaning.n_total == men.n_total > 15
    assert leaning.accuracy > 0.7, "judges are read as men, and teachers as women"
    assert 0.2 < men.accuracy < 0.8


def test_a_group_set_by_itself_is_measured_as_in_a_sweep(small_cache: Path) -> None:
    data = replace(SMALL, folds=0, train_pictures=48, eval_pictures=96, top_k=3, test_sets=("again=people",))
    shared = shared_of(data, small_cache)
    in_sweep = {c.eval_set: c for c in measure_reference(shared, gpus=0) if c.eval_set.endswith("/again")}
    clip, _, _ = load_shared(shared)
    seen: list[tuple[int, int]] = []
    alone, left_out = evaluate_model(
        clip, "people", prompt=shared.model.prompt, pictures=96, font_size=data.font_size, top_k=3,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert {f"{c.eval_set}/again" for c in alone} == set(in_sweep)
    assert {c.eval_set for c in alone} == {"test/concept", "test/group", "test/neutral"}
    assert not left_out
    assert seen[-1] == (sum(c.n_total for c in alone),) * 2
    for counts in alone:
        other = in_sweep[f"{counts.eval_set}/again"]
        assert counts.n_total == other.n_total
        assert counts.n_correct == pytest.approx(other.n_correct, abs=1), "sums in another order"
        assert len(counts.rankings) == len(other.rankings)
    ranked, other = alone[0], in_sweep["test/concept/again"]
    assert len(ranked.rankings) == 20
    assert {r.majority for r in ranked.rankings} == {0, 1}
    assert [(r.query, r.pool, r.majority) for r in ranked.rankings] == [
        (r.query, r.pool, r.majority) for r in other.rankings
    ]
    assert mean_skew(ranked.rankings) == pytest.approx(mean_skew(other.rankings), abs=0.03)


def test_a_group_set_by_itself_is_refused_where_nothing_can_be_said(clip: ClipModel, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"prompt": "{}", "pictures": 24, "font_size": (0.1, 0.2)}
    with pytest.raises(ConfigError, match=r"top_k is 24, but test/concept/set has 16 pictures"):
        evaluate_model(clip, "people", **settings)
    with pytest.raises(ConfigError, match=r"concepts of people have names; leave out class_names \(a\.txt\)"):
        evaluate_model(clip, "people", **settings, class_names="a.txt")
    released = f"vl-bias:{released_vl_bias(tmp_path, pictures=30)}"
    with pytest.raises(DataError, match=r"it can be a test set of a sweep .* clippo evaluate --groups"):
        evaluate_model(clip, released, **settings)
    with pytest.raises(ConfigError, match="groups is 'man' alone; give two or more"):
        evaluate_model(clip, released, **settings, groups=("man",))
    with pytest.raises(ConfigError, match="groups has 'man' twice; give two or more different ones"):
        evaluate_model(clip, released, **settings, groups=("man", "woman", "man"))
    with pytest.raises(ConfigError, match="'<18' and '>=18' would both be reported as read_as__18; rename"):
        evaluate_model(clip, released, **settings, groups=("<18", ">=18", "any"))
    with pytest.raises(ConfigError, match=r"people has labels of its own \(man, woman\); leave out groups"):
        evaluate_model(clip, "people", **settings, groups=("man", "woman"))
    with pytest.raises(ConfigError, match=r"demo is no set of people; leave out groups \(man, woman\)"):
        evaluate_model(clip, "demo", **settings, groups=("man", "woman"))
    counts, _ = evaluate_model(clip, released, **settings, groups=("man", "woman", "child"))
    assert [(c.eval_set, c.rankings) for c in counts] == [
        ("test/concept", ()), ("test/read_as_man", ()), ("test/read_as_woman", ()),
    ]  # fmt: skip


def listed(folder: Path, rows: Iterable[tuple[str, str, int]], split: str = "") -> str:
    """A table of so many pictures, which are not there, of each concept and group."""
    lines = [
        f"{split}{concept}-{group}-{i}.png,{group},{concept},{split}"
        for concept, group, n in rows
        for i in range(n)
    ]
    table = folder / "listed.csv"
    before = table.read_text() if table.exists() else "path,group,concept,split\n"
    table.write_text(before + "\n".join(lines) + "\n")
    return f"grouped:{table}"


def skew_by_chance(part: Part) -> float:
    """The mean MaxSkew of random rankings."""
    assert part.queries is not None
    groups = np.array([p.group for p in part.pictures if p.group >= 0])
    scores, names = np.random.default_rng(0).random((200, len(groups))), part.queries.groups
    return mean_skew([ranked(s, groups, part.queries.k, query="", group_names=names) for s in scores])


def test_a_model_without_bias_has_no_skew_where_one_group_has_few_pictures(tmp_path: Path) -> None:
    rows = [(f"concept {c}", *cell) for c in range(4) for cell in (("north", 27), ("south", 3), ("", 5))]
    for split in ("train", "validation", "test"):
        spec = listed(tmp_path, rows, split)
    task = GenderTask(DataConfig(source=spec, test_sets=(f"again={spec}",), top_k=6))
    alone = MeasuredSet(spec, "set", DataConfig(top_k=6)).parts
    own = ("validation/concept/seen", "test/concept/seen", "test/concept/held_out", "test/concept/again")
    for part in (*(task.parts[name] for name in own), alone["test/concept/set"]):
        cells = Counter((p.label, p.group) for p in part.pictures if p.group >= 0)
        assert set(cells.values()) == {3}
        assert skew_by_chance(part) < 0.25, "and .5 if the pool were as listed"
    assert len(task.parts["test/majority/seen"].pictures) == 2 * 27, "reading needs no balance"
    assert len(task.parts["test/group/again"].pictures) == 4 * 30
    with pytest.raises(ConfigError, match=r"top_k is 25, but test/concept/set has 24 pictures of a group"):
        MeasuredSet(spec, "set", DataConfig(top_k=25))


def test_a_concept_that_lacks_a_group_cannot_be_ranked(tmp_path: Path) -> None:
    spec = listed(tmp_path, [("dancing", "north", 9), ("dancing", "south", 9), ("singing", "north", 9)])
    with pytest.raises(DataError, match="no test picture of 'singing' that shows 'south', and rankings need"):
        MeasuredSet(spec, "set", DataConfig(top_k=3))


def test_a_concept_of_no_group_is_read_but_not_ranked(tmp_path: Path) -> None:
    spec = listed(tmp_path, [("dancing", "north", 9), ("dancing", "south", 4), ("singing", "", 9)])
    part = MeasuredSet(spec, "set", DataConfig(top_k=3)).parts["test/concept/set"]
    assert part.queries is not None
    assert (part.queries.captions, part.candidates) == ((0,), (0, 1))
    assert Counter((p.label, p.group) for p in part.pictures) == {(0, 0): 4, (0, 1): 4, (1, -1): 9}


def test_test_sets_without_splits_are_taken_whole(tmp_path: Path) -> None:
    rows = [(f"concept {c}", group, 40) for c in range(4) for group in ("north", "south")]
    spec = listed(tmp_path, rows)
    alone = MeasuredSet(spec, "set", DataConfig(top_k=3, eval_pictures=999)).parts
    assert len(alone["test/concept/set"].pictures) == len(alone["test/group/set"].pictures) == 320
    released = f"vl-bias:{released_vl_bias(tmp_path / 'released', pictures=30)}"
    task = GenderTask(replace(SMALL, test_sets=(released,)))
    assert len(task.parts["test/concept/vl-bias"].pictures) == 3 * 30
    task = GenderTask(DataConfig(source=spec, test_sets=(f"again={spec}",), top_k=3))
    again = {p.key for p in task.parts["test/group/again"].pictures}
    assert 30 < len(again) < 100, "of the source only what nothing is tuned on"
    assert not again & {
        p.key for name in ("train", "validation/concept/seen") for p in task.parts[name].pictures
    }
    (tmp_path / "listed.csv").unlink()
    split = listed(tmp_path, rows, "train")
    split = listed(tmp_path, rows[:2], "test")
    assert len(MeasuredSet(split, "set", DataConfig(top_k=3)).parts["test/group/set"].pictures) == 80


def test_the_majority_of_a_source_is_that_of_its_pictures_for_training(tmp_path: Path) -> None:
    pictures = [GroupedImage(f"{i}.png", i % 4, 0, None, Image.Image) for i in range(400)]
    shown = ["north" if split == "train" else "south" for split in splits_of(pictures)[0]]
    few = iter(range(999))  # of those for training some are south, too, so that south has more in all
    shown = [g if g == "south" or next(few) % 10 < 6 else "south" for g in shown]
    assert shown.count("north") < 200
    lines = [f"{p.key},{group},concept {p.concept}" for p, group in zip(pictures, shown, strict=True)]
    (tmp_path / "people.csv").write_text("path,group,concept\n" + "\n".join(lines))
    spec = f"grouped:{tmp_path / 'people.csv'}"
    assert open_group_set(spec).majority == (1, 1, 1, 1)
    assert GenderTask(DataConfig(source=spec)).people.found.majority == (0, 0, 0, 0)


def test_a_concept_without_a_majority_leaves_the_others_theirs(tmp_path: Path) -> None:
    rows = [("a", "north", 6), ("a", "south", 3), ("b", "north", 3), ("b", "south", 3)]
    part = MeasuredSet(listed(tmp_path, rows), "set", DataConfig(top_k=3)).parts["test/concept/set"]
    assert part.queries is not None
    assert part.queries.majority == (0, -1)


def test_too_few_pictures_that_can_be_read(clip: ClipModel, tmp_path: Path) -> None:
    spec = listed(tmp_path, [(c, g, 4) for c in ("a", "b") for g in ("north", "south")])
    for c in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{c}-north-0.png")
    with pytest.raises(
        ConfigError, match=r"top_k is 3, but only 2 .* lower it \(--top-k\), or repair the 14"
    ):
        evaluate_model(clip, spec, prompt="{}", pictures=99, font_size=(0.1, 0.2), top_k=3)


def train_rows(task: GenderTask) -> TrainRows:
    part = task.parts["train"]
    columns = zip(*((p.label, p.attack_label, p.group) for p in part.pictures), strict=True)
    return TrainRows(0, *map(np.array, columns), part.candidates)


def few_concepts(folder: Path) -> DataConfig:
    return DataConfig(source=grouped(folder, 3))


def deep_top(folder: Path) -> DataConfig:
    return DataConfig(source=grouped(folder, 4), top_k=30)


def many_folds(folder: Path) -> DataConfig:
    return DataConfig(source=grouped(folder, 4), folds=3, top_k=3)


def same_name(folder: Path) -> DataConfig:
    return DataConfig(source=grouped(folder, 4), test_sets=("seen=people",))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (few_concepts, DataError, "has 3 concepts; at least 4 are needed"),
        (
            deep_top,
            ConfigError,
            r"top_k is 30, but validation/concept/seen has 6 pictures of a group; lower it, take .*, or add",
        ),
        (many_folds, ConfigError, "data.folds is 3, but only 2 concepts are seen; lower it"),
        (same_name, ConfigError, "data.test_sets has two sets named 'seen'; write NAME=people"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, make: Callable[[Path], DataConfig], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        _ = GenderTask(make(tmp_path)).parts
    assert "\n" not in str(raised.value)


# --- the knob ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(small_cache: Path) -> Shared:
    return shared_of(SMALL, small_cache)


def shared_of(data: DataConfig, cache: Path) -> Shared:
    model, location = ModelConfig(pretrained="people", trainable="transform"), Location(cache)
    train = gender_sweep().train
    return Shared(
        model=model, train=train, prepared=prepare("gender", data, model, location), location=location
    )


def tuned(shared: Shared, folder: Path, **settings: Any) -> tuple[list[Counts], list[Counts]]:
    """The untouched model's counts, and those of the whole curve, its start measured like any other point."""
    torch.set_num_threads(1)
    clip, prepared, frozen = load_shared(shared)
    reference, reports = measure_reference(shared, gpus=0), list[dict[str, Any]]()
    curve_sets = objectives_of(gender_sweep()).curve_sets
    fit(
        policy_of(clip, "transform"), prepared, frozen, TrialSettings(seed=3, **settings),
        shared.train, report=reports.append, checkpoints=FileCheckpoints(folder), curve_sets=curve_sets,
    )  # fmt: skip
    return reference, [Counts.of(e) for e in reports[-1]["evals"]]


@dataclass(frozen=True)
class Without(PreparedSet):
    """The set of trials that never have the pairs of the second fold, and no folds."""

    @property
    def folds(self) -> int:
        return 0

    def pairs(self, kind: str = "", without: int | None = None) -> PairTable:
        return super().pairs(kind, 1)


QUICK: dict[str, Any] = {
    "pairs": "counter+image", "loss": "dpo", "beta": 0.5, "kl_weight": 20.0, "learning_rate": 4e-3,
    "epochs": 2, "orthogonality": 0.01, "seed": 0,
}  # fmt: skip


def quick_trial(
    prepared: PreparedSet, shared: Shared, folder: Path, stop: bool = False, **more: Any
) -> dict[str, Any]:
    """The last report of a short trial; with ``stop`` it is interrupted after an epoch."""
    torch.set_num_threads(1)
    clip, _, frozen = load_shared(shared)
    reports: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        reports.append(row)
        if stop:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        fit(
            policy_of(clip, "transform"), prepared, frozen, TrialSettings(**QUICK), shared.train,
            report=report, checkpoints=FileCheckpoints(folder), curve_sets=("concept/unpaired",), **more,
        )  # fmt: skip
    return reports[-1]


def counts_at(report: Mapping[str, Any], name: str) -> dict[str, Counts]:
    """Of each variant."""
    return {e["variant"]: Counts.of(e) for e in report["evals"] if e["eval_set"] == name}


def test_a_fold_is_measured_by_a_trial_that_never_had_its_pairs(shared: Shared, tmp_path: Path) -> None:
    _, prepared, _ = load_shared(shared)
    whole = quick_trial(prepared, shared, tmp_path / "whole")
    fields = {n: getattr(prepared, n) for n in PreparedSet.__dataclass_fields__}
    own = tuple(replace(s, fold=None) for s in prepared.evaluation if s.fold == 1)
    assert {s.name.partition("/")[2] for s in own} == {"concept/unpaired", "minority/unpaired"}
    alone = quick_trial(Without(**fields | {"evaluation": own}), shared, tmp_path / "alone")
    n = len(own[0].rows)
    for split in ("validation", "test"):
        joined, single = (counts_at(r, f"{split}/concept/unpaired") for r in (whole, alone))
        assert {"averaged", "last", "t=-1", "t=1.5"} <= set(joined)
        for variant, counts in joined.items():
            if variant == "t=0":
                continue
            assert counts.n_total == 3 * n
            ranked = [r for r in counts.rankings if r.query in {q.query for q in single[variant].rankings}]
            assert [tuple(p - n for p in r.pictures) for r in ranked] == [
                r.pictures for r in single[variant].rankings
            ]
    seen, unpaired = (counts_at(whole, f"validation/concept/{w}")["averaged"] for w in ("seen", "unpaired"))
    assert mean_skew(seen.rankings) < mean_skew(unpaired.rankings), "pairs help their own concepts more"


def test_ranges_of_the_sweep_can_be_looked_for(small_cache: Path) -> None:
    sweep = replace(gender_sweep(), data=SMALL)
    found = measured(sweep, Location(small_cache), settings=3, keeps=0.9, seed=1)
    assert len({one.settings["beta"] for one in found}) == 3
    assert any(0 < one.goal < 0.45 for one in found), "the untouched model has .46"


def test_an_interrupted_trial_goes_on_with_its_folds(shared: Shared, tmp_path: Path) -> None:
    _, prepared, _ = load_shared(shared)
    first = quick_trial(prepared, shared, tmp_path / "again", stop=True)
    assert first["epoch"] == 1
    resumed = quick_trial(prepared, shared, tmp_path / "again")
    assert resumed["epoch"] == 2
    assert resumed["evals"] == quick_trial(prepared, shared, tmp_path / "once")["evals"]


@pytest.mark.parametrize(("told", "gone"), [(2, 5), (3, 5), (5, 6)])
def test_told_to_go_in_mid_epoch_a_trial_goes_on_with_its_folds(
    told: int, gone: int, shared: Shared, tmp_path: Path
) -> None:
    """The policy goes on at a step, and the folds at the start of its epoch.

    Seven times it asks whether it is told: after each of three steps, after the epoch, after three more.
    """
    shared = replace(shared, train=replace(shared.train, batch_size=240, epochs_between_checkpoints=9))
    _, prepared, _ = load_shared(shared)
    asked = iter(range(1, 8))

    def is_leaving() -> bool:
        if (now := next(asked)) == gone:
            raise KeyboardInterrupt
        return now == told

    assert quick_trial(prepared, shared, tmp_path / "told", is_leaving=is_leaving)["epoch"] == 1
    left: list[None] = []
    resumed = quick_trial(prepared, shared, tmp_path / "told", is_leaving=lambda: bool(left.append(None)))
    assert len(left) == 7 - told, "no step of the policy is made again"
    whole = quick_trial(prepared, shared, tmp_path / "once")
    assert (resumed["step"], resumed["evals"]) == (6, whole["evals"])
    assert resumed["metrics"]["loss"] == whole["metrics"]["loss"]


def test_the_power_turns_what_is_read_as_gender_up_and_down(shared: Shared, tmp_path: Path) -> None:
    reference, counts = tuned(
        shared, tmp_path, pairs="correct", loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=3e-3, epochs=12,
        orthogonality=0.05,
    )  # fmt: skip
    by_place = {(c.variant, c.eval_set): c for c in counts}
    untouched = {c.eval_set: (c.n_correct, c.rankings) for c in reference}
    start = {c.eval_set: (c.n_correct, c.rankings) for c in counts if c.variant == "t=0"}
    assert start == {name: untouched[name] for name in start}
    assert {"test/concept/seen", "test/minority/held_out", "validation/clean/kept"} <= set(start)
    for which in ("seen", "held_out"):
        curves = [
            [by_place[f"t={t}", f"test/{side}/{which}"] for t in ("-1", "-0.5", "0", "0.5", "1")]
            for side in ("minority", "majority")
        ]
        for curve in (curves[0], list(zip(*curves, strict=True))):
            sides = [c if isinstance(c, tuple) else (c,) for c in curve]
            read = [(sum(c.n_correct for c in s), sum(c.n_total for c in s)) for s in sides]
            right = [correct for correct, _ in read]
            assert right == sorted(right), "what is read as gender rises with t"
            low_end, high_end = (wilson_interval(*read[i]) for i in (0, -1))
            assert low_end[1] < high_end[0], "and by more than chance"


def test_pairs_of_images_lessen_the_bias_of_held_out_concepts_too(small_cache: Path, tmp_path: Path) -> None:
    every = shared_of(replace(SMALL, folds=0), small_cache)  # all seen concepts have pairs
    reference, counts = tuned(
        every, tmp_path, pairs="counter+image", loss="ipo", beta=0.15, kl_weight=50.0, learning_rate=2e-3,
        epochs=24, orthogonality=0.03,
    )  # fmt: skip
    before, after = (
        {c.eval_set: c for c in some if c.variant == variant}
        for some, variant in ((reference, "reference"), (counts, "averaged"))
    )
    for which, bound in (("seen", 0.7), ("held_out", 0.85)):
        name = f"test/concept/{which}"
        assert mean_skew(after[name].rankings) < bound * mean_skew(before[name].rankings)
        assert after[name].accuracy > before[name].accuracy - 0.02
    assert after["test/minority/seen"].accuracy > before["test/minority/seen"].accuracy - 0.02
    assert after["test/clean/kept"].accuracy > before["test/clean/kept"].accuracy - 0.02
