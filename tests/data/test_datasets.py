"""Sources of labelled pictures: every format, on local disk and on a real S3 server."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clippo.data import local_copy as local_copy_module
from clippo.data.datasets import SPLITS, ImageSource, LabelledImage, open_source
from clippo.errors import ClippoError, ConfigError, DataError
from tests.conftest import S3Server

PETS = ("cat", "dog", "guinea_pig", "hare", "otter")
EVERYTHING = 10**6
GOLDEN = [1, 0, 2, 2, 2, 1, 0, 1, 0, 0]  # splits of the first ten cats


def png(colour: int, side: int = 8) -> bytes:
    """A small picture of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (colour % 256, colour // 256 % 256, 77)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(
    classes: tuple[str, ...] = PETS, each: int = 12, above: str = "", name: str = "{:02d}.png"
) -> dict[str, bytes]:
    """Files of a folder per class, no two pictures the same."""
    start = sum(map(ord, above)) * 100
    return {
        f"{above}{label}/{name.format(i)}": png(start + 100 * c + i)
        for c, label in enumerate(classes)
        for i in range(each)
    }


def tar(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def shard(first: int, each: int = 10, label: Callable[[int], tuple[str, bytes]] | None = None) -> bytes:
    """A shard of ``each`` pictures of every pet; ``label`` gives suffix and content of the label's file."""
    label = label or (lambda c: ("cls", PETS[c].encode()))
    members = {}
    for i in range(first, first + each * len(PETS)):
        suffix, content = label(i % len(PETS))
        members |= {f"{i:04d}.png": png(i), f"{i:04d}.{suffix}": content}
    return tar(members)


def parquet(
    columns: Mapping[str, object], metadata: Mapping[str, str] | None = None, **options: int
) -> bytes:
    buffer = io.BytesIO()
    table = pa.table(dict(columns))
    pq.write_table(table.replace_schema_metadata(metadata or {}), buffer, **options)
    return buffer.getvalue()


class Place(NamedTuple):
    """An empty place for files; ``uri`` is what a user would say."""

    uri: str
    write: Callable[[str, bytes], object]

    def fill(self, files: Mapping[str, bytes]) -> str:
        for name, content in files.items():
            self.write(name, content)
        return self.uri


def local(root: Path) -> Place:
    def write(name: str, content: bytes) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return Place(str(root), write)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def disk(tmp_path: Path) -> Place:
    return local(tmp_path / "pictures")


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Place:
    server = request.getfixturevalue("s3_env")
    fs, root = server.filesystem(), f"{server.bucket}/{uuid.uuid4().hex}"
    return Place(f"s3://{root}", lambda name, content: fs.pipe_file(f"{root}/{name}", content))


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


def every(source: ImageSource, split: str) -> list[LabelledImage]:
    try:
        return source.pictures(split, range(len(source.classes)), EVERYTHING)
    except DataError:
        return []


def splits(source: ImageSource) -> dict[str, str]:
    """The split of each picture; every picture is in exactly one."""
    found = [(p.key, split) for split in SPLITS for p in every(source, split)]
    assert len(dict(found)) == len(found)
    assert {p.key for p in every(source, "all")} == dict(found).keys()
    return dict(found)


def contents(source: ImageSource) -> dict[str, tuple[str, int, int]]:
    """Class and two channels of the one colour of each picture."""
    found = {}
    for picture in every(source, "all"):
        image = picture.load()
        assert image.mode == "RGB"
        red, green, _ = image.getpixel((3, 3))
        found[picture.key] = (source.classes[picture.label], red, green)
    return found


def colour(data: bytes) -> tuple[int, int]:
    red, green, _ = Image.open(io.BytesIO(data)).getpixel((3, 3))
    return red, green


# ---- splits


def test_a_split_is_a_hash_of_the_key_alone(disk: Place) -> None:
    source = open_source(f"folder:{disk.fill(folder(each=40))}", seed=0)
    assert not source.has_splits
    found = splits(source)
    for key, split in found.items():
        share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
        assert split == ("train" if share < 0.6 else "validation" if share < 0.8 else "test")
    assert splits(open_source(f"folder:{disk.uri}", seed=1)) == found
    # Written down: another hash would move pictures that were for testing into tuning.
    assert [SPLITS.index(found[f"cat/{i:02d}.png"]) for i in range(10)] == GOLDEN


@settings(max_examples=20)
@given(
    before=st.sets(st.integers(0, 999), min_size=8, max_size=30),
    added=st.sets(st.integers(0, 999), max_size=30),
    above=st.sampled_from(["", "train/"]),
)
def test_other_pictures_do_not_move_a_picture(
    tmp_path_factory: pytest.TempPathFactory, before: set[int], added: set[int], above: str
) -> None:
    place = local(tmp_path_factory.mktemp("pictures"))
    if above:
        place.fill({f"test/{name}/a.png": b"" for name in PETS})
    place.fill({f"{above}{PETS[i % 4]}/{i}.png": b"" for i in [*before, 0, 1, 2, 3]})
    first = splits(open_source(f"folder:{place.uri}", seed=0))
    place.fill({f"{above}{PETS[i % 5]}/{i}.png": b"" for i in added})
    second = splits(open_source(f"folder:{place.uri}", seed=0))
    assert first.items() <= second.items()
    assert not above or {key: s for key, s in second.items() if s == "test"} == {
        f"test/{name}/a.png": "test" for name in PETS
    }


@pytest.mark.parametrize(
    ("given", "has_splits", "moved"),
    [
        (("train", "validation", "test"), True, {}),
        (("train", "val", "test"), True, {"val": {"validation"}}),
        (
            ("Train", "Val", "TEST"),
            True,
            {"Train": {"train"}, "Val": {"validation"}, "TEST": {"test"}},
        ),
        (("train", "test"), True, {"train": {"train", "validation"}}),
        (("train", "val"), True, {"train": {"train", "validation"}, "val": {"test"}}),
        (("train",), False, {"train": {"train", "validation", "test"}}),
        (("test",), True, {}),
    ],
)
def test_splits_that_are_missing_are_taken_from_train(
    disk: Place, given: tuple[str, ...], has_splits: bool, moved: dict[str, set[str]]
) -> None:
    for name in given:
        disk.fill(folder(each=20, above=f"{name}/"))
    source = open_source(f"folder:{disk.uri}", seed=0)
    assert source.has_splits == has_splits
    found: dict[str, set[str]] = {}
    for key, split in splits(source).items():
        found.setdefault(key.split("/")[0], set()).add(split)
    assert found == {name: moved.get(name, {name}) for name in given}


def test_a_split_without_pictures_is_missed_when_it_is_asked_for(disk: Place) -> None:
    source = open_source(f"folder:{disk.fill(folder(above='test/'))}", seed=0)
    assert len(every(source, "test")) == 60
    with pytest.raises(DataError, match="no train pictures"):
        source.pictures("train", (0, 1), 4)


def test_other_folders_beside_all_three_splits_are_none(disk: Place) -> None:
    for above in ("train/", "val/", "test/", "thumbnails/"):
        disk.fill(folder(above=above))
    found = splits(open_source(f"folder:{disk.uri}", seed=0))
    assert {key.split("/")[0] for key in found} == {"train", "val", "test"}


def test_classes_called_train_are_no_split(disk: Place) -> None:
    source = open_source(f"folder:{disk.fill(folder(classes=('bus', 'car', 'plane', 'train')))}", seed=0)
    assert source.classes == ("bus", "car", "plane", "train")


def test_the_bundled_pictures_have_splits_and_names() -> None:
    source = open_source("demo", seed=0)
    assert source.has_splits
    keys = [p.key for p in source.pictures("all", range(10), 20)]
    assert len(set(keys)) == 20
    assert {key.split("/")[0] for key in keys} == set(SPLITS)
    with pytest.raises(ConfigError, match="leave it empty"):
        open_source("demo", seed=0, class_names="imagenet")


# ---- what all formats share


def test_pictures_are_spread_over_the_classes_and_the_same_in_every_process(disk: Place) -> None:
    spec = f"folder:{disk.fill(folder(each=30))}"
    source = open_source(spec, seed=3)
    chosen = source.pictures("train", (1, 3, 4), 30)
    assert [p.label for p in chosen] == [1, 3, 4] * 10
    assert [p.key for p in source.pictures("train", (1, 3, 4), 12)] == [p.key for p in chosen[:12]]
    assert {p.key for p in open_source(spec, seed=4).pictures("train", (1, 3, 4), 30)} != {
        p.key for p in chosen
    }
    code = f"""
from clippo.data.datasets import open_source
source = open_source({spec!r}, seed=3)
print(*[p.key for p in source.pictures("train", (1, 3, 4), 30)], source.fingerprint)
"""
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [*(p.key for p in chosen), source.fingerprint], run.stderr


def test_a_store_gives_what_the_disk_gives(disk: Place, bucket: Place) -> None:
    files = folder() | {"notes.txt": b"", "cat/.hidden.png": b"", ".git/a/b.png": b"", "cat/deep/er.png": b""}
    here, there = (open_source(f"folder:{place.fill(files)}", seed=2) for place in (disk, bucket))
    assert here.classes == there.classes == ("cat", "dog", "guinea pig", "hare", "otter")
    assert splits(here) == splits(there)
    for split in (*SPLITS, "all"):
        assert [p.key for p in every(here, split)] == [p.key for p in every(there, split)]
    assert contents(here) == contents(there)
    assert {key: c[1:] for key, c in contents(here).items()} == {k: colour(v) for k, v in folder().items()}


def test_the_fingerprint_follows_the_pictures_and_the_names(place: Place, tmp_path: Path) -> None:
    spec = f"folder:{place.fill(folder())}"
    names = tmp_path / "names.json"
    names.write_text(json.dumps({pet: f"a {pet}" for pet in PETS}))
    found = [open_source(spec, 0).fingerprint, open_source(spec, 0, str(names)).fingerprint]
    assert open_source(spec, 0).fingerprint == found[0]
    names.write_text(json.dumps({pet: f"the {pet}" for pet in PETS}))
    found.append(open_source(spec, 0, str(names)).fingerprint)
    place.write("cat/00.png", png(9999))
    found.append(open_source(spec, 0).fingerprint)
    place.write("cat/99.png", png(1))
    found.append(open_source(spec, 0).fingerprint)
    assert len(set(found)) == 5


def test_broken_files_are_listed_and_refused_one_by_one(place: Place) -> None:
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(jpeg, "JPEG")
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x75\x30\0\0\x75\x30\x08\0\0\0\0\x3e\x0d\x4a\xb2\0\0\0\0IDAT"
    broken = {
        "cat/cut.jpg": jpeg.getvalue()[:300],
        "dog/empty.png": b"",
        "hare/text.png": b"no picture at all",
        "otter/bomb.png": header,
    }
    source = open_source(f"folder:{place.fill(folder() | broken)}", seed=0)
    refused = {}
    for picture in every(source, "all"):
        try:
            picture.load()
        except DataError as error:
            refused[picture.key] = str(error)
    assert refused.keys() == broken.keys()
    assert all("\n" not in reason for reason in refused.values())


def test_a_picture_that_has_gone_is_unreadable(disk: Place) -> None:
    source = open_source(f"folder:{disk.fill(folder())}", seed=0)
    picture = every(source, "all")[0]
    (Path(disk.uri) / picture.key).unlink()
    with pytest.raises(DataError, match="does not exist"):
        picture.load()


def test_linked_folders_are_followed(disk: Place, tmp_path: Path) -> None:
    local(tmp_path / "elsewhere").fill(folder())
    for pet in PETS:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / pet).symlink_to(tmp_path / "elsewhere" / pet)
    (tmp_path / "pictures" / "cat" / "round").symlink_to(tmp_path / "pictures")  # and round and round
    assert len(every(open_source(f"folder:{disk.uri}", seed=0), "all")) == 60


