"""The prepared set: content-addressed, complete, and equal to what it was made from."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clippo.config import DataConfig, ModelConfig
from clippo.errors import DataError
from clippo.model import ClipModel, Policy
from clippo.prepared import PreparedSet, open_prepared, prepare
from clippo.tasks import TypographicTask
from clippo.train.batches import Pairs, epoch_batches
from clippo.train.step import Frozen

TINY = DataConfig(train_pictures=12, eval_pictures=4)


def folder_of_pictures(root: Path, classes: int = 6, each: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for c in range(classes):
        for i in range(each):
            path = root / f"class_{c}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(path)
    return root


def test_the_same_inputs_are_prepared_once(small_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare("typographic", TINY, ModelConfig(), small_cache)
    before = (first / "manifest.json").stat().st_mtime_ns
    assert prepare("typographic", TINY, ModelConfig(prompt="{}"), small_cache) == first  # prompts come later
    assert (first / "manifest.json").stat().st_mtime_ns == before
    others = [
        prepare("typographic", dataclasses.replace(TINY, split_seed=1), ModelConfig(), small_cache),
        prepare("typographic", TINY, ModelConfig(trainable="last:1"), small_cache),
    ]
    assert len({first, *others}) == 3


def test_an_unfinished_set_is_built_again(tmp_path: Path) -> None:
    folder = prepare("typographic", TINY, ModelConfig(), tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="prepare it again"):
        open_prepared(folder)
    assert len(open_prepared(prepare("typographic", TINY, ModelConfig(), tmp_path)).clean) == 12


def test_processes_do_not_change_the_set(tmp_path: Path) -> None:
    config = DataConfig(train_pictures=140, eval_pictures=4)  # two shards of train pictures
    sets = [
        open_prepared(prepare("typographic", config, ModelConfig(), tmp_path / str(n), processes=n))
        for n in (1, 2)
    ]
    assert len(sets[0].clean) == len(sets[1].clean) == 140
    for one, two in zip(
        [sets[0].clean, sets[0].attacked, *(e.rows for e in sets[0].evaluation)],
        [sets[1].clean, sets[1].attacked, *(e.rows for e in sets[1].evaluation)],
        strict=True,
    ):
        assert torch.equal(one.inputs(range(len(one))), two.inputs(range(len(two))))
        assert torch.equal(one.reference, two.reference)
        assert torch.equal(one.attack_labels, two.attack_labels)


def test_cached_activations_are_those_of_the_live_tower(small_cache: Path, clip: ClipModel) -> None:
    prepared = open_prepared(prepare("typographic", TINY, ModelConfig(), small_cache))
    task, policy = TypographicTask(TINY), Policy(clip, "last:2").eval()
    part = task.parts["train"]
    live = [
        r.image for i in range(12) for r in task.rows(part, i, clip.pixels) if r.set_name == "train/attacked"
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in live]))
    inputs = prepared.attacked.inputs(range(12))
    assert torch.equal(inputs, policy.frozen(pixels).bfloat16())
    with torch.no_grad():
        whole = clip.model.encode_image(clip.normalized(pixels), normalize=True)
        torch.testing.assert_close(policy(inputs.float()), prepared.attacked.reference)
    torch.testing.assert_close(prepared.attacked.reference, whole, atol=0.02, rtol=0)  # one bfloat16 rounding


def test_pixels_are_kept_as_they_are(small_cache: Path, clip: ClipModel) -> None:
    prepared = open_prepared(prepare("typographic", TINY, ModelConfig(trainable="image"), small_cache))
    task = TypographicTask(TINY)
    first = next(task.rows(task.parts["train"], 0, clip.pixels)).image
    assert np.array_equal(prepared.clean.inputs([0])[0].numpy(), np.asarray(first))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_pair_comes_once_an_epoch(small_set: PreparedSet, frozen: Frozen, world: int) -> None:
    cpu, pairs = torch.device("cpu"), Pairs.of(small_set, frozen)
    for epoch in (0, 1):
        ranks = [list(epoch_batches(pairs, 48, 0, epoch, r, world, cpu)) for r in range(world)]
        for batches in zip(*ranks, strict=True):
            assert sum(b.share for b in batches) == pytest.approx(1)
        seen = torch.cat([b.reference_chosen_logps for batches in ranks for b in batches])
        assert torch.equal(seen.sort().values, pairs.reference_chosen_logps_M.sort().values)
        assert len(seen.unique()) > 150


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "pictures")
    data = DataConfig(source=f"folder:{root}", train_pictures=20, eval_pictures=6)
    prepared = open_prepared(prepare("typographic", data, ModelConfig(), tmp_path / "cache"))
    assert prepared.classes == tuple(f"class {c}" for c in range(6))
    assert len(prepared.clean) == 20
    assert {e.name for e in prepared.evaluation} >= {"validation/clean/seen", "test/nonsense/held_out"}


def test_one_broken_picture_is_left_out_and_many_are_refused(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "pictures", classes=4, each=60)
    data = DataConfig(source=f"folder:{root}", train_pictures=200, eval_pictures=60)
    task = TypographicTask(data)
    train = [p.key for p in task.parts["train"].pictures]
    (root / train[0]).write_bytes(b"this is no picture")
    folder = prepare("typographic", data, ModelConfig(), tmp_path / "cache")
    assert [
        entry.split(":")[0] for entry in json.loads((folder / "manifest.json").read_text())["left_out"]
    ] == [train[0]]
    assert len(open_prepared(folder).clean) == len(train) - 1

    for key in train[1:8]:
        (root / key).write_bytes((root / key).read_bytes()[:300])
    with pytest.raises(DataError, match=r"max_unreadable allows 1\.0%"):
        prepare("typographic", data, ModelConfig(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [("folder:/nowhere", "no such folder"), ("imagenet", "demo, folder"), ("demo:x", "no argument")],
)
def test_a_source_that_cannot_be_used(source: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=complaint):
        prepare("typographic", DataConfig(source=source), ModelConfig(), tmp_path)
