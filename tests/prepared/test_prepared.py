"""The prepared set: content-addressed, resumable, complete, and equal to what it was made from."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clippo.config import DataConfig, ModelConfig
from clippo.errors import ClippoError, DataError, ResourceError
from clippo.model import ClipModel, policy_of
from clippo.prepared import Location, PreparedSet, build, open_prepared, prepare, workers
from clippo.prepared.shard import Recipe, ShardBuilder, data_digest_of
from clippo.tasks import TASKS, TypographicTask
from clippo.train.batches import Pairs, epoch_batches
from clippo.train.step import Frozen
from tests.conftest import S3Server, processes_of
from tests.data.test_decode import bomb

TINY = DataConfig(train_pictures=12, eval_pictures=4)


def prepared_in(cache: Path, data: DataConfig = TINY, model: ModelConfig | None = None, **how: Any) -> Path:
    return cache / prepare("typographic", data, model or ModelConfig(), Location(cache), **how)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def written(folder: Path) -> dict[str, int]:
    """When each shard's files were written."""
    return {
        str(p): p.stat().st_mtime_ns for p in [*folder.rglob("*.arrow"), *folder.rglob("shards/**/*.json")]
    }


def folder_of_pictures(root: Path, classes: int = 6, each: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for c in range(classes):
        for i in range(each):
            path = root / f"class_{c}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(path)
    return root


def test_the_same_inputs_are_prepared_once(tmp_path: Path) -> None:
    first = prepared_in(tmp_path)
    before = written(first)
    assert prepared_in(tmp_path, model=ModelConfig(prompt="{}")) == first  # prompts come later
    assert prepared_in(tmp_path, dataclasses.replace(TINY, max_unreadable=0.5)) == first
    assert written(first) == before
    others = [
        prepared_in(tmp_path, dataclasses.replace(TINY, split_seed=1)),
        prepared_in(tmp_path, model=ModelConfig(trainable="last:1")),
    ]
    assert len({first, *others}) == 3
    assert manifest_of(others[0])["model_digest"] == manifest_of(first)["model_digest"]
    assert manifest_of(others[1])["data_digest"] == manifest_of(first)["data_digest"]
    mirrored, task = dataclasses.replace(TINY, mirrored_words=True), TypographicTask(TINY)
    assert data_digest_of("typographic", mirrored, task) != manifest_of(first)["data_digest"]
    assert written(first) == before


def test_a_changed_font_file_makes_a_new_set(tmp_path: Path) -> None:
    fonts = sorted((Path(build.__file__).parents[1] / "data" / "fonts").glob("*.ttf"))
    mine = tmp_path / "mine.ttf"
    data = dataclasses.replace(TINY, train_fonts=(str(mine),))
    digests = set()
    for font in fonts[:2]:
        (tmp_path / "next").write_bytes(font.read_bytes())
        (tmp_path / "next").replace(mine)  # the old one may be open
        digests.add(prepared_in(tmp_path, data))
    assert len(digests) == 2


KILLED = """
import sys
from pathlib import Path
from clippo.config import DataConfig, ModelConfig
from clippo.prepared import Location, build, prepare, workers
build.SHARD, workers.FEW = 4, int(sys.argv[3])
prepare(
    "typographic", DataConfig(train_pictures=60, eval_pictures=4), ModelConfig(), Location(Path(sys.argv[1])),
    workers=int(sys.argv[2]), on_progress=lambda done, total: print(done, flush=True),
)
"""


@pytest.mark.parametrize(
    ("n_workers", "few"),
    [
        pytest.param(1, 0, id="here"),
        pytest.param(2, 0, id="Ray Data", marks=pytest.mark.soak),
        pytest.param(2, 99, id="here and by actors"),
    ],
)
def test_a_killed_preparation_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_workers: int, few: int
) -> None:
    data = DataConfig(train_pictures=60, eval_pictures=4)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(n_workers), str(few)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            while int(process.stdout.readline()) < 12:
                pass
            process.kill()  # in the midst of the next shard
            deadline = time.monotonic() + 60
            while any("ShardBuilder" in title for title in processes_of(process.pid).values()):
                assert time.monotonic() < deadline, "workers outlive their driver"
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # Ray's agents take a minute to see that they are alone
    [folder] = (tmp_path / "killed").iterdir()
    before = written(folder)
    finished = [key for key in before if key.endswith(".json")]
    assert 3 <= len(finished) < 19
    assert not (folder / "manifest.json").exists()
    with pytest.raises(DataError, match="prepare it again"):
        open_prepared(folder)
    old, young = (folder / "sets" / "train" / f".{name}.tmp" for name in ("old", "young"))
    old.write_bytes(b"half a file")
    young.write_bytes(b"half a file")
    os.utime(old, (time.time() - 7200,) * 2)

    monkeypatch.setattr(build, "SHARD", 4)
    monkeypatch.setattr(workers, "FEW", few)
    progress: list[tuple[int, int]] = []
    again = prepared_in(
        tmp_path / "killed", data, workers=n_workers, on_progress=lambda *p: progress.append(p)
    )
    assert again == folder
    assert progress[0] == (4 * len(finished), 76)
    assert progress[-1] == (76, 76)
    assert len(progress) == 1 + 19 - len(finished)
    after = written(folder)
    # Files of the shard that it was killed in may be there without its summary; they are written again.
    kept = {json.loads(Path(key).read_text())["key"]: key for key in finished}
    files = [f["file"] for key in kept.values() for f in json.loads(Path(key).read_text())["sets"].values()]
    for key in (*finished, *(str(folder / file) for file in files)):
        assert after[key] == before[key]
    assert manifest_of(folder) == manifest_of(prepared_in(tmp_path / "whole", data))
    assert not old.exists()
    assert young.exists()  # its writer may be alive


