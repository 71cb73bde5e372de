"""Prepared sets on object storage: built there, and fetched once by every node."""

import json
import os
import pickle
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from clippo.config import DataConfig, ModelConfig
from clippo.errors import DataError, StoreError
from clippo.model import ClipModel
from clippo.prepared import Location, build, fetch, open_prepared, prepare, text_features
from clippo.results import ResultStore
from clippo.sweep.preparing import location_of
from tests.conftest import S3Server, free_ports

TINY = DataConfig(train_pictures=12, eval_pictures=4)


@pytest.fixture
def shared(s3_env: S3Server) -> str:
    """An empty place on a real S3 server."""
    return f"s3://{s3_env.bucket}/{uuid.uuid4().hex}/prepared"


def objects(server: S3Server, url: str) -> dict[str, int]:
    found = server.filesystem().find(url, detail=True)
    return {path.removeprefix(url.removeprefix("s3://")): info["size"] for path, info in found.items()}


def files(folder: Path) -> dict[str, int]:
    """The inodes of all files: one that is written again has another."""
    return {str(p.relative_to(folder)): p.stat().st_ino for p in folder.rglob("*") if p.is_file()}


FETCHING = """
import json, sys
from pathlib import Path
from clippo.prepared import Location, fetch, open_prepared
location = Location(Path(sys.argv[1]), sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
folder = fetch(sys.argv[3], location)
found = {str(p.relative_to(folder)): p.stat().st_ino for p in folder.rglob("*") if p.is_file()}
assert len(open_prepared(folder).train["train/clean"].rows) == 12
print(json.dumps(found))
"""


