"""Published typographic test sets: small generated ones in exactly their layouts, on disk and on S3."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import tempfile
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from clippo.data import files, typographic_sets
from clippo.data.typographic_sets import (
    TYPOGRAPHIC_SETS,
    AttackedImage,
    TypographicSet,
    label_and_word,
    open_typographic_set,
)
from clippo.errors import ClippoError, ConfigError, DataError
from tests.conftest import S3Server

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


# ---- pictures: red above blue, 24 wide and 16 high, in every form that the sets come in


def _halves(top: tuple[int, int, int] = RED, bottom: tuple[int, int, int] = BLUE) -> Image.Image:
    image = Image.new("RGB", (24, 16), bottom)
    image.paste(top, (0, 0, 24, 8))
    return image


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _rgba() -> bytes:
    image = _halves().convert("RGBA")
    image.paste((0, 255, 0, 0), (0, 8, 24, 16))  # green, but transparent
    return _saved(image, "PNG")


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for viewing
    return _saved(_halves().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def _png(color: tuple[int, int, int] = RED) -> bytes:
    return _saved(_halves(color), "PNG")


FORMS: dict[str, tuple[Callable[[], bytes], tuple[int, int, int]]] = {
    "rgb.png": (_png, BLUE),
    "rgba.png": (_rgba, WHITE),
    "palette.png": (lambda: _saved(_halves().quantize(4), "PNG"), BLUE),
    "cmyk.jpg": (lambda: _saved(_halves().convert("CMYK"), "JPEG", quality=95), BLUE),
    "turned.jpg": (_turned, BLUE),
}


def _near(image: Image.Image, place: tuple[int, int], color: tuple[int, int, int]) -> bool:
    return bool(np.abs(np.subtract(image.getpixel(place), color)).max() < 40)


def _names(opened: TypographicSet, image: AttackedImage) -> tuple[str, str]:
    word = opened.classes[image.attack_label] if image.attack_label >= 0 else ""
    return opened.classes[image.label], word


def _by_key(opened: TypographicSet) -> dict[str, tuple[str, str]]:
    return {image.key: _names(opened, image) for image in opened.attacked}


# ---- RTA-100 and PAINT

NAMED = {
    "label=cat_text=dog.png": ("cat", "Dog"),
    "label=Dog_text=fire  engine.JPG": ("Dog", "fire engine"),
    "label=fire_engine_text=DOG.jpeg": ("fire engine", "Dog"),
    "label=St. Bernard_text=T-shirt.v2.PNG": ("St. Bernard", "T-shirt.v2"),
    "label=St Bernard_text=cat.png": ("St Bernard", "cat"),
    "label=a=b_text=c=d.png": ("a=b", "c=d"),
    "label=cat_text=sloth_text=sign.png": ("cat", "sloth text=sign"),
    "label=cat_text=zebra (2).png": ("cat", "zebra"),
    "label=cat_text=zebra_3.png": ("cat", "zebra"),
    "label=cat_text=boeing_747.png": ("cat", "boeing 747"),
    "label=cafe\u0301_text=cat.png": ("caf\u00e9", "cat"),
}


def _write_named(folder: Path) -> None:
    folder.mkdir()
    for i, name in enumerate(NAMED):
        make, _ = list(FORMS.values())[i % len(FORMS)]
        (folder / name).write_bytes(make())


@pytest.mark.parametrize("name", ["rta-100", "paint"])
def test_file_names_give_objects_and_words(tmp_path: Path, name: str) -> None:
    _write_named(tmp_path / "photos")
    opened = open_typographic_set(f"{name}:{tmp_path / 'photos'}")
    assert opened.name == name
    assert _by_key(opened) == NAMED
    assert opened.clean == ()
    assert not opened.pairwise
    assert opened.left_out == ()
    # Objects in the order of the files, spelled as first met, then the words that name no object.
    assert opened.classes == (
        "Dog", "St Bernard", "St. Bernard", "a=b", "caf\u00e9", "cat", "fire engine",
        "T-shirt.v2", "c=d", "boeing 747", "sloth text=sign", "zebra",
    )  # fmt: skip


def test_every_form_of_picture_comes_out_upright_in_rgb(tmp_path: Path) -> None:
    for form, (make, _) in FORMS.items():
        (tmp_path / f"label=cat_text={form}").write_bytes(make())
    opened = open_typographic_set(f"rta-100:{tmp_path}")
    assert len(opened.attacked) == len(FORMS)
    for image in opened.attacked:
        loaded = image.load()
        assert (loaded.mode, loaded.size) == ("RGB", (24, 16)), image.key
        assert _near(loaded, (12, 3), RED), image.key
        assert _near(loaded, (12, 12), FORMS[image.key.removeprefix("label=cat_text=")][1]), image.key


def test_what_fits_no_pattern_is_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("label=cat_text=dog.png", "label=cat_text=Cat.png", ".DS_Store", "._label=cat_text=dog.png"):
        (tmp_path / name).write_bytes(_png())
    odd = [
        "readme.txt",
        "label=cat.png",
        "label=_text=dog.png",
        "label=cat_text=_.png",
        "label=cat_text=dog.txt",
    ]
    for name in odd:
        (tmp_path / name).write_bytes(_png())
    (tmp_path / "more").mkdir()
    with caplog.at_level(logging.WARNING, logger=typographic_sets.__name__):
        opened = open_typographic_set(f"paint:{tmp_path}")
    assert [image.key for image in opened.attacked] == ["label=cat_text=dog.png"]
    assert opened.left_out == (*sorted(odd), "label=cat_text=Cat.png")  # a name of its own is no attack
    assert opened.classes == ("cat", "dog")
    [record] = caplog.records
    assert "6 left out" in record.getMessage()


# Everything that a file name may hold.
NAME = st.text(
    st.one_of(
        st.sampled_from("_= .-aB1()"), st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
    ),
    min_size=1,
    max_size=20,
) | st.sampled_from(["_text=", "text=", "label=", "a_text", "a_label=b_text=c", "St. Bernard", "x.png"])


@given(NAME, NAME, st.sampled_from([".png", ".PNG", ".jpg", ".JPEG"]))
def test_a_file_name_gives_its_label_and_word_back(label: str, word: str, suffix: str) -> None:
    assume("_text=" not in label)  # the first one ends the label
    assume(not re.search(r"\(\d+\)$", word))  # a copy's number
    assume(label.replace("_", " ").strip() and word.replace("_", " ").strip())
    assert label_and_word(f"label={label}_text={word}{suffix}") == (label, word)


FEW = st.text("aAbB _.-=é", min_size=1, max_size=4).filter(lambda name: name.replace("_", " ").strip())


def _same(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(FEW, FEW), min_size=1, max_size=6))
def test_each_class_has_one_index_however_it_is_spelled(pairs: list[tuple[str, str]]) -> None:
    assume(any(_same(label) != _same(word) for label, word in pairs))
    with tempfile.TemporaryDirectory() as folder:
        for label, word in pairs:
            (Path(folder) / f"label={label}_text={word}.png").write_bytes(b"")
        opened = open_typographic_set(f"rta-100:{folder}")
    spelled = [_same(name) for name in opened.classes]
    assert len(spelled) == len(set(spelled))
    expected = {(_same(label), _same(word)) for label, word in pairs if _same(label) != _same(word)}
    assert {(spelled[image.label], spelled[image.attack_label]) for image in opened.attacked} == expected
    n_labels = len({label for label, _ in expected})
    assert {spelled[image.label] for image in opened.attacked} == set(spelled[:n_labels])


# ---- Disentangling

ANNOTATIONS = {
    "IMG_2934.JPG": {"true object": "cup", "typographic attack label": ""},
    "IMG_2935.JPG": {"true object": "cup", "typographic attack label": "Mug "},
    "IMG_2936.JPG": {"true object": "Coffee_Mug", "typographic attack label": "good"},
    "IMG_2937.JPG": {"true object": "mug", "typographic attack label": "coffee mug"},
}


def _write_disentangling(
    folder: Path, beside: bool = False, classes: Any = ("coffee mug", "mug", "cup")
) -> Path:
    photos = folder if beside else folder / "images"
    photos.mkdir(parents=True)
    for name in ANNOTATIONS:
        (photos / name).write_bytes(_turned())
    (folder / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    if classes is not None:
        (folder / "classes.json").write_text(json.dumps(classes))
    return folder


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("classes", [["coffee mug", "mug", "cup"], {"coffee mug": 0, "mug": 1, "cup": 2}])
def test_disentangling_is_read_as_published(tmp_path: Path, beside: bool, classes: Any) -> None:
    folder = _write_disentangling(tmp_path / "set", beside, classes)
    opened = open_typographic_set(f"disentangling:{folder}")
    assert opened.classes == ("coffee mug", "mug", "cup", "good")  # "good" is no class of classes.json
    assert _by_key(opened) == {
        "IMG_2935.JPG": ("cup", "mug"),
        "IMG_2936.JPG": ("coffee mug", "good"),
        "IMG_2937.JPG": ("mug", "coffee mug"),
    }
    [clean] = opened.clean
    assert (clean.key, clean.label, clean.attack_label) == ("IMG_2934.JPG", 2, -1)
    assert not opened.pairwise
    assert opened.left_out == ()
    assert all(_near(image.load(), (12, 3), RED) for image in (*opened.attacked, clean))


def test_disentangling_without_class_list_and_with_the_other_file_name(tmp_path: Path) -> None:
    folder = _write_disentangling(tmp_path / "set", classes=None)
    (folder / "annotations.json").rename(folder / "annotation.json")
    (folder / "images" / "IMG_9999.JPG").write_bytes(_turned())
    opened = open_typographic_set(f"disentangling:{folder}")
    assert opened.classes == ("cup", "Coffee Mug", "mug", "good")
    assert opened.left_out == ("images/IMG_9999.JPG",)  # nobody says what it shows


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("annotations.json", "[1", "is no JSON"),
        ("annotations.json", "\udcff", "is no JSON"),
        ("annotations.json", "[]", 'must map each photo\'s file name to {"true object"'),
        ("annotations.json", "{}", "must map each photo"),
        ("annotations.json", '{"IMG_2934.JPG": "cup"}', "must map each photo"),
        ("annotations.json", '{"IMG_2934.JPG": {"object": "cup"}}', "must map each photo"),
        ("annotations.json", '{"IMG_2934.JPG": {"true object": ""}}', "must map each photo"),
        ("annotations.json", '{"IMG_2934.JPG": {"true object": 3}}', "must map each photo"),
        ("annotations.json", '{"IMG_2934.JPG": {"true object": "cup"}}', "no photo with a word"),
        (
            "annotations.json",
            '{"a.JPG": {"true object": "cup"}, "b": {"true object": "x"}}',
            "2 of the 2 .* a.JPG",
        ),
        (
            "annotations.json",
            '{"../x.JPG": {"true object": "cup"}}',
            "1 of the 1 .* neither beside it nor in images",
        ),
        ("classes.json", '"cup"', "must be a list of class names"),
        ("classes.json", "[1, 2]", "must be a list of class names"),
    ],
)
def test_a_bad_disentangling_folder_is_refused_in_one_line(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    folder = _write_disentangling(tmp_path / "set")
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        open_typographic_set(f"disentangling:{folder}")
    assert "\n" not in str(caught.value)


# ---- SCAM

VARIANTS = ("NoSCAM", "SCAM", "SynthSCAM")
SCAM_PAIRS = [
    ("ball", "car"),
    ("fire extinguisher", "ball"),
    ("usb cable", "Traffic Light"),
    ("tea pot", "hair"),
]
N_SCAM = 16
ROW_GROUP = 5


@lru_cache
def _noise(seed: int, side: int = 128) -> bytes:
    """A picture of 48 kB, or more, that nothing compresses."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return _saved(Image.fromarray(pixels), "PNG")