def test_lost_files_are_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARD", 4)
    folder = prepared_in(tmp_path)
    whole, before = manifest_of(folder), written(folder)
    [lost, cut] = [folder / f["file"] for f in whole["sets"]["train/attacked"]["files"]][:2]
    lost.unlink()
    os.truncate(cut, 1000)
    with pytest.raises(DataError, match="prepare it again"):
        open_prepared(folder)
    prepared_in(tmp_path)
    assert manifest_of(folder) == whole
    changed = {Path(p).relative_to(folder).parts[:2] for p, t in written(folder).items() if before[p] != t}
    assert changed == {("sets", "train"), ("shards", "train")}
    assert sum(before[p] != t for p, t in written(folder).items()) == 2 * 3  # two sets and a summary each
    assert len(open_prepared(folder).train["train/clean"].rows) == 12


def worker_processes() -> list[int]:
    """Ray's processes below this one that build shards."""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, title, rest = int(stat.parent.name), (stat.parent / "cmdline").read_bytes(), stat.read_text()
        except OSError:
            continue
        parents[pid] = int(rest.rpartition(")")[2].split()[1])
        if b"ShardBuilder" in title:
            found.append(pid)

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

    return [pid for pid in found if is_ours(pid)]


def summaries(folder: Path) -> list[Path]:
    """Of the shards that are built."""
    return list(folder.rglob("shards/**/*.json"))


def first_worker() -> int:
    """The first process of Ray that builds shards, or is about to."""
    deadline = time.monotonic() + 60
    while not (found := worker_processes()):
        assert time.monotonic() < deadline, "no worker starts"
        time.sleep(0.05)
    return found[0]