# ---- tables

ROWS = [(f"images/{i:03d}.png", PETS[i % 5], i) for i in range(60)]
IMAGES = {path: png(i) for path, _, i in ROWS}
OF_ROWS = {path: (pet.replace("_", " "), *colour(png(i))) for path, pet, i in ROWS}


def csv_table(rows: list[tuple[str, str, int]] = ROWS) -> bytes:
    return ("path,label\n" + "".join(f"{path},{pet}\n" for path, pet, _ in rows)).encode()


def test_csv_with_paths(place: Place, bucket: Place, disk: Place) -> None:
    spec = f"table:{place.fill({**IMAGES, 'all.csv': csv_table()})}/all.csv"
    source = open_source(spec, seed=0)
    assert contents(source) == OF_ROWS
    assert not source.has_splits
    disk.fill({**IMAGES, "elsewhere.csv": csv_table([(f"{place.uri}/{p}", pet, i) for p, pet, i in ROWS])})
    absolute = contents(open_source(f"table:{disk.uri}/elsewhere.csv", seed=0))
    assert absolute == {f"{place.uri}/{path}": row for path, row in OF_ROWS.items()}


def test_the_order_of_rows_changes_nothing(disk: Place) -> None:
    chosen = []
    for name, rows in (("a.csv", ROWS), ("b.csv", ROWS[::-1])):
        disk.write(name, csv_table(rows))
        source = open_source(f"table:{disk.uri}/{name}", seed=0)
        chosen.append([p.key for p in source.pictures("train", (0, 2), 8)])
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 8


