"""Pictures of people of several groups: small generated sets in exactly their layouts, on disk and on S3."""

import pickle
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clippo.data.group_sets import BUNDLED, GROUP_SETS, GroupSet, open_group_set
from clippo.errors import ClippoError, ConfigError, DataError
from tests.conftest import S3Server

COLORS = [(200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20)]


def picture(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), COLORS[i]).save(path, "PNG")


def table(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def fairface(root: Path, below: str = "") -> Path:
    head = "file,age,gender,race,service_test"
    rows = ["train/1.jpg,50-59,Male,East Asian,True", "train/2.jpg,30-39,Female,Indian,False"]
    table(root / "fairface_label_train.csv", head, *rows)
    table(root / "fairface_label_val.csv", head, "val/1.jpg,3-9,Female,Black,False")
    for i, name in enumerate(("train/1.jpg", "train/2.jpg", "val/1.jpg")):
        picture(root / below / name, i)
    return root


def vl_bias(root: Path) -> Path:
    names = ("verb/baking/man/1.jpg", "verb/baking/woman/1.jpg", "occu/police_officer/woman/7.png")
    for i, name in enumerate(names):
        picture(root / name, i)
    picture(root / "occu/judge/5.jpg", 3)  # of no group
    table(root / "verb/verb.txt", "baking")
    return root


def released_vl_bias(root: Path, pictures: int = 1) -> Path:
    """As VL-Bias is released: nothing says what group is on a picture."""
    for i, concept in enumerate(("verb/baking", "verb/ice_skating", "occu/judge")):
        for n in range(pictures):
            picture(root / concept / f"{n}.jpg", i)
    return root


def grouped(root: Path) -> Path:
    lines = [
        "a.png,north,dancing,train",
        "sub/b.png,south,dancing,val",
        "c.png,east,,test",
        "d.png,,singing,",
    ]
    table(root / "people.csv", "path,group,concept,split", *lines)
    for i, line in enumerate(lines):
        picture(root / line.split(",")[0], i)
    return root / "people.csv"


def described(found: GroupSet) -> list[tuple[str, str, str, str | None, tuple[int, int, int]]]:
    """Key, concept, group, split and colour of each picture."""
    concepts, groups = (*found.concepts, ""), (*found.groups, "")  # -1 is the last
    loads = [pickle.loads(pickle.dumps(p.load)) for p in found.pictures]
    return [
        (p.key, concepts[p.concept], groups[p.group], p.split, load().getpixel((4, 4)))
        for p, load in zip(found.pictures, loads, strict=True)
    ]


@pytest.mark.parametrize("below", ["", "fairface-img-margin025-trainval"])
def test_fairface_by_each_of_its_columns(tmp_path: Path, below: str) -> None:
    root = fairface(tmp_path, below)
    found = open_group_set(f"fairface:{root}")
    assert (found.groups, found.concepts, found.templates) == (("Female", "Male"), (), ())
    assert described(found) == [
        ("train/1.jpg", "", "Male", "train", COLORS[0]),
        ("train/2.jpg", "", "Female", "train", COLORS[1]),
        ("val/1.jpg", "", "Female", "validation", COLORS[2]),
    ]
    assert open_group_set(f"fairface-race:{root}").groups == ("Black", "East Asian", "Indian")
    assert open_group_set(f"fairface-age:{root}").groups == ("3-9", "30-39", "50-59")


def test_vl_bias(tmp_path: Path) -> None:
    found = open_group_set(f"vl-bias:{vl_bias(tmp_path)}")
    assert found.groups == ("man", "woman")
    assert found.concepts == ("baking", "judge", "police officer")
    assert [row[1:] for row in described(found)] == [
        ("judge", "", None, COLORS[3]),
        ("police officer", "woman", None, COLORS[2]),
        ("baking", "man", None, COLORS[0]),
        ("baking", "woman", None, COLORS[1]),
    ]
    assert found.majority == (-1, -1, 1)  # one man and one woman bake; the judge is of no group
    activity, occupation, _ = found.templates
    assert len(activity) == len(occupation) == 4
    assert all(template.count("{}") == 1 for template in activity + occupation)
    assert "a person is {}" in activity
    assert "a person is a {}" in occupation


def test_vl_bias_as_released_takes_the_groups_of_another_set(tmp_path: Path) -> None:
    spec, like = f"vl-bias:{released_vl_bias(tmp_path / 'released')}", open_group_set("people")
    found = open_group_set(spec, like)
    assert found.groups == ("man", "woman")
    assert found.concepts == ("baking", "ice skating", "judge")
    assert described(found) == [
        ("occu/judge/0.jpg", "judge", "", None, COLORS[2]),
        ("verb/baking/0.jpg", "baking", "", None, COLORS[0]),
        ("verb/ice_skating/0.jpg", "ice skating", "", None, COLORS[1]),
    ]
    assert not found.is_labelled
    assert {len(templates) for templates in found.templates} == {4}
    assert found.majority == (-1, -1, like.majority[like.concepts.index("judge")])
    labelled = f"vl-bias:{vl_bias(tmp_path / 'labelled')}"
    assert open_group_set(labelled, like).majority == (-1, -1, 1), "its own labels stay"
    assert open_group_set(labelled).is_labelled


def test_any_table_of_any_groups(tmp_path: Path) -> None:
    found = open_group_set(f"grouped:{grouped(tmp_path)}")
    assert found.groups == ("east", "north", "south")
    assert found.concepts == ("dancing", "singing")
    assert found.templates == ((), ())
    assert found.majority == (1, -1)  # of the pictures for training, and those of no split
    assert described(found) == [
        ("a.png", "dancing", "north", "train", COLORS[0]),
        ("sub/b.png", "dancing", "south", "validation", COLORS[1]),
        ("c.png", "", "east", "test", COLORS[2]),
        ("d.png", "singing", "", None, COLORS[3]),
    ]


def test_the_fingerprint_follows_pictures_and_labels(tmp_path: Path) -> None:
    path = grouped(tmp_path)
    before = open_group_set(f"grouped:{path}").fingerprint
    assert open_group_set(f"grouped:{path}").fingerprint == before
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    other_picture = open_group_set(f"grouped:{path}").fingerprint
    path.write_text(path.read_text().replace("north", "west"))
    assert len({before, other_picture, open_group_set(f"grouped:{path}").fingerprint}) == 3


def test_on_s3_as_on_disk(tmp_path: Path, s3_env: S3Server) -> None:
    for make, name in ((fairface, "fairface"), (grouped, "grouped")):
        here = make(tmp_path / name)
        bucket = f"{s3_env.bucket}/{uuid.uuid4().hex}"
        s3_env.filesystem().put(str(tmp_path / name), bucket, recursive=True)
        there = f"s3://{bucket}/{here.relative_to(tmp_path / name)}".removesuffix("/.")
        on_s3, on_disk = open_group_set(f"{name}:{there}"), open_group_set(f"{name}:{here}")
        assert described(on_s3) == described(on_disk)


def broken_fairface(root: Path) -> Path:
    fairface(root)
    (root / "train/1.jpg").unlink()
    return root


def no_column(root: Path) -> Path:
    table(root / "people.csv", "path,kind", "a.png,north")
    return root / "people.csv"


def one_group(root: Path) -> Path:
    table(root / "people.csv", "path,group", "a.png,north", "b.png,north")
    return root / "people.csv"


def twice(root: Path) -> Path:
    table(root / "people.csv", "path,group", "a.png,north", "./a.png,south")
    return root / "people.csv"


def no_path(root: Path) -> Path:
    table(root / "people.csv", "path,group", "a.png,north", ",south")
    return root / "people.csv"


def unlabelled(root: Path) -> Path:
    table(root / "people.csv", "path,group", "a.png,", "b.png,")
    return root / "people.csv"


def both_kinds(root: Path) -> Path:
    for i, name in enumerate(("verb/cooking/man/1.jpg", "occu/cooking/woman/2.jpg")):
        picture(root / name, i)
    return root


def odd_split(root: Path) -> Path:
    table(root / "people.csv", "path,group,split", "a.png,north,holdout")
    return root / "people.csv"


def unnamed_in_the_second(root: Path) -> Path:
    fairface(root)
    table(root / "fairface_label_val.csv", "file,gender", "val/1.jpg,Male", ",Male")
    return root


@pytest.mark.parametrize(
    ("name", "make", "error", "message"),
    [
        ("unfairface", fairface, ConfigError, "must be one of: people, fairface:PATH, fairface-race:PATH"),
        ("fairface", vl_bias, DataError, "has no fairface_label_train.csv"),
        ("fairface", broken_fairface, DataError, "has no picture train/1.jpg, the first in fairface"),
        ("fairface", unnamed_in_the_second, DataError, "row 1 of .*fairface_label_val.csv names no picture"),
        ("vl-bias", fairface, DataError, "must lie in verb/<activity>/ and occu/<occupation>/, or"),
        ("vl-bias", released_vl_bias, DataError, r"and has none; .* be a test set .*data\.test_sets\)"),
        ("grouped", fairface, DataError, "is no CSV file; give the file"),
        ("grouped", no_column, DataError, "people.csv has no column group; its columns are: path, kind"),
        ("grouped", one_group, DataError, "needs pictures of two groups or more, and has only 'north'"),
        ("vl-bias", both_kinds, DataError, "has 'cooking' in occu/ and in verb/, .*; rename one of these"),
        ("grouped", unlabelled, DataError, r"and has none; put .* with a column group \(grouped:FILE\)$"),
        ("grouped", twice, DataError, "has a.png twice; a picture has one group"),
        ("grouped", no_path, DataError, "row 1 of .*people.csv names no picture"),
        ("grouped", odd_split, DataError, "row 0 of .*people.csv has split 'holdout'; known are train"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    tmp_path: Path, name: str, make: Callable[[Path], Path], error: type[ClippoError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        open_group_set(f"{name}:{make(tmp_path)}")
    assert "\n" not in str(raised.value)


def test_the_bundled_people() -> None:
    found = open_group_set("people")
    assert (found.groups, len(found.concepts)) == (("man", "woman"), 20)
    assert found.groups[found.majority[found.concepts.index("farmer")]] == "man"
    assert found.groups[found.majority[found.concepts.index("teacher")]] == "woman"
    cells = Counter((p.split, p.concept, p.group) for p in found.pictures)
    assert len(cells) == 3 * 20 * 3
    assert len(set(cells.values())) == 1
    load = found.pictures[0].load
    assert pickle.loads(pickle.dumps(load))().tobytes() == load().tobytes()
    with pytest.raises(ConfigError, match="people is bundled and takes no path, got 'here'"):
        open_group_set("people:here")


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in set(GROUP_SETS) - {BUNDLED}:
        with pytest.raises(ConfigError, match="there is no such folder or file"):
            open_group_set(f"{name}:{tmp_path / 'nowhere'}")
        with pytest.raises(ConfigError, match="lacks the place of its files"):
            open_group_set(name)


def test_a_picture_that_is_missing_is_an_error_when_it_is_loaded(tmp_path: Path) -> None:
    path = grouped(tmp_path)
    (tmp_path / "sub/b.png").unlink()
    found = open_group_set(f"grouped:{path}")
    with pytest.raises(DataError, match=r"b\.png does not exist"):
        found.pictures[1].load()