@pytest.mark.parametrize("few", [0, workers.FEW], ids=["Ray Data", "here and by actors"])
def test_workers_do_not_change_the_set_and_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], few: int
) -> None:
    monkeypatch.setattr(build, "SHARD", 12)
    monkeypatch.setattr(workers, "FEW", few)
    data = DataConfig(train_pictures=96, eval_pictures=4)
    killed: list[int] = []
    printed: list[str] = []

    def kill_one(done: int, total: int) -> None:
        if done and not killed and Path("/proc").exists():
            killed.append(first_worker())
            printed.extend(capfd.readouterr())
            os.kill(killed[0], signal.SIGKILL)
            # This process builds nothing meanwhile, so another worker does.
            before, deadline = len(summaries(tmp_path / "2")), time.monotonic() + 60
            while len(summaries(tmp_path / "2")) == before:
                assert time.monotonic() < deadline, "no worker takes its place"
                time.sleep(0.05)

    one = prepared_in(tmp_path / "1", data)
    capfd.readouterr()
    two = prepared_in(tmp_path / "2", data, workers=2, on_progress=kill_one)
    assert manifest_of(one) == manifest_of(two)  # with the digest of every file
    if Path("/proc").exists():
        assert printed == ["", ""]
    sets = [open_prepared(folder) for folder in (one, two)]
    for first, second in zip(sets[0].evaluation, sets[1].evaluation, strict=True):
        rows = range(len(first.rows))
        assert torch.equal(first.rows.inputs(rows), second.rows.inputs(rows))
        assert torch.equal(first.rows.reference, second.rows.reference)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_worker_that_always_dies_ends_the_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SHARD", 12)
    data = DataConfig(train_pictures=24, eval_pictures=4)
    killed: set[int] = set()

    def kill_all(done: int, total: int) -> None:
        deadline = time.monotonic() + 120
        while done and len(killed) < 1 + workers.RETRIES:
            assert time.monotonic() < deadline, f"{len(killed)} workers came"
            killed.add(pid := first_worker())
            with contextlib.suppress(ProcessLookupError):  # killed before, and not gone yet
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        time.sleep(bool(done))  # until Ray has noticed

    with pytest.raises(ResourceError, match=r"died 4 times.* \(2 at once\); use fewer or a larger machine"):
        prepared_in(tmp_path, data, workers=2, on_progress=kill_all)
    [folder] = tmp_path.iterdir()
    assert summaries(folder), "what this process built meanwhile is kept"
    assert not (folder / "manifest.json").exists()
    assert prepared_in(tmp_path, data) == folder


def test_gpus_that_this_machine_lacks_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(ResourceError, match=r"gpus_per_worker is 99, this machine has \d+ GPUs; lower it"):
        prepared_in(tmp_path, workers=2, gpus=99.0)


def test_a_worker_with_other_pictures_refuses(tmp_path: Path) -> None:
    recipe = Recipe(
        "typographic", TINY, ModelConfig(), Location(tmp_path), "set", "model", "other data", False
    )
    shard = {"key": "set/shards/train/0.json", "part": "train", "start": 0, "stop": 4, "known": "null"}
    error = pickle.loads(ShardBuilder(recipe)(shard)["error"])
    assert isinstance(error, DataError)
    assert "not the same on every node" in str(error)


def test_a_worker_of_another_node_has_the_same_pictures_of_torchvision(
    tmp_path: Path, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of_pictures(tmp_path / "pictures")
    bucket = f"{s3_env.bucket}/{uuid.uuid4().hex}"
    s3_env.filesystem().put(str(root), f"{bucket}/eurosat/2750", recursive=True)
    source = f"torchvision:EuroSAT:s3://{bucket}"
    data, model = DataConfig(source=source, train_pictures=20, eval_pictures=6), ModelConfig()
    summaries = []
    for node in ("first", "second"):
        monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / node))
        if node == "first":
            known = data_digest_of("typographic", data, TypographicTask(data))
        recipe = Recipe("typographic", data, model, Location(tmp_path / node), "set", "model", known, False)
        shard = {"key": "set/shards/train/0.json", "part": "train", "start": 0, "stop": 4, "known": "null"}
        built = ShardBuilder(recipe)(shard)
        assert built["error"] == b""
        summaries.append(built["summary"])
        assert len(list((tmp_path / node / "copies").glob("*/eurosat/2750/*/*.png"))) == 6 * 12
    assert summaries[0] == summaries[1], "with the digest of every file"