def test_parquet_with_paths_and_splits(place: Place) -> None:
    paths, pets, _ = zip(*ROWS, strict=True)
    names = ["train", "Val", "test", None]
    table = {"path": paths, "label": pets, "split": [names[i % 4] for i in range(60)]}
    source = open_source(f"table:{place.fill({**IMAGES, 'a.parquet': parquet(table)})}/a.parquet", seed=0)
    assert contents(source) == OF_ROWS
    assert source.has_splits
    found = splits(source)
    for i, path in enumerate(paths):
        expected = {0: "train", 1: "validation", 2: "test"}.get(i % 4)
        assert expected in (found[path], None)
    assert {found[path] for path in paths[3::4]} == set(SPLITS)


def test_parquet_with_bytes_as_hugging_face_writes_it(place: Place) -> None:
    features = {"label": {"names": list(PETS), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}

    def part(start: int) -> bytes:
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(start, start + 40)]
        images[0] = {"bytes": None, "path": "../loose.png"}
        labels = [i % 5 for i in range(start, start + 40)]
        return parquet({"image": images, "label": labels}, metadata, row_group_size=25)

    place.fill({f"data/train-0000{i}-of-00002.parquet": part(i * 40) for i in (0, 1)})
    place.fill({"data/test-00000-of-00001.parquet": part(80), "loose.png": png(4242), "README.md": b""})
    source = open_source(f"table:{place.uri}", seed=0)
    assert source.classes == ("cat", "dog", "guinea pig", "hare", "otter")
    assert source.has_splits
    files = [*["data/train-00000-of-00002.parquet"] * 40, *["data/train-00001-of-00002.parquet"] * 40]
    files += ["data/test-00000-of-00001.parquet"] * 40
    expected = {
        f"{file}/{i % 40}": (source.classes[i % 5], *colour(png(i if i % 40 else 4242)))
        for i, file in enumerate(files)
    }
    assert contents(source) == expected
    assert {key for key, split in splits(source).items() if split == "test"} == set(list(expected)[80:])
    # In any order, too.
    pictures = {p.key: p for p in every(source, "all")}
    for key in ("data/train-00001-of-00002.parquet/39", *list(expected)[::-7]):
        red, green, _ = pictures[key].load().getpixel((3, 3))
        assert (red, green) == expected[key][1:]