def test_two_processes_of_a_node_fetch_a_set_once(
    shared: str, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SHARD", 2)
    built = Location(tmp_path / "builder", shared)
    digest = prepare("typographic", TINY, ModelConfig(), built)
    before = files(built.cache / digest)
    assert fetch(digest, built) == built.cache / digest  # what was built here is not fetched
    assert files(built.cache / digest) == before

    node = Location(tmp_path / "node", shared)
    command = [sys.executable, "-c", FETCHING, str(node.cache), shared, digest]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        mine = files(fetch(digest, node))
        theirs = json.loads(process.stdout.readline())
    assert process.returncode == 0
    assert mine == theirs  # whoever came second found the files of the first
    assert {name for name in mine if name.endswith(".arrow")} == {n for n in before if n.endswith(".arrow")}
    first, second = open_prepared(built.cache / digest), open_prepared(tmp_path / "node" / digest)
    assert torch.equal(
        first.train["train/attacked"].rows.inputs(range(12)),
        second.train["train/attacked"].rows.inputs(range(12)),
    )


def test_a_set_is_built_once_for_all_nodes_and_resumed_by_any(
    shared: str, s3_env: S3Server, tmp_path: Path
) -> None:
    one, two = (Location(tmp_path / name, shared) for name in ("one", "two"))
    digest = prepare("typographic", TINY, ModelConfig(), one)
    before = objects(s3_env, shared)
    assert {f"/{digest}/{name}" for name in files(one.cache / digest)} == before.keys()
    assert prepare("typographic", TINY, ModelConfig(), two) == digest
    assert not two.cache.exists()  # nothing was built
    assert objects(s3_env, shared) == before

    [lost] = [key for key in before if "/sets/test/clean/seen/" in key]
    s3_env.filesystem().rm_file(shared + lost)
    s3_env.filesystem().rm_file(f"{shared}/{digest}/manifest.json")
    assert prepare("typographic", TINY, ModelConfig(), two) == digest
    assert objects(s3_env, shared) == before
    assert len(list((two.cache / digest).rglob("shards/**/*.json"))) == 1


def test_damaged_files_are_fetched_again_but_not_for_ever(
    shared: str, s3_env: S3Server, tmp_path: Path
) -> None:
    digest = prepare("typographic", TINY, ModelConfig(), Location(tmp_path / "builder", shared))
    node = Location(tmp_path / "node", shared)
    folder = fetch(digest, node)
    whole = files(folder)
    kept, cut, wrong, *_ = sorted(p for p in folder.rglob("*.arrow"))
    content = wrong.read_bytes()
    (folder / "manifest.json").unlink()  # as if the fetch had been interrupted
    os.truncate(cut, 1000)
    wrong.write_bytes(bytes(len(content)))
    fetch(digest, node)
    assert wrong.read_bytes() == content
    changed = {name for name, inode in files(folder).items() if whole[name] != inode}
    assert changed - {"manifest.json"} == {str(p.relative_to(folder)) for p in (cut, wrong)}

    os.truncate(kept, 1000)  # a disk that was full, found by the next process
    fetch(digest, node)
    assert len(open_prepared(folder).train["train/clean"].rows) == 12

    key = f"{shared}/{digest}/{wrong.relative_to(folder)}"
    s3_env.filesystem().pipe_file(key, bytes(len(content)))
    with pytest.raises(DataError, match="not what its manifest says, twice"):
        fetch(digest, Location(tmp_path / "another node", shared))


def test_a_set_that_is_nowhere(shared: str, tmp_path: Path) -> None:
    for location in (Location(tmp_path), Location(tmp_path, shared)):
        with pytest.raises(DataError, match="prepare it again"):
            fetch("0123456789abcdef", location)


def test_each_node_keeps_a_set_where_it_says_itself(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "driver"))
    location = location_of(ResultStore(shared.removesuffix("/prepared")))
    digest = prepare("typographic", TINY, ModelConfig(), location)
    assert open_prepared(tmp_path / "driver" / "prepared" / digest).digest == digest

    shipped = pickle.loads(pickle.dumps(location))  # to a node with other disks
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "node"))
    assert fetch(digest, shipped) == tmp_path / "node" / "prepared" / digest
    monkeypatch.delenv("CLIPPO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch(digest, shipped) == tmp_path / "home" / ".cache" / "clippo" / "prepared" / digest


def test_a_server_that_is_away_is_one_line(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    began = time.monotonic()
    with pytest.raises(
        StoreError, match=rf"^cannot read {shared}: no connection to [^\n]*; check AWS_ENDPOINT_URL[^\n]*$"
    ) as error:
        prepare("typographic", TINY, ModelConfig(), Location(tmp_path, shared))
    assert error.value.__cause__ is None
    assert time.monotonic() - began < 20


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"^cannot [^\n]*file/cache[^\n]*$"):
        prepare("typographic", TINY, ModelConfig(), Location(tmp_path / "file" / "cache"))


# --- text features ----------------------------------------------------------------------------------------

CLASSES = ("cat", "dog", "bus")
ONE = [("a photo of a {}",)] * 3


def test_a_changed_prompt_adds_one_file_and_touches_no_shard(clip: ClipModel, tmp_path: Path) -> None:
    location = Location(tmp_path)
    prepare("typographic", TINY, ModelConfig(), location)
    before = files(tmp_path)
    first = text_features(clip, CLASSES, ONE, location)
    torch.testing.assert_close(first, clip.text_features([f"a photo of a {c}" for c in CLASSES]))
    once = files(tmp_path)
    added = {name for name in once.keys() - before.keys() if not name.endswith(".lock")}
    assert len(added) == 1
    assert torch.equal(text_features(clip, CLASSES, ONE, location), first)
    prepare("typographic", TINY, ModelConfig(prompt="a {}"), location)
    second = text_features(clip, CLASSES, [("a {}",)] * 3, location)
    assert not torch.allclose(first, second, atol=0.01)
    twice = files(tmp_path)
    assert {name: twice[name] for name in once} == once
    assert len([name for name in twice if name.endswith(".safetensors")]) == 2


def test_templates_of_a_class_are_averaged(clip: ClipModel, tmp_path: Path) -> None:
    templates = [("a photo of a {}", "a {}", "two of {}"), ("{}",), ("a {}", "the {}")]
    found = text_features(clip, CLASSES, templates, Location(tmp_path))
    for name, own, feature in zip(CLASSES, templates, found, strict=True):
        mean = clip.text_features([t.format(name) for t in own]).mean(0)
        torch.testing.assert_close(feature, mean / mean.norm())


def test_many_prompts_are_embedded_in_batches(clip: ClipModel, tmp_path: Path) -> None:
    names = [f"thing {i}" for i in range(700)]
    templates = [("a {}", "the {}")] * len(names)
    found = text_features(clip, names, templates, Location(tmp_path))
    for i in (0, 255, 256, 257, 699):  # on both sides of a batch's end
        mean = clip.text_features([f"a {names[i]}", f"the {names[i]}"]).mean(0)
        torch.testing.assert_close(found[i], mean / mean.norm())


def test_text_features_of_another_node_are_not_computed_again(
    clip: ClipModel, shared: str, s3_env: S3Server, tmp_path: Path
) -> None:
    first = text_features(clip, CLASSES, ONE, Location(tmp_path / "one", shared))
    [key] = objects(s3_env, shared)
    marked = save({"text_features": first + 1})
    s3_env.filesystem().pipe_file(shared + key, marked)
    assert torch.equal(text_features(clip, CLASSES, ONE, Location(tmp_path / "two", shared)), first + 1)
    assert torch.equal(text_features(clip, CLASSES, ONE, Location(tmp_path / "one", shared)), first)