@pytest.mark.parametrize("trainable", ["last:2", "image", "transform"])
def test_what_is_stored_is_what_the_live_policy_takes(
    tmp_path: Path, clip: ClipModel, trainable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SHARD", 5)
    prepared = open_prepared(prepared_in(tmp_path, model=ModelConfig(trainable=trainable)))
    task, policy = TypographicTask(TINY), policy_of(clip, trainable).eval()
    part = task.parts["train"]
    rows = [r for i in range(12) for r in task.rows(part, i, clip.pixels) if r.set_name == "train/attacked"]
    pixels = torch.from_numpy(np.stack([np.asarray(r.image) for r in rows]))
    some = [7, 0, 11, 7]
    inputs, stored = prepared.train["train/attacked"].rows.inputs(some), policy.frozen(pixels)[some]
    assert inputs.dtype == stored.dtype
    with torch.no_grad():
        embedded = policy.embed(inputs)
        whole = clip.model.encode_image(clip.normalized(pixels), normalize=True)[some]
    if stored.dtype == torch.uint8:
        assert torch.equal(inputs, stored)
    else:  # in batches of another size, sums are added up in another order
        torch.testing.assert_close(inputs.float(), stored.float(), atol=1e-6, rtol=0.008)
    torch.testing.assert_close(
        embedded, prepared.train["train/attacked"].rows.reference[some], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(embedded, whole, atol=0.02, rtol=0)  # one bfloat16 rounding
    assert prepared.train["train/attacked"].rows.labels.tolist() == [r.label for r in rows]
    assert prepared.train["train/attacked"].rows.attack_labels.tolist() == [r.attack_label for r in rows]
    # What is read has the memory layout of what was stored, so that nobody has to turn it around.
    assert inputs.is_contiguous(memory_format=torch.channels_last) or trainable != "last:2"


@pytest.mark.parametrize(("trainable", "shape"), [("image", (96, 96, 3)), ("transform", (128,))])
def test_rows_of_any_order_come_from_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(build, "SHARD", 3)
    prepared = open_prepared(prepared_in(tmp_path, model=ModelConfig(trainable=trainable)))
    one_by_one = torch.cat([prepared.train["train/clean"].rows.inputs([i]) for i in range(12)])
    assert len(torch.unique(one_by_one.flatten(1), dim=0)) == 12
    order = torch.randperm(12)
    for indices in (order, order.tolist(), order.numpy()):
        assert torch.equal(prepared.train["train/clean"].rows.inputs(indices), one_by_one[order])
    assert torch.equal(prepared.train["train/clean"].rows.inputs(range(1, 11)), one_by_one[1:11])
    assert prepared.train["train/clean"].rows.inputs([]).shape == (0, *shape)
    with pytest.raises(IndexError):
        prepared.train["train/clean"].rows.inputs([12])


def test_a_task_says_how_its_sets_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Judged(TypographicTask):
        @property
        def parts(self) -> Any:  # type: ignore[override]
            parts = super().parts
            return {n: dataclasses.replace(p, pairwise=n == "test/seen") for n, p in parts.items()}

        @property
        def templates(self) -> tuple[str, ...]:  # type: ignore[override]
            return ("imagenet", *[""] * (len(self.classes) - 1))

    monkeypatch.setitem(TASKS, "judged", Judged)
    prepared = open_prepared(tmp_path / prepare("judged", TINY, ModelConfig(), Location(tmp_path)))
    assert prepared.templates[:2] == ("imagenet", "")
    first, second, *_ = prepared.templates_per_class("a bad photo of a {}")
    assert len(first) == 80
    assert second == ("a bad photo of a {}",)
    assert {e.name.split("/", 1)[0] + e.name[-5:] for e in prepared.evaluation if e.pairwise} == {"test/seen"}


def bytes_of(inputs: torch.Tensor) -> list[bytes]:
    return [one.view(torch.int16).numpy().tobytes() for one in inputs.contiguous()]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_pair_comes_once_an_epoch(small_set: PreparedSet, frozen: Frozen, world: int) -> None:
    cpu, pairs = torch.device("cpu"), Pairs.of(small_set, frozen)
    for epoch in (0, 1):
        ranks = [list(epoch_batches(pairs, 48, 0, epoch, r, world, cpu)) for r in range(world)]
        for batches in zip(*ranks, strict=True):
            assert sum(b.share for b in batches) == pytest.approx(1)
        seen = torch.cat([b.reference_chosen_logps for batches in ranks for b in batches])
        assert torch.equal(seen.sort().values, pairs.reference_chosen_P.sort().values)
        clean, attacked = zip(*(b.inputs.chunk(2) for batches in ranks for b in batches), strict=True)
        for found, rows in (
            (clean, small_set.train["train/clean"].rows),
            (attacked, small_set.train["train/attacked"].rows),
        ):
            read, stored = bytes_of(torch.cat(found)), bytes_of(rows.inputs(range(len(rows))))
            assert sorted(read) == sorted(stored)
            assert len(set(read)) == len(read) == 160


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "pictures")
    data = DataConfig(source=f"folder:{root}", train_pictures=20, eval_pictures=6)
    prepared = open_prepared(prepared_in(tmp_path / "cache", data))
    assert prepared.classes == tuple(f"class {c}" for c in range(6))
    assert len(prepared.train["train/clean"].rows) == 20
    assert {e.name for e in prepared.evaluation} >= {"validation/clean/seen", "test/nonsense/held_out"}


def damage(path: Path) -> bytes:
    """Breaks a picture in a way that its size and time do not show; returns what it was."""
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(b"this is no picture".ljust(len(whole)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return whole


def mend(path: Path, whole: bytes) -> None:
    times = path.stat()
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_broken_pictures_are_left_out_and_many_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SHARD", 32)
    root = folder_of_pictures(tmp_path / "pictures", classes=4, each=60)
    data = DataConfig(source=f"folder:{root}", train_pictures=200, eval_pictures=60)
    train = [p.key for p in TypographicTask(data).parts["train"].pictures]
    damage(root / train[0])
    folder = prepared_in(tmp_path / "one", data)
    prepared = open_prepared(folder)
    [(key, reason)] = prepared.left_out
    assert key == train[0]
    assert "no picture" in reason
    assert [e["key"] for e in manifest_of(folder)["left_out"]] == [key]
    assert (
        len(prepared.train["train/clean"].rows)
        == len(prepared.train["train/attacked"].rows)
        == len(train) - 1
    )

    broken = [root / key for key in (train[1], train[2], train[-1])]
    wholes = [damage(path) for path in broken]
    cache = tmp_path / "many"
    with pytest.raises(DataError, match=r"4 of \d+ .*max_unreadable allows 1\.0%.*left_out\.json"):
        prepared_in(cache, data)
    [listed] = cache.rglob("left_out.json")
    assert {e["key"] for e in json.loads(listed.read_text())} == {train[0], train[1], train[2], train[-1]}
    before = written(listed.parent)

    # Readable again, as after a network was down: only the shards that lacked a picture are built again.
    for path, whole in zip(broken, wholes, strict=True):
        mend(path, whole)
    folder = prepared_in(cache, data)
    assert [e["key"] for e in manifest_of(folder)["left_out"]] == [train[0]]
    rebuilt = {p for p, t in written(folder).items() if t != before.get(p)}
    starts = {Path(p).name[:7] for p in rebuilt}
    assert starts == {"0000000", f"{(len(train) - 1) // 32 * 32:07d}"}
    assert all("/train/" in p for p in rebuilt)


def test_more_broken_pictures_can_be_allowed_without_building_again(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "pictures")
    data = DataConfig(source=f"folder:{root}", train_pictures=20, eval_pictures=6)
    damage(root / TypographicTask(data).parts["train"].pictures[3].key)
    with pytest.raises(DataError, match="max_unreadable"):
        prepared_in(tmp_path / "cache", data)
    [folder] = (tmp_path / "cache").iterdir()
    before = written(folder)
    assert prepared_in(tmp_path / "cache", dataclasses.replace(data, max_unreadable=0.2)) == folder
    assert written(folder) == before
    assert len(open_prepared(folder).train["train/clean"].rows) == 19
    with pytest.raises(DataError, match="max_unreadable"):  # also when the set is there already
        prepared_in(tmp_path / "cache", data)


def test_a_part_without_a_readable_picture_is_refused(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "pictures")
    data = DataConfig(source=f"folder:{root}", train_pictures=20, eval_pictures=6, max_unreadable=0.9)
    for picture in TypographicTask(data).parts["test/held_out"].pictures:
        damage(root / picture.key)
    with pytest.raises(DataError, match="none of the 6 pictures for test/clean/held_out"):
        prepared_in(tmp_path / "cache", data)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [("folder:/nowhere", "no such folder"), ("imagenet", "demo, folder"), ("demo:x", "no argument")],
)
def test_a_source_that_cannot_be_used(source: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ClippoError, match=complaint):
        prepared_in(tmp_path, DataConfig(source=source))


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((300, 200), 90).save(file, "JPEG")
    return file.getvalue()


PEAK = """
import dataclasses, resource, sys
from pathlib import Path
from clippo.config import DataConfig, ModelConfig
from clippo.prepared import Location, open_prepared, prepare
location, broken = Location(Path(sys.argv[1])), DataConfig(source=sys.argv[2])
# One size of the letters, since fonts that were loaded are kept.
few = DataConfig(train_pictures=60, attacked_copies=4, eval_pictures=2, font_size=(0.15, 0.15))
others, many = dataclasses.replace(few, split_seed=1), dataclasses.replace(few, train_pictures=480)
for data in (few, others, many, broken):  # with the first, all that is loaded once is loaded
    name = prepare("typographic", data, ModelConfig(trainable="image"), location)
    prepared = open_prepared(location.cache / name)
    clean, attacked = (len(prepared.train[f"train/{kind}"].rows) for kind in ("clean", "attacked"))
    assert attacked == data.attacked_copies * clean
    print(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_grows_neither_with_the_pictures_nor_with_what_is_broken(tmp_path: Path) -> None:
    source = f"folder:{folder_of_pictures(tmp_path / 'pictures', classes=4, each=150)}"
    parts = TypographicTask(DataConfig(source=source)).parts
    broken = {
        parts[name].pictures[5].key: data
        for name, data in {
            "train": jpeg()[:-3000],  # cut off
            "validation/seen": b"",
            "test/seen": b"no picture, whatever it is called\n" * 100,
            "test/held_out": bomb(),  # some kilobytes that unfold to 30,000 x 30,000 pixels
        }.items()
    }
    for key, data in broken.items():
        (tmp_path / "pictures" / key).write_bytes(data)

    cache = tmp_path / "cache"
    command = [sys.executable, "-c", PEAK, str(cache), source]
    # Through a shell: on Linux a process's peak begins with the memory of the process that has forked it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    # Large blocks go back to the system at once; by default glibc keeps more and more of them, by chance.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    output = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=120, env=environment
    ).stdout
    names, peaks = zip(*(line.split() for line in output.splitlines()), strict=True)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    _, few, many, with_broken = (int(peak) * unit for peak in peaks)
    assert many - few < (480 - 60) * 5 * 96 * 96 * 3 / 2, "half of the pixels"
    assert with_broken - many < 100e6, "a ninth of the bomb"

    manifest = manifest_of(cache / names[-1])
    reasons = {entry["key"]: entry["reason"] for entry in manifest["left_out"]}
    assert reasons.keys() == broken.keys()
    assert 0.9 < len(broken) / (0.01 * manifest["pictures"]) <= 1, "one in a hundred, which is still allowed"
    words = ("truncated", "empty", "no picture", "100,000,000 pixels")
    assert all(word in reason for word, reason in zip(words, reasons.values(), strict=True)), reasons
    prepared = open_prepared(cache / names[-1])
    rows = {"train/clean": prepared.train["train/clean"].rows} | {e.name: e.rows for e in prepared.evaluation}
    for name, part in parts.items():
        one_less = len(part.pictures) - (name != "validation/held_out")
        assert {len(rows[s]) for s in part.sets if s in rows} == {one_less}, name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.soak
def test_memory_of_the_workers_does_not_grow_with_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SHARD", 64)
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "1000000")  # as above; Ray's processes inherit it
    source = f"folder:{folder_of_pictures(tmp_path / 'pictures', classes=4, each=900)}"
    data = DataConfig(
        source=source, train_pictures=1024, attacked_copies=4, eval_pictures=2, font_size=(0.15, 0.15)
    )
    early: dict[int, int] = {}
    last: dict[int, int] = {}
    pictures: dict[str, int] = {}

    def look(done: int, total: int) -> None:
        peaks = {pid: peak for pid in worker_processes() if (peak := peak_of(pid))}
        last.update(peaks)
        if done <= 256:  # by then each has built one shard at least
            early.update(peaks)
            pictures["early"] = done
        pictures["last"] = done

    prepared_in(tmp_path / "cache", data, ModelConfig(trainable="image"), workers=2, on_progress=look)
    assert len(early) == 2
    assert early.keys() == last.keys(), "no worker was replaced"
    pixels = (pictures["last"] - pictures["early"]) * 5 * 96 * 96 * 3
    assert pixels > 80e6
    assert sum(last.values()) - sum(early.values()) < pixels / 2, "half of the pixels"


def peak_of(pid: int) -> int:
    """The most memory that a process has held [bytes], 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)  # a process that just ended has none
    return 1024 * int(found[1]) if found else 0