def test_a_row_group_is_never_held_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def noise() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (600, 600, 3), dtype=np.uint8)).save(
            buffer, "PNG", compress_level=0
        )
        return buffer.getvalue()

    kinds = [noise() for _ in range(4)]
    table = {"image": [kinds[i % 4] for i in range(120)], "label": [PETS[i % 4] for i in range(120)]}
    path = tmp_path / "one-group.parquet"
    path.write_bytes(parquet(table, use_dictionary=False, write_batch_size=8))
    assert pq.ParquetFile(path).num_row_groups == 1
    assert path.stat().st_size > 120_000_000
    code = f"""
import resource
from clippo.data.datasets import open_source
from clippo.data.decode import decoded
source = open_source("table:{path}", seed=0)
pictures = source.pictures("all", range(4), 120)
decoded({png(1, side=600)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for picture in pictures:
    picture.load()
print(len(pictures), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    # Through a shell: on Linux a process's peak begins with the memory of the process that has forked it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, growth = map(int, run.stdout.split())
    assert count == 120
    assert growth * (1 if sys.platform == "darwin" else 1024) < 120_000_000


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"file,class\na.png,cat\n", "no column label; its columns are: file, class"),
        (b"label,image\ncat,a.png\n", "no column path; its columns are: label, image"),
        (b"path,label\na.png,cat\nb.png,\n", "row 1 of .* has no label"),
        (b"path,label\na.png,cat\n,dog\n", "row 1 of .* has no path"),
        (b"path,label\na.png,-1\n", "row 0 of .* has no label"),
        (b"path,label,split\na.png,cat,holdout\n", "split 'holdout'; known are train"),
        (b"path,label\na.png,cat\n./a.png,dog\nb.png,c\nd.png,d\n", "has a.png twice"),
        (b"path,label\n\xff\xfe\n", "damaged"),
        (b"path,label\n", "0 classes; at least 4 are needed, in a CSV file or Parquet"),
    ],
)
def test_tables_that_cannot_be_used(disk: Place, content: bytes, complaint: str) -> None:
    disk.write("all.csv", content)
    with pytest.raises(DataError, match=complaint) as caught:
        open_source(f"table:{disk.uri}/all.csv", seed=0)
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file(disk: Place) -> None:
    disk.write("all.parquet", parquet({"path": ["a"], "label": ["b"]})[:-20])
    with pytest.raises(DataError, match=r"all.parquet is damaged"):
        open_source(f"table:{disk.uri}", seed=0)
    disk.write("all.parquet", parquet({"bytes": [b"a"], "label": ["b"]}))
    with pytest.raises(DataError, match="no column image or path; its columns are: bytes, label"):
        open_source(f"table:{disk.uri}", seed=0)


# ---- WebDataset


def of_shards(*names: str, each: int = 50) -> dict[str, tuple[str, int, int]]:
    pets = [pet.replace("_", " ") for pet in PETS]
    return {
        f"{name}/{i:04d}": (pets[i % 5], *colour(png(i)))
        for n, name in enumerate(names)
        for i in range(n * each, (n + 1) * each)
    }


def test_webdataset_with_names_of_classes(place: Place) -> None:
    place.fill({f"pets-{n:03d}.tar": shard(50 * n) for n in range(3)})
    source = open_source(f"webdataset:{place.uri}", seed=0)
    assert contents(source) == of_shards("pets-000.tar", "pets-001.tar", "pets-002.tar")
    assert not source.has_splits
    two = open_source(f"webdataset:{place.uri}/pets-{{000..001}}.tar", seed=0)
    assert contents(two) == of_shards("pets-000.tar", "pets-001.tar")
    assert splits(two).items() <= splits(source).items()
    one = open_source(f"webdataset:{place.uri}/pets-000.tar", seed=0)
    assert contents(one) == of_shards("pets-000.tar")
    with pytest.raises(ConfigError, match=r"2 of the 5 shards .* do not exist, as pets-003.tar"):
        open_source(f"webdataset:{place.uri}/pets-{{000..004}}.tar", seed=0)


@pytest.mark.parametrize(
    "label",
    [
        lambda c: ("cls", f"{c}\n".encode()),
        lambda c: ("json", json.dumps({"label": c, "url": "https://example.org"}).encode()),
        lambda c: ("JSON", json.dumps({"label": PETS[c]}).encode()),
    ],
    ids=["index", "index in JSON", "name in JSON"],
)
def test_webdataset_as_published_with_splits(place: Place, label: Callable[[int], tuple[str, bytes]]) -> None:
    names = "".join(f"{pet.replace('_', ' ')}\n" for pet in PETS).encode()
    place.fill({"train/0.tar": shard(0, label=label), "test/0.tar": shard(50, label=label)})
    place.fill({"classnames.txt": names, "train/nshards.txt": b"1\n"})
    source = open_source(f"webdataset:{place.uri}", seed=0)
    assert contents(source) == of_shards("train/0.tar", "test/0.tar")
    assert source.has_splits
    assert {split for key, split in splits(source).items() if key.startswith("test/")} == {"test"}


def test_members_in_folders_with_dots_and_other_things(disk: Place) -> None:
    members = {}
    for i, pet in enumerate(PETS * 2):
        members |= {
            f"./a.b/{i}.seg.PNG": png(i),
            f"./a.b/{i}.cls": pet.encode(),
            f"./a.b/{i}.json": b'{"caption": "x"}',
            f"./a.b/._{i}.png": b"what a Mac leaves",
            f"./{'long' * 40}/{i}.txt": b"text",
        }
    disk.write("x.tar", tar(members))
    found = contents(open_source(f"webdataset:{disk.uri}", seed=0))
    assert found.keys() == {f"x.tar/./a.b/{i}" for i in range(10)}
    assert found["x.tar/./a.b/7"] == ("guinea pig", *colour(png(7)))


def test_a_shard_is_gone_through_once(disk: Place, cache: Path) -> None:
    disk.write("a.tar", shard(0))
    path = Path(disk.uri) / "a.tar"
    first = contents(open_source(f"webdataset:{path}", seed=0))
    times = path.stat()
    path.write_bytes(bytes(times.st_size))  # no tar any more, but it looks the same
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_source(f"webdataset:{path}", seed=0).classes == ("cat", "dog", "guinea pig", "hare", "otter")
    path.write_bytes(shard(50))
    second = contents(open_source(f"webdataset:{path}", seed=0))
    assert len(first) == len(second) == 50
    assert first.keys().isdisjoint(second)
    for kept in (cache / "shards").iterdir():
        kept.write_text("{")
    assert contents(open_source(f"webdataset:{path}", seed=0)) == second


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (shard(0)[:3000], "damaged"),
        (b"no tar at all" * 100, "damaged"),
        (tar({"1.png": b"", "1.cls": b"\xff\xff"}), "damaged"),
        (tar({"1.png": b"", "1.json": b"{"}), "damaged"),
        (tar({"1.png": b"", "1.cls": b"cat", "2.png": b"", "3.png": b""}), r"2 of 3 .* have no label, as 2;"),
        (tar({"1.txt": b"", "1.cls": b"cat"}), r"0 classes; .* in .tar files"),
        (shard(0, label=lambda c: ("cls", str(c).encode())), "classes are numbers as 0, .* give a file"),
    ],
    ids=["cut off", "no tar", "no text", "no JSON", "no label", "no pictures", "no names"],
)
def test_shards_that_cannot_be_used(disk: Place, content: bytes, complaint: str) -> None:
    disk.write("a.tar", content)
    with pytest.raises(ClippoError, match=complaint) as caught:
        open_source(f"webdataset:{disk.uri}", seed=0)
    assert "\n" not in str(caught.value)


# ---- torchvision


def oxford_pets(place: Place) -> dict[str, bytes]:
    """Nine pictures of each of four breeds; the last three are for testing."""
    breeds = ["Abyssinian", "american_bulldog", "Bengal", "boxer"]
    for split, numbers in (("trainval", range(1, 7)), ("test", range(7, 10))):
        lines = [f"{breed}_{i} {c + 1} 1 1" for c, breed in enumerate(breeds) for i in numbers]
        place.write(f"oxford-iiit-pet/annotations/{split}.txt", "\n".join(lines).encode())
    images = {f"{breed}_{i}.jpg": png(100 * c + i) for c, breed in enumerate(breeds) for i in range(1, 10)}
    place.fill({f"oxford-iiit-pet/images/{name}": data for name, data in images.items()})
    return images


def test_oxford_pets_as_torchvision_lays_them_out(place: Place) -> None:
    images = oxford_pets(place)
    source = open_source(f"torchvision:OxfordIIITPet:{place.uri}", seed=0)
    assert source.classes == ("Abyssinian", "American Bulldog", "Bengal", "Boxer")
    found = contents(source)
    assert {key.rpartition("/")[2]: c[1:] for key, c in found.items()} == {
        name: colour(data) for name, data in images.items()
    }
    assert found["oxford-iiit-pet/images/boxer_8.jpg"][0] == "Boxer"
    assert source.has_splits
    by_split = splits(source)
    assert {s for key, s in by_split.items() if int(key[:-4].rpartition("_")[2]) > 6} == {"test"}
    assert {s for key, s in by_split.items() if int(key[:-4].rpartition("_")[2]) < 7} == {
        "train",
        "validation",
    }


def test_arrays_of_fashion_mnist(place: Place) -> None:
    def idx(array: np.ndarray) -> bytes:
        return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()

    for split, n in (("train", 30), ("t10k", 20)):
        pictures = np.arange(n, dtype=np.uint8).repeat(28 * 28).reshape(n, 28, 28)
        place.write(f"FashionMNIST/raw/{split}-images-idx3-ubyte", idx(pictures))
        place.write(f"FashionMNIST/raw/{split}-labels-idx1-ubyte", idx(np.arange(n, dtype=np.uint8) % 10))
    source = open_source(f"torchvision:FashionMNIST:{place.uri}", seed=0)
    assert source.classes[:2] == ("Ankle boot", "Bag")
    found = contents(source)
    assert len(found) == 50
    assert found["test/13"] == ("Dress", 13, 13)
    assert {key.split("/")[0] for key, split in splits(source).items() if split == "test"} == {"test"}
    place.write("FashionMNIST/raw/train-images-idx3-ubyte", idx(np.ones((30, 28, 28), np.uint8)))
    changed = open_source(f"torchvision:FashionMNIST:{place.uri}", seed=0)
    assert changed.fingerprint != source.fingerprint
    assert contents(changed)["train/13"] == ("Dress", 1, 1)


@pytest.mark.parametrize(
    ("name", "files", "classes"),
    [
        (
            "EuroSAT",
            folder(("AnnualCrop", "Forest", "SeaLake", "River"), above="eurosat/2750/"),
            ("Annual Crop", "Forest", "River", "Sea Lake"),
        ),
        (
            "ImageFolder",
            folder(("great_auk", "b", "c", "d")),
            ("b", "c", "d", "great auk"),
        ),
        (
            "Caltech101",
            {"caltech101/Annotations/x": b""}
            | folder(
                ("BACKGROUND_Google", "ant", "car_side", "cup", "emu"),
                above="caltech101/101_ObjectCategories/",
                name="image_{:04d}.jpg",
            ),
            ("ant", "car side", "cup", "emu"),
        ),
        (
            "SUN397",
            {"SUN397/ClassName.txt": b"/a/abbey\n/a/apse/indoor\n/b/bar\n/z/zoo\n"}
            | folder(("a/abbey", "a/apse/indoor", "b/bar", "z/zoo"), above="SUN397/", name="sun_{}.jpg"),
            ("abbey", "apse indoor", "bar", "zoo"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torchvision_sets_without_splits(
    disk: Place, name: str, files: dict[str, bytes], classes: tuple[str, ...]
) -> None:
    source = open_source(f"torchvision:{name}:{disk.fill(files)}", seed=0)
    assert source.classes == classes
    assert not source.has_splits
    assert set(splits(source).values()) == set(SPLITS)
    found = contents(source)
    assert len(found) == 48
    assert {key: c[1:] for key, c in found.items()} == {key: colour(files[key]) for key in found}


def test_dtd_has_three_splits_of_its_own(disk: Place) -> None:
    classes = ("banded", "blotchy", "cracked", "dotted")
    disk.fill(folder(classes, each=9, above="dtd/dtd/images/"))
    for i, split in enumerate(("train", "val", "test")):
        lines = [f"{name}/{k:02d}.png" for name in classes for k in range(i, 9, 3)]
        disk.write(f"dtd/dtd/labels/{split}1.txt", "\n".join(lines).encode())
    found = splits(open_source(f"torchvision:DTD:{disk.uri}", seed=0))
    assert {int(key[-6:-4]) % 3: split for key, split in found.items()} == dict(enumerate(SPLITS))
    assert len(found) == 36


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("Food102:/x", "near are Food101"),
        ("CocoDetection:/x", "no such data set with classes"),
        ("Food101:/nowhere", "there is no such folder"),
        ("Food101", "there is no such folder"),
        ("Food101:{here}", r"torchvision.datasets.Food101\('{here}', download=True\)"),
        ("CIFAR10:{here}", r"not in {here} .*torchvision.datasets.CIFAR10\('{here}', download=True\)"),
        ("ImageNet:{here}", "documentation of ImageNet"),
    ],
)
def test_torchvision_sets_that_are_not_there(tmp_path: Path, argument: str, complaint: str) -> None:
    here = str(tmp_path)
    with pytest.raises(ConfigError, match=complaint.replace("{here}", here)) as caught:
        open_source(f"torchvision:{argument.replace('{here}', here)}", seed=0)
    assert "\n" not in str(caught.value)


def test_torchvision_sets_that_are_not_in_a_store(bucket: Place, cache: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder or file: s3://"):
        open_source(f"torchvision:CIFAR10:{bucket.uri}", seed=0)
    bucket.write("something/else", b"")
    with pytest.raises(ConfigError, match=r"'FOLDER', download=True.* and copy FOLDER to s3://") as caught:
        open_source(f"torchvision:CIFAR10:{bucket.uri}", seed=0)
    assert "\n" not in str(caught.value)
    assert str(cache) not in str(caught.value)


ON_A_NODE = """
import json, sys
from clippo.data.datasets import open_source
source = open_source(sys.argv[1], seed=0)
chosen = [[p.key, p.label] for p in source.pictures("train", range(4), 10)]
print(json.dumps([source.fingerprint, source.classes, chosen]))
"""


def test_every_node_copies_a_torchvision_set_once_and_says_the_same_of_it(
    bucket: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = oxford_pets(bucket)
    spec, nodes = f"torchvision:OxfordIIITPet:{bucket.uri}", [tmp_path / "first", tmp_path / "second"]
    running = [  # two processes on the second node, both at once
        subprocess.Popen(
            [sys.executable, "-c", ON_A_NODE, spec],
            env=os.environ | {"CLIPPO_CACHE": str(nodes[1])}, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    monkeypatch.setenv("CLIPPO_CACHE", str(nodes[0]))
    source = open_source(spec, seed=0)
    chosen = [[p.key, p.label] for p in source.pictures("train", range(4), 10)]
    for process in running:
        said = json.loads(process.communicate()[0])
        assert said == [source.fingerprint, list(source.classes), chosen]
        assert process.returncode == 0
    for node in nodes:
        [copy] = (path for path in (node / "copies").iterdir() if path.is_dir())
        copied = {path.name: path.read_bytes() for path in copy.rglob("*.jpg")}
        assert copied == images
        assert not copy.name.startswith(".")


def test_a_copy_that_was_cut_off_or_is_of_another_state_is_not_read(
    bucket: Place, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = oxford_pets(bucket)
    spec = f"torchvision:OxfordIIITPet:{bucket.uri}"
    whole = local_copy_module.chunks

    def cut_off(path: str) -> Iterator[bytes]:
        yield b"half a picture"
        raise ConfigError("the node went down")

    monkeypatch.setattr(local_copy_module, "chunks", cut_off)
    with pytest.raises(ConfigError, match="went down"):
        open_source(spec, seed=0)
    monkeypatch.setattr(local_copy_module, "chunks", whole)
    found = contents(open_source(spec, seed=0))
    assert {key.rpartition("/")[2]: c[1:] for key, c in found.items()} == {
        name: colour(data) for name, data in images.items()
    }

    def changing(path: str) -> Iterator[bytes]:
        bucket.write("oxford-iiit-pet/images/boxer_1.jpg", png(999, side=9))
        return whole(path)

    bucket.write("oxford-iiit-pet/images/boxer_1.jpg", png(998))
    monkeypatch.setattr(local_copy_module, "chunks", changing)
    with pytest.raises(DataError, match="changed while it was copied; try again"):
        open_source(spec, seed=0)
    monkeypatch.setattr(local_copy_module, "chunks", whole)
    again = contents(open_source(spec, seed=0))["oxford-iiit-pet/images/boxer_1.jpg"]
    assert again[1:] == colour(png(999))
    assert len([path for path in (cache / "copies").iterdir() if path.is_dir()]) == 2


def test_a_node_without_a_place_for_the_copy_says_so(bucket: Place, cache: Path) -> None:
    oxford_pets(bucket)
    cache.write_bytes(b"a file")
    with pytest.raises(ConfigError, match=r"cannot copy s3://.* to .*; .*or set CLIPPO_CACHE") as caught:
        open_source(f"torchvision:OxfordIIITPet:{bucket.uri}", seed=0)
    assert "\n" not in str(caught.value)


def test_every_torchvision_set_is_one() -> None:
    import torchvision

    from clippo.data.formats.torchvision_sets import TORCHVISION

    assert all(hasattr(torchvision.datasets, name) for name in TORCHVISION)


# ---- names of classes

IDS = ("n01440764", "n02009912", "n03126707", "n04008634", "n03773504", "n04356056", "n04355933")


def test_imagenet_names_by_id_and_by_index(disk: Place, tmp_path: Path) -> None:
    by_id = open_source(f"folder:{disk.fill(folder(IDS, each=3))}", 0, "imagenet")
    assert by_id.classes == (
        "tench", "great egret", "construction crane", "missile", "projectile", "sunglass", "sunglasses",
    )  # fmt: skip
    indices = ("0", "9", "10", "999")
    by_index = open_source(f"folder:{local(tmp_path / 'i').fill(folder(indices, each=3))}", 0, "imagenet")
    assert by_index.classes == ("tench", "ostrich", "brambling", "toilet paper")
    assert [by_index.pictures("all", [3], 1)[0].key.split("/")[0]] == ["999"]


def test_all_of_imagenet_has_names_of_its_own() -> None:
    from clippo.data.names import imagenet_names, names_of

    ids = sorted(key for key in imagenet_names() if key.startswith("n"))
    assert len(ids) == len(names_of(ids, {}, "imagenet")) == 1000


NAMED = ("a cat", "a dog", "a guinea pig", "a hare", "an otter")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "a cat\na dog\r\n a guinea pig \na hare\nan otter\n\n"),
        ("names.csv", "class,name\n" + "".join(f"{p},{n}\n" for p, n in zip(PETS, NAMED, strict=True))),
        (
            "names.csv",
            "\ufeff" + "".join(f'{p},"{n}"\n' for p, n in zip(PETS[::-1], NAMED[::-1], strict=True)),
        ),
        ("names.json", json.dumps(dict(zip(PETS, NAMED, strict=True)) | {"emu": "an emu"})),
    ],
)
def test_names_from_a_file(disk: Place, tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_bytes(content.encode())
    assert open_source(f"folder:{disk.fill(folder(each=3))}", 0, str(tmp_path / file)).classes == NAMED


def test_names_from_a_file_in_a_store(disk: Place, bucket: Place) -> None:
    bucket.write("names.txt", "\n".join(NAMED).encode())
    assert open_source(f"folder:{disk.fill(folder(each=3))}", 0, f"{bucket.uri}/names.txt").classes == NAMED


def test_a_line_for_each_index_also_of_classes_without_pictures(disk: Place, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("zero\none\ntwo\nthree\nfour\nfive")
    source = open_source(f"folder:{disk.fill(folder(('0', '2', '3', '5'), each=3))}", 0, str(names))
    assert source.classes == ("zero", "two", "three", "five")


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("names.txt", "a\nb\nc\n", r"3 names for 5 classes; .* first for 'cat' and the last for 'otter'"),
        ("names.txt", "a\n\nc\nd\ne\n", "no name for 1 of 5 classes, the first is 'dog'"),
        ("names.txt", "a\nB\nc\nd\nb\n", "the classes 'dog' and 'otter' are both named 'b'"),
        ("names.csv", "class,name\ncat,a\n", "no name for 4 of 5 classes"),
        ("names.csv", "cat,a,b\n", "one name to each class"),
        ("names.csv", "cat,a\ncat,b\n", "'cat' twice"),
        ("names.json", '["a", "b"]', "one name to each class"),
        ("names.json", '{"cat": ["a"]}', "one name to each class"),
        ("names.json", '{"cat": "a", "cat": "b"}', "'cat' twice"),
        ("names.json", "{", "Expecting property name"),
        ("names.txt", "\udcff", "codec can't decode"),
        ("names.xlsx", "", "must be imagenet or a .txt, .csv or .json file"),
        ("", "", "names.txt does not exist"),
    ],
)
def test_names_that_cannot_be_used(
    disk: Place, tmp_path: Path, file: str, content: str, complaint: str
) -> None:
    if file:
        (tmp_path / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=complaint) as caught:
        open_source(f"folder:{disk.fill(folder(each=2))}", 0, str(tmp_path / (file or "names.txt")))
    assert "\n" not in str(caught.value)
    assert "data.class_names is" in str(caught.value)


def test_classes_that_are_not_names(disk: Place) -> None:
    disk.fill(folder(("polar_bear", "polar bear", "a", "b"), each=2))
    with pytest.raises(ConfigError, match="'polar bear' and 'polar_bear' are both named 'polar bear'"):
        open_source(f"folder:{disk.uri}", 0)
    with pytest.raises(ConfigError, match="no name for 4 of 4 classes"):
        open_source(f"folder:{disk.uri}", 0, "imagenet")


def test_wordnet_ids_are_read_as_imagenet_names_them(disk: Place, tmp_path: Path) -> None:
    source = f"folder:{disk.fill(folder(IDS, each=2))}"
    assert open_source(source, 0).classes == open_source(source, 0, "imagenet").classes
    others = local(tmp_path / "others").fill(folder((*IDS, "n00001740"), each=2))
    with pytest.raises(ConfigError, match=r"WordNet ids, .* 1 of 8 classes, the first is 'n00001740'"):
        open_source(f"folder:{others}", 0)


# ---- places that cannot be used


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("pictures:/x", "must be one of: demo, folder, table, webdataset, torchvision"),
        ("folder:", "write folder:PATH"),
        ("folder:/nowhere/at/all", "no such folder or file: /nowhere/at/all"),
        ("table:/nowhere/a.csv", "no such folder or file"),
        ("webdataset:/nowhere/{0..3}.tar", "no such folder or file"),
        ("folder:nonsense://x/y", "cannot read nonsense://x/y: ValueError: Protocol not known"),
        ("folder:s3://key:hushhush@bucket/x", "carries a password; set AWS_ACCESS_KEY_ID"),
    ],
)
def test_places_that_do_not_exist(spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        open_source(spec, 0)
    assert "\n" not in str(caught.value)
    assert "hushhush" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "environment", "path", "complaint"),
    [
        ("folder", {}, "no-such-bucket/x", "does not exist"),
        ("table", {}, "{bucket}/no/such.csv", "no such folder or file"),
        ("webdataset", {}, "{bucket}/no/{{0..3}}.tar", "no such folder or file"),
        (
            "folder",
            {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
            "{bucket}/x",
            r"access denied \(.*\); check the cred",
        ),
        (
            "table",
            {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
            "{bucket}/x.csv",
            r"access denied \(.*\); check the cred",
        ),
        (
            "folder",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "{bucket}/x",
            "no connection to http.*; check AWS_END",
        ),
    ],
    ids=["bucket", "table", "shards", "credentials", "credentials of a table", "endpoint"],
)
def test_stores_that_cannot_be_used(
    s3_env: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    environment: dict[str, str],
    path: str,
    complaint: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClippoError, match=complaint) as caught:
        open_source(f"{kind}:s3://{path.format(bucket=s3_env.bucket)}", 0)
    assert "\n" not in str(caught.value)
    assert not any(secret in str(caught.value) for secret in (s3_env.key, s3_env.secret, "wrong-secret"))
    assert caught.value.__cause__ is None


def test_a_store_that_goes_away_is_no_broken_picture(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(f"folder:{bucket.fill(folder(each=2))}", 0)
    picture = every(source, "all")[0]
    assert picture.load().size == (8, 8)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="no connection"):
        picture.load()


def test_a_forked_process_reads_from_the_store(bucket: Place) -> None:
    bucket.fill(folder(each=2))
    code = f"""
import os, sys
from clippo.data.datasets import open_source
source = open_source("folder:{bucket.uri}", 0)
pictures = source.pictures("all", range(5), 10)
pictures[0].load()
child = os.fork()
for picture in pictures:
    picture.load()
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
