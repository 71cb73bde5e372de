"""The typographic task: splits without leaks, and words that mislead."""

import dataclasses

import numpy as np
import pytest

from clippo.config import DataConfig
from clippo.data.attack import FONTS
from clippo.demo.scenes import SPRITE_STYLES, load_material, material_of_split
from clippo.tasks import TypographicTask
from clippo.tasks.typographic import KINDS, nonsense_like


@pytest.fixture(scope="module")
def task() -> TypographicTask:
    return TypographicTask(DataConfig(train_pictures=200, eval_pictures=40))


def test_seen_and_held_out_classes_share_nothing(task: TypographicTask) -> None:
    assert len(task.seen) == len(task.held_out) == 64
    assert not set(task.seen) & set(task.held_out)
    assert {p.label for p in task.parts["train"].pictures} <= set(task.seen)
    assert {p.label for p in task.parts["test/held_out"].pictures} <= set(task.held_out)


def test_no_picture_photo_font_or_test_style_is_in_two_splits(task: TypographicTask) -> None:
    keys = [{p.key for p in part.pictures} for part in task.parts.values()]
    assert len(set().union(*keys)) == sum(len(k) for k in keys)
    assert not set(FONTS["train"]) & set(FONTS["validation"])
    assert not set(FONTS["test"]) & {*FONTS["train"], *FONTS["validation"]}
    assert not set(SPRITE_STYLES["test"]) & {*SPRITE_STYLES["train"], *SPRITE_STYLES["validation"]}
    photos = [load_material(("noto",), (split,)).photos for split in ("train", "validation", "test")]
    pixels = [{p.tobytes() for p in split} for split in photos]
    assert all(pixels)
    assert sum(map(len, pixels)) == len(set().union(*pixels))


def test_rows_of_a_picture(task: TypographicTask) -> None:
    part = task.parts["test/held_out"]
    rows = {r.set_name: r for r in task.rows(part, 3, lambda image: image)}
    assert set(rows) == {f"test/{kind}/held_out" for kind in KINDS["test"]} == set(part.sets)
    attacked = rows["test/attacked/held_out"]
    assert attacked.label == rows["test/clean/held_out"].label
    assert attacked.attack_label in task.held_out
    assert attacked.attack_label != attacked.label
    assert rows["test/nonsense/held_out"].attack_label == -1
    assert rows["test/reading/held_out"].label == attacked.attack_label
    pictures = {np.asarray(r.image).tobytes() for r in rows.values()}
    assert len(pictures) == 4
    again = {r.set_name: r for r in task.rows(part, 3, lambda image: image)}
    assert all(np.array_equal(np.asarray(rows[n].image), np.asarray(again[n].image)) for n in rows)


def test_on_request_the_word_is_also_mirrored(task: TypographicTask) -> None:
    asked = TypographicTask(dataclasses.replace(task.config, mirrored_words=True))
    assert asked.parts["validation/seen"].sets == task.parts["validation/seen"].sets
    part = asked.parts["test/held_out"]
    rows = {r.set_name: r for r in asked.rows(part, 3, lambda image: image)}
    mirrored = rows.pop("test/mirrored/held_out")
    assert {*rows, mirrored.set_name} == set(part.sets)
    usual = {r.set_name: r for r in task.rows(task.parts["test/held_out"], 3, lambda image: image)}
    assert all(np.array_equal(np.asarray(rows[n].image), np.asarray(usual[n].image)) for n in usual)
    clean, attacked = rows["test/clean/held_out"], rows["test/attacked/held_out"]
    assert (mirrored.label, mirrored.attack_label) == (clean.label, -1)
    inked = [np.any(np.asarray(r.image) != np.asarray(clean.image), axis=-1) for r in (attacked, mirrored)]
    places = [(np.flatnonzero(ink.any(0))[[0, -1]], np.flatnonzero(ink.any(1))[[0, -1]]) for ink in inked]
    assert np.array_equal(*places), "the same place"
    assert not np.array_equal(*inked)


def test_copies_carry_different_words() -> None:
    task = TypographicTask(DataConfig(train_pictures=8, attacked_copies=5))
    part = task.parts["train"]
    rows = [r for r in task.rows(part, 0, lambda image: image) if r.set_name == "train/attacked"]
    assert len(rows) == 5
    assert len({r.attack_label for r in rows}) > 1
    assert all(r.attack_label != r.label for r in rows)
    assert {r.attack_label for r in rows} <= set(task.seen)


def test_nonsense_has_the_shape_of_the_word_and_is_no_class() -> None:
    rng = np.random.default_rng(0)
    for word in ("anchor", "bus", "flamingo"):
        for _ in range(20):
            nonsense = nonsense_like(word, ["bat", "cat"], rng)
            assert len(nonsense) == len(word)
            assert [c in "aeiou" for c in nonsense] == [c in "aeiou" for c in word]
            assert nonsense not in ("bat", "cat")
    assert nonsense_like("Bat", ["Bat", *"AEIOU"], rng).casefold() not in {"bat", *"aeiou"}


@pytest.mark.parametrize(
    ("word", "classes"),
    [
        ("707-320", ["707-320", "747-100"]),
        ("7", list("0123456789")),
        ("e", list("abcdefghijklmnopqrstuvwxyz")),
        ("?!", ["?!"]),
    ],
)
def test_a_word_of_any_letters_has_its_nonsense(word: str, classes: list[str]) -> None:
    nonsense = nonsense_like(word, classes, np.random.default_rng(0))
    assert nonsense not in classes
    assert len(nonsense) - len(word) == (len(word) < 3), (
        "longer only where all words of its shape are classes"
    )


def test_all_material_of_a_split_has_every_class() -> None:
    for split in ("train", "validation", "test"):
        assert len(material_of_split(split).classes) == 128
