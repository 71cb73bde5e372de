"""More test sets: classes of their own beside the source's, and pictures that the source never lends."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clippo.config import DataConfig, ModelConfig
from clippo.errors import ConfigError
from clippo.evaluation import evaluate_model
from clippo.model import ClipModel
from clippo.tasks import TypographicTask
from clippo.tasks.typographic import open_test_set
from tests.prepared.test_prepared import folder_of_pictures


def rta(root: Path) -> Path:
    root.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for label, word in (("cat", "dog"), ("hot dog", "cat"), ("dog", "Hot Dog"), ("cat", "guitar")):
        pixels = rng.integers(0, 256, (120, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"label={label}_text={word}.png")
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {"photos": rta(folder / "photos"), "flowers": folder_of_pictures(folder / "flowers", 4, 5)}


@pytest.fixture(scope="module")
def task(places: dict[str, Path]) -> TypographicTask:
    sets = (f"rta-100:{places['photos']}", f"petals=folder:{places['flowers']}")
    return TypographicTask(DataConfig(test_sets=sets, train_pictures=4, eval_pictures=8))


def test_their_classes_come_after_the_sources(task: TypographicTask) -> None:
    assert task.classes[:128] == task.source.classes
    assert sorted(task.classes[128:132]) == ["cat", "dog", "guitar", "hot dog"]
    assert task.classes[132:] == tuple(f"class {c}" for c in range(4))
    assert task.templates == ("",) * len(task.classes)
    assert set(task.seen) | set(task.held_out) == set(range(128))


def test_photos_come_with_the_word_that_is_on_them(task: TypographicTask) -> None:
    part = task.parts["test/rta-100"]
    assert part.sets == ("test/attacked/rta-100",)
    assert part.candidates == tuple(range(128, 132))
    rows = [r for i in range(4) for r in task.rows(part, i, lambda image: image)]
    named = {(task.classes[r.label], task.classes[r.attack_label]) for r in rows}
    assert named == {("cat", "dog"), ("hot dog", "cat"), ("dog", "hot dog"), ("cat", "guitar")}
    assert rows[0].image.size == (90, 120), "nothing is drawn on them"


def test_pictures_of_another_source_are_taken_clean_and_attacked(task: TypographicTask) -> None:
    part = task.parts["test/petals"]
    assert len(part.pictures) == 8, "a folder without splits lends all of its pictures, up to eval_pictures"
    clean, attacked = task.rows(part, 0, lambda image: image)
    assert (clean.set_name, attacked.set_name) == ("test/clean/petals", "test/attacked/petals")
    assert clean.label == attacked.label != attacked.attack_label
    assert {clean.label, attacked.attack_label} <= set(part.candidates)
    assert np.asarray(clean.image).tolist() != np.asarray(attacked.image).tolist()


def test_they_change_the_fingerprint(task: TypographicTask) -> None:
    assert TypographicTask(DataConfig(train_pictures=4, eval_pictures=8)).fingerprint != task.fingerprint


def test_names(places: dict[str, Path]) -> None:
    assert open_test_set(f"rta-100:{places['photos']}", 0)[0] == "rta-100"
    assert open_test_set(f"mine=rta-100:{places['photos']}", 0)[0] == "mine"
    assert open_test_set(f"folder:{places['flowers']}", 0)[0] == "flowers"
    twice = (f"folder:{places['flowers']}",) * 2
    with pytest.raises(ConfigError, match="two sets named 'flowers'"):
        TypographicTask(DataConfig(test_sets=twice))
    with pytest.raises(ConfigError, match="its kind must be one of: rta-100, paint"):
        open_test_set("rta:/nowhere", 0)


def test_words_are_drawn_at_the_picture_size(places: dict[str, Path]) -> None:
    data = DataConfig(
        source=f"folder:{places['flowers']}", picture_size=40, train_pictures=4, eval_pictures=4
    )
    task = TypographicTask(data)
    rows = list(task.rows(task.parts["train"], 0, lambda image: image))
    assert {r.image.size for r in rows} == {(40, 40)}


def test_a_model_is_measured_on_them(clip: ClipModel, places: dict[str, Path]) -> None:
    settings = {"prompt": ModelConfig().prompt, "pictures": 12, "font_size": (0.12, 0.18)}
    (counts,), left_out = evaluate_model(clip, f"rta-100:{places['photos']}", **settings)  # type: ignore[arg-type]
    assert (counts.eval_set, counts.n_total, left_out) == ("test/attacked", 4, [])

    (clean, attacked), _ = evaluate_model(clip, "demo", **settings | {"pictures": 128})  # type: ignore[arg-type]
    assert clean.n_total == attacked.n_total == 128
    assert clean.accuracy > 0.9
    assert clean.n_fooled == 0
    assert attacked.n_fooled > 0.5 * 128, "the bundled model reads"


@pytest.mark.parametrize("kind", ["rta-100", "paint", "disentangling"])
def test_each_published_layout_counts_its_attacked_photos(kind: str, clip: ClipModel, tmp_path: Path) -> None:
    photos = rta(tmp_path / "photos")
    if kind == "disentangling":
        shown = {
            path.name: {"true object": label, "typographic attack label": word}
            for path in sorted(photos.iterdir())
            for label, word in [path.stem.removeprefix("label=").split("_text=")]
        }
        (photos / "annotations.json").write_text(json.dumps(shown))
        (photos / "classes.json").write_text(json.dumps(["cat", "dog", "hot dog", "guitar"]))
    (counts,), left_out = evaluate_model(
        clip, f"{kind}:{photos}", prompt="a photo of a {}", pictures=1, font_size=(0.1, 0.2)
    )
    assert (counts.eval_set, counts.n_total, left_out) == ("test/attacked", 4, [])


def test_pairwise_sets_are_judged_between_two_labels(clip: ClipModel, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    picture = (rta(tmp_path / "photos") / "label=cat_text=dog.png").read_bytes()
    rows = [
        {
            "image": {"bytes": picture, "path": None}, "id": f"{kind}_{i}", "object_label": label,
            "attack_word": word, "type": kind,
        }
        for i, (label, word) in enumerate([("cat", "dog"), ("dog", "cat"), ("car", "bus"), ("bus", "car")])
        for kind in ("SCAM", "NoSCAM", "SynthSCAM")
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scam.parquet")
    (clean, attacked), _ = evaluate_model(
        clip, f"scam:{tmp_path}", prompt="{}", pictures=1, font_size=(0.1, 0.2)
    )
    assert (attacked.n_correct, attacked.n_fooled, attacked.n_total) == (2, 2, 4), "one of the two, always"
    # Here the twin is the same picture and judged between the same two, but no word is written on it.
    assert (clean.eval_set, clean.n_correct, clean.n_fooled, clean.n_total) == ("test/clean", 2, 0, 4)
    for row in rows:
        row["image"] = {"bytes": picture if row["type"] == "SCAM" else b"no picture", "path": None}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scam.parquet")
    (alone,), left_out = evaluate_model(
        clip, f"scam:{tmp_path}", prompt="{}", pictures=1, font_size=(0.1, 0.2)
    )
    assert (alone, len(left_out)) == (attacked, 4), "of the twins nothing can be said"


def test_classes_of_test_sets_are_readable(clip: ClipModel, tmp_path: Path) -> None:
    ids = ("n01440764", "n01818515", "n02009912", "n03126707")  # a name is a prompt and the word of an attack
    for old, new in zip(sorted(folder_of_pictures(tmp_path / "ids", 4, 5).iterdir()), ids, strict=True):
        old.rename(old.with_name(new))
    task = TypographicTask(
        DataConfig(test_sets=(f"folder:{tmp_path / 'ids'}",), train_pictures=4, eval_pictures=4)
    )
    assert task.classes[128:] == ("tench", "macaw", "great egret", "construction crane")

    numbers = folder_of_pictures(tmp_path / "numbers", 4, 5)
    table = tmp_path / "numbers.csv"
    rows = [f"{p.parent.name[-1]},{p}" for p in sorted(numbers.rglob("*.*")) if p.is_file()]
    table.write_text("\n".join(["label,path", *rows]))
    settings = {"prompt": "{}", "pictures": 4, "font_size": (0.1, 0.2)}
    with pytest.raises(ConfigError, match="are numbers as 0, and nothing names them; give a file"):
        evaluate_model(clip, f"table:{table}", **settings)  # type: ignore[arg-type]
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\nhen")
    (clean, _), _ = evaluate_model(clip, f"table:{table}", **settings, class_names=str(names))  # type: ignore[arg-type]
    assert clean.n_total == 4
    with pytest.raises(ConfigError, match="the classes of rta-100 have names"):
        evaluate_model(clip, f"rta-100:{tmp_path}", **settings, class_names=str(names))  # type: ignore[arg-type]


def test_class_names_from_a_file(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "pictures", 4, 5)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({f"class_{i}": f"thing {i}" for i in range(4)}))
    data = DataConfig(source=f"folder:{root}", class_names=str(names), train_pictures=4, eval_pictures=4)
    assert TypographicTask(data).classes == tuple(f"thing {i}" for i in range(4))