def _scam_rows() -> list[dict[str, Any]]:
    rows = []
    for v, variant in enumerate(VARIANTS):
        for i in range(N_SCAM):
            label, word = SCAM_PAIRS[i % len(SCAM_PAIRS)]
            key = f"{variant}_img_{i + 1:04d}"
            rows.append(
                {
                    "image": {"bytes": _noise(100 * v + i), "path": f"{key}.png"},
                    "id": key,
                    "object_label": label,
                    "attack_word": word,
                    "postit_area_pct": 1.5,
                    "type": variant,
                }
            )
    return rows


@pytest.fixture(scope="module")
def scam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards in ``data/``, as the Hugging Face repository has them."""
    folder = tmp_path_factory.mktemp("SCAM")
    rows = _scam_rows()
    (folder / "data").mkdir()
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    for shard, part in enumerate((rows[:20], rows[20:])):
        file = folder / "data" / f"train-{shard:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), file, row_group_size=ROW_GROUP)
    return folder


@pytest.mark.parametrize(("name", "variant"), [("scam", "SCAM"), ("synth-scam", "SynthSCAM")])
def test_scam_has_clean_twins_and_is_judged_pairwise(scam_folder: Path, name: str, variant: str) -> None:
    opened = open_typographic_set(f"{name}:{scam_folder}")
    assert opened.pairwise
    assert opened.classes == (
        "ball",
        "fire extinguisher",
        "usb cable",
        "tea pot",
        "car",
        "Traffic Light",
        "hair",
    )
    numbers = [f"img_{i + 1:04d}" for i in range(N_SCAM)]
    assert [image.key for image in opened.attacked] == [f"{variant}_{number}" for number in numbers]
    assert [image.key for image in opened.clean] == [f"NoSCAM_{number}" for number in numbers]
    for i, (image, twin) in enumerate(zip(opened.attacked, opened.clean, strict=True)):
        assert _names(opened, image) == _names(opened, twin) == SCAM_PAIRS[i % len(SCAM_PAIRS)]
    for seed, images in ((0, opened.clean), (100 * VARIANTS.index(variant), opened.attacked)):
        for i in (0, 7, N_SCAM - 1):
            expected = np.asarray(Image.open(io.BytesIO(_noise(seed + i))))
            assert np.array_equal(np.asarray(images[i].load()), expected)


def test_scam_is_never_held_whole(tmp_path: Path) -> None:
    rows = [row for row in _scam_rows() if row["type"] != "SynthSCAM"]
    large = _noise(0, side=512)  # 0.8 MB
    for row in rows:
        row["image"]["bytes"] = large
    file = tmp_path / "scam.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4, use_dictionary=False)
    opened = open_typographic_set(f"scam:{tmp_path}")
    typographic_sets._pictures.cache_clear()
    before = pa.total_allocated_bytes()
    held = []
    for image in (*opened.clean, *opened.attacked, opened.clean[0]):
        assert image.load().size == (512, 512)
        held.append(pa.total_allocated_bytes() - before)
    # Two row groups of four, and a third being read and decoded; the file has eight.
    assert len(large) < max(held) < 4.2 * 4 * len(large) < 0.6 * file.stat().st_size


def test_scam_may_be_one_file_or_its_folder(scam_folder: Path, tmp_path: Path) -> None:
    whole = open_typographic_set(f"scam:{scam_folder}")
    inner = open_typographic_set(f"scam:{scam_folder / 'data'}")
    assert (inner.classes, _by_key(inner)) == (whole.classes, _by_key(whole))
    file = tmp_path / "scam.parquet"
    columns = ["type", "attack_word", "object_label", "id", "image"]  # in another order
    pq.write_table(pa.Table.from_pylist(_scam_rows()).select(columns), file)
    alone = open_typographic_set(f"scam:{file}")
    assert (alone.classes, _by_key(alone)) == (whole.classes, _by_key(whole))
    assert np.array_equal(np.asarray(alone.attacked[3].load()), np.asarray(whole.attacked[3].load()))


def test_rows_of_scam_without_names_or_picture(tmp_path: Path) -> None:
    rows = [row for row in _scam_rows() if row["type"] == "SCAM"]
    twins = [row for row in _scam_rows() if row["type"] == "NoSCAM"][3:5]
    rows[0]["object_label"] = None
    rows[1]["attack_word"] = " "
    rows[2]["image"] = {"bytes": None, "path": "elsewhere.png"}
    rows[3]["image"] = {"bytes": b"no picture", "path": "x.png"}
    for row in (rows[4], twins[1]):
        row["attack_word"] = row["object_label"].upper()
    pq.write_table(pa.Table.from_pylist(rows + twins), tmp_path / "scam.parquet")
    opened = open_typographic_set(f"scam:{tmp_path}")
    assert [image.key for image in opened.clean] == ["NoSCAM_img_0004"], "nothing to tell its label from"
    assert opened.left_out == (
        "SCAM_img_0001 (scam.parquet, row group 0, row 0)",
        "SCAM_img_0002 (scam.parquet, row group 0, row 1)",
        "SCAM_img_0005",
        "NoSCAM_img_0005",
    )
    first, second, third = opened.attacked[:3]
    for broken in (first, second):
        with pytest.raises(DataError):
            broken.load()
    assert third.load().size == (128, 128)


@pytest.mark.parametrize("column", ["image", "id", "object_label", "attack_word", "type"])
def test_a_missing_column_of_scam_is_named_with_those_there(tmp_path: Path, column: str) -> None:
    table = pa.Table.from_pylist(_scam_rows()[:4]).drop_columns([column])
    pq.write_table(table, tmp_path / "scam.parquet")
    with pytest.raises(DataError, match=rf"lacks SCAM's column '{column}'; it has .*postit_area_pct"):
        open_typographic_set(f"scam:{tmp_path}")


def test_scam_without_the_variant_or_with_a_broken_file(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(_scam_rows()[: 2 * N_SCAM]), tmp_path / "scam.parquet")
    with pytest.raises(DataError, match=r"no row of type SynthSCAM; its types: NoSCAM, SCAM$"):
        open_typographic_set(f"synth-scam:{tmp_path}")
    (tmp_path / "scam.parquet").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )  # a clone without LFS
    with pytest.raises(DataError, match=r"scam\.parquet cannot be read as Parquet: ") as caught:
        open_typographic_set(f"scam:{tmp_path}")
    assert "\n" not in str(caught.value)


# ---- whatever the set

WRITERS: dict[str, Callable[[Path], object]] = {
    "rta-100": _write_named,
    "disentangling": _write_disentangling,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_fingerprint_changes_with_the_files_only(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set"
    WRITERS[name](folder)
    before = open_typographic_set(f"{name}:{folder}").fingerprint
    assert before.startswith(f"{name}-")
    assert str(tmp_path) not in before
    assert open_typographic_set(f"{name}:{folder}").fingerprint == before
    (folder / "notes.txt").write_text("not a part of the set")
    assert open_typographic_set(f"{name}:{folder}").fingerprint == before
    photo = next(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg"))
    photo.write_bytes(_png(BLUE))
    assert open_typographic_set(f"{name}:{folder}").fingerprint != before


def test_a_relative_path_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_named(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    opened = open_typographic_set("rta-100:photos")
    monkeypatch.chdir("/")
    assert opened.attacked[0].load().size == (24, 16)


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    folder = _write_disentangling(tmp_path / "set")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(open_typographic_set(f"disentangling:{folder}").attacked) == 3


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "rta100:x",
            ConfigError,
            "'rta100:x' must be one of: rta-100:PATH, paint:PATH, disentangling:PATH, scam:PATH",
        ),
        ("scam", ConfigError, "write scam:PATH"),
        ("scam:", ConfigError, "write scam:PATH"),
        ("paint:{tmp}/none", ConfigError, "no such folder or file: .*/none"),
        ("paint:foo://bar", ConfigError, "foo://bar: .*Protocol not known"),
        ("paint:s3://", ConfigError, "cannot .* s3://"),
        ("paint:s3://me:hunter2@bucket/x", ConfigError, "carries a password; set AWS_ACCESS_KEY_ID"),
        ("rta-100:{tmp}", DataError, r"none of the 1 files .* is named label=<object>_text=<word>\.png"),
        ("paint:{tmp}/empty", DataError, "none of the 0 files"),
        ("paint:{tmp}/a.txt", DataError, "none of the 1 files"),
        ("disentangling:{tmp}", DataError, "has no annotations.json"),
        ("disentangling:{tmp}/empty", DataError, "has no annotations.json"),
        ("scam:{tmp}", DataError, "has no Parquet file; give the folder"),
        ("synth-scam:{tmp}/empty", DataError, "has no Parquet file"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(
    tmp_path: Path, spec: str, error: type[ClippoError], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("no picture")
    with pytest.raises(error, match=message) as caught:
        open_typographic_set(spec.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    with pytest.raises(ClippoError, match="denied"):
        open_typographic_set(f"paint:{tmp_path}")
    tmp_path.chmod(0o700)


def test_a_photo_that_vanished_is_a_data_error(tmp_path: Path) -> None:
    _write_named(tmp_path / "photos")
    opened = open_typographic_set(f"paint:{tmp_path / 'photos'}")
    (tmp_path / "photos" / opened.attacked[0].key).unlink()
    with pytest.raises(DataError, match="does not exist"):
        opened.attacked[0].load()


# ---- S3


def _uploaded(server: S3Server, folder: Path) -> str:
    url = f"{server.bucket}/{uuid.uuid4().hex}"
    server.filesystem().put(f"{folder}/", f"{url}/", recursive=True)
    return f"s3://{url}"


def _alike(one: TypographicSet, other: TypographicSet) -> bool:
    same = one.classes == other.classes and one.left_out == other.left_out
    for a, b in zip((*one.attacked, *one.clean), (*other.attacked, *other.clean), strict=True):
        same &= (a.key, a.label, a.attack_label) == (b.key, b.label, b.attack_label)
        same &= np.array_equal(np.asarray(a.load()), np.asarray(b.load()))
    return same


@pytest.mark.parametrize("name", TYPOGRAPHIC_SETS)
def test_a_set_on_s3_is_the_set_on_disk(
    s3_env: S3Server, scam_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = scam_folder
    if "scam" not in name:
        folder = tmp_path / "set"
        (_write_disentangling if name == "disentangling" else _write_named)(folder)
    url = _uploaded(s3_env, folder)
    remote = open_typographic_set(f"{name}:{url}/")
    assert _alike(remote, open_typographic_set(f"{name}:{folder}"))
    assert open_typographic_set(f"{name}:{url}").fingerprint == remote.fingerprint


def test_the_fingerprint_on_s3_changes_with_a_file_of_the_same_size(s3_env: S3Server, tmp_path: Path) -> None:
    _write_named(tmp_path / "photos")
    url = _uploaded(s3_env, tmp_path / "photos")
    before = open_typographic_set(f"paint:{url}").fingerprint
    file = s3_env.filesystem().find(url)[0]
    data = s3_env.filesystem().cat_file(file)
    s3_env.filesystem().pipe_file(file, data[:-1] + bytes([data[-1] ^ 1]))
    assert open_typographic_set(f"paint:{url}").fingerprint != before


def test_opening_scam_on_s3_reads_no_pictures(
    s3_env: S3Server, scam_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = _uploaded(s3_env, scam_folder)
    whole = sum(file.stat().st_size for file in scam_folder.rglob("*.parquet"))
    fetched = []

    def counting(*place: Any) -> bytes:
        fetched.append(files.read(*place))
        return fetched[-1]

    monkeypatch.setattr(typographic_sets, "read", counting)
    opened = open_typographic_set(f"scam:{url}")
    assert 0 < sum(map(len, fetched)) < 0.15 * whole
    fetched.clear()
    opened.attacked[0].load()
    assert 0 < sum(map(len, fetched)) < 0.2 * whole  # one row group of ten


def test_damage_on_s3_is_a_data_error(s3_env: S3Server, scam_folder: Path) -> None:
    url = _uploaded(s3_env, scam_folder)
    opened = open_typographic_set(f"scam:{url}")
    second = max(path for path in s3_env.filesystem().find(url) if path.endswith(".parquet"))
    data = s3_env.filesystem().cat_file(second)
    s3_env.filesystem().pipe_file(second, data[:-1] + b"?")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_typographic_set(f"scam:{url}")
    s3_env.filesystem().rm_file(second)
    with pytest.raises(DataError, match="does not exist"):
        opened.attacked[-1].load()
    assert opened.attacked[0].load().size == (128, 128)  # it is in the first file


def _size(image: AttackedImage, results: Any) -> None:
    results.put(image.load().size)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_loaders_on_s3_survive_pickling_and_forking(s3_env: S3Server, tmp_path: Path) -> None:
    _write_named(tmp_path / "photos")
    image = open_typographic_set(f"rta-100:{_uploaded(s3_env, tmp_path / 'photos')}").attacked[0]
    assert s3_env.secret.encode() not in pickle.dumps(image)
    assert pickle.loads(pickle.dumps(image)).load().size == image.load().size == (24, 16)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_size, args=(image, results))
    child.start()
    assert results.get(timeout=60) == (24, 16)
    child.join(60)


@pytest.mark.parametrize("place", ["s3://no-such-bucket/set", "s3://clippo/no/such/prefix"])
def test_a_missing_bucket_or_prefix_is_refused(s3_env: S3Server, place: str) -> None:
    with pytest.raises((ConfigError, DataError), match=f"({place} does not exist|no such .*{place})"):
        open_typographic_set(f"paint:{place}")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong" * 8, "access denied"),
        ("AWS_ACCESS_KEY_ID", None, "no credentials"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "no connection"),
    ],
)
def test_s3_without_rights_or_server_is_refused_without_secrets(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, message: str
) -> None:
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message) as caught:
        open_typographic_set(f"scam:s3://{s3_env.bucket}/{uuid.uuid4().hex}")
    assert "\n" not in str(caught.value)
    assert s3_env.secret not in str(caught.value)
    assert "wrongwrong" not in str(caught.value)
