"""Everything that is bundled is named in LICENSES.md, and the bundle stays small."""

import pyarrow.parquet as pq
import pytest

from clippo.data.attack import FALLBACK_FONT, FONT_DIR, FONTS
from clippo.demo import HERE, PEOPLE_WEIGHTS, WEIGHTS
from clippo.demo.people import PEOPLE
from clippo.demo.scenes import PICTURES

TEXT = (HERE / "LICENSES.md").read_text(encoding="utf-8")
TABLE_ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if "|" in line
]
OWN = {".py", ".md"}  # our code and text, under the licence of the repository


def _pictures() -> list[dict[str, str]]:
    return pq.read_table(PICTURES, columns=["kind", "name", "source", "licence"]).to_pylist()


def test_every_font_is_named_with_its_licence_text() -> None:
    fonts = sorted(p.name for p in FONT_DIR.iterdir() if p.suffix != ".txt")
    assert {*fonts} == {FALLBACK_FONT, *(name for names in FONTS.values() for name in names)}
    rows = {row[0]: row for row in TABLE_ROWS}
    for name in fonts:
        licence_text = (FONT_DIR / rows[name][2]).read_text(encoding="utf-8")
        assert rows[name][2].startswith("LICENSE-DejaVu") or name in licence_text


def test_every_photo_is_named_with_its_source_and_terms() -> None:
    rows = {row[0]: row for row in TABLE_ROWS}
    photos = [p for p in _pictures() if p["kind"] == "photo"]
    assert photos
    for photo in photos:
        _, source, terms, _ = rows[photo["name"]]
        assert source == photo["source"]
        assert photo["licence"] in terms


def test_every_sprite_style_is_named_with_its_licence() -> None:
    rows = {row[0]: row for row in TABLE_ROWS}
    sprites = [p for p in _pictures() if p["kind"] == "sprite"]
    people = pq.read_table(PEOPLE, columns=["source", "licence"]).to_pylist()
    assert sprites
    assert people
    for style, licence in {(p["source"].split()[0], p["licence"]) for p in (*sprites, *people)}:
        assert licence in rows[f"`{style}`"][3]


def test_no_photo_is_named_that_is_not_bundled() -> None:
    start = TEXT.index("### Photos")
    section = TEXT[start : TEXT.index("\n## ", start)]
    named = {line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")}
    assert named - {"`name`", "---"} == {p["name"] for p in _pictures() if p["kind"] == "photo"}


def test_every_other_asset_is_named() -> None:
    assets = [p for p in HERE.iterdir() if p.is_file() and p.suffix not in OWN]
    assert assets
    missing = [p.name for p in assets if p.name not in TEXT]
    assert not missing, f"name them in {HERE.name}/LICENSES.md: {missing}"


@pytest.mark.parametrize("name", ["OFL.txt", "LICENSE-RobotoSlab.txt", "LICENSE-DejaVu.txt"])
def test_licence_texts_travel_with_the_fonts(name: str) -> None:
    assert len((FONT_DIR / name).read_text(encoding="utf-8")) > 3000


def test_the_bundle_is_at_most_12_megabytes() -> None:
    files = (WEIGHTS, PICTURES, PEOPLE_WEIGHTS, PEOPLE)
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    assert PEOPLE.stat().st_size <= 3_000_000
