"""Drawing a word: pure, seeded, inside the picture, in any script that a bundled font has."""

import random
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from clippo.data.attack import (
    COLORS,
    DEFAULT_STYLE,
    FALLBACK_FONT,
    FONTS,
    WordStyle,
    _load_font,
    _needs_shaping,
    break_lines,
    draw_word,
    font_for,
    font_path,
    word_mask,
)
from clippo.demo import CLASSES
from clippo.errors import DataError

GRAY = (128, 128, 128)  # none of the eight colours, nor a mixture of two of them
ALL_FONTS = tuple(name for names in FONTS.values() for name in names)
SEEDS = range(40)

SCRIPTS = {
    "Greek": "άγκυρα",
    "Cyrillic": "якорь",
    "Arabic": "مرساة",
    "Hebrew": "עוגן",
    "accented Latin": "théière",
    "Vietnamese": "mỏ neo",
    "German": "Straßenbahn",
    "Armenian": "խարիսխ",
    "Georgian": "ღუზა",
}


def _plain(width: int = 96, height: int | None = None) -> Image.Image:
    return Image.new("RGB", (width, height or width), GRAY)


def _drawn(word: str, seed: int = 0, image: Image.Image | None = None, **kwargs: object) -> np.ndarray:
    return np.asarray(draw_word(image or _plain(), word, np.random.default_rng(seed), **kwargs))  # type: ignore[arg-type]


def _ink(attacked: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what differs from the plain picture; right and bottom are exclusive."""
    changed = (attacked != GRAY).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert rows.size, "nothing was drawn"
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _assert_inside(attacked: np.ndarray, style: WordStyle = DEFAULT_STYLE) -> None:
    height, width = attacked.shape[:2]
    margin = style.margin * min(width, height) - 0.5  # places are whole pixels, the margin need not be
    left, top, right, bottom = _ink(attacked)
    assert min(left, top, width - right, height - bottom) >= margin


# --- pure and seeded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "1"])
def test_input_is_not_changed_and_output_is_rgb(mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)).convert(
        mode
    )
    before = image.copy()
    attacked = draw_word(image, "anchor", np.random.default_rng(0))
    assert image == before
    assert (attacked.mode, attacked.size) == ("RGB", image.size)
    assert np.asarray(attacked).tolist() != np.asarray(before.convert("RGB")).tolist()


def test_transparency_survives_as_the_colour_beneath() -> None:
    image = Image.new("RGBA", (96, 96), (*GRAY, 0))
    assert (_drawn("anchor", image=image) == _drawn("anchor")).all()


@pytest.mark.parametrize("make", [np.random.default_rng, random.Random])
def test_same_seed_same_picture(make: type) -> None:
    first, again, other = (np.asarray(draw_word(_plain(), "anchor", make(seed))) for seed in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("word", ["ox", "hippopotamus", "traffic light", "مرساة"])
def test_every_word_takes_the_same_number_of_draws(word: str) -> None:
    # So that a class renamed does not move the attacks on all pictures after it.
    rng, plain = random.Random(3), random.Random(3)
    draw_word(_plain(), word, rng)
    for _ in range(6):
        plain.random()
    assert rng.random() == plain.random()


# --- inside the picture -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(32, 32), (64, 64), (96, 96), (224, 224), (512, 512), (32, 200), (200, 32), (512, 64), (61, 97)]
)
def test_text_lies_inside_the_margin(size: tuple[int, int]) -> None:
    for seed in SEEDS:
        word = CLASSES[seed * 3 % len(CLASSES)]
        _assert_inside(_drawn(word, seed, _plain(*size)))


@pytest.mark.parametrize("font", [*ALL_FONTS, FALLBACK_FONT])
def test_long_and_deep_words_of_every_font_lie_inside(font: str) -> None:
    style = WordStyle(fonts=(font,), font_size=(40 / 224, 80 / 224))
    for seed, word in enumerate(
        ["hippopotamus", "Ågypjqfl", "jellyfish jar", "one two three four five", "i"]
    ):
        _assert_inside(_drawn(word, seed, style=style), style)


@settings(max_examples=150, deadline=None)
@given(
    word=st.text("abcdefghijklmnopqrstuvwxyz ÄÖÜéñçğж", min_size=1, max_size=14).filter(str.strip),
    width=st.integers(96, 256),
    height=st.integers(96, 256),
    seed=st.integers(0, 2**32 - 1),
    mirrored=st.booleans(),
    margin=st.floats(0, 0.05),
)
def test_any_word_on_any_picture_lies_inside(
    word: str, width: int, height: int, seed: int, mirrored: bool, margin: float
) -> None:
    style = replace(DEFAULT_STYLE, margin=margin)
    _assert_inside(_drawn(word, seed, _plain(width, height), style=style, mirrored=mirrored), style)


@pytest.mark.parametrize("word", ["anchor", "Ågypjqfl", "traffic\nlight", *SCRIPTS.values()])
@pytest.mark.parametrize("size", [7.3, 20, 55.5])
def test_no_ink_is_cut_off(word: str, size: float) -> None:
    path = font_for(word, "Lora_700Bold.ttf")
    font = _load_font(path, size, _needs_shaping(word))
    canvas = Image.new("L", (1200, 600))
    ImageDraw.Draw(canvas).multiline_text(
        (300, 200), word, font=font, fill=255, stroke_width=1, stroke_fill=255, align="center"
    )
    left, top, right, bottom = canvas.getbbox() or (0, 0, 0, 0)
    height, width = word_mask(word, path, size).shape[:2]
    assert (width, height) == (pytest.approx(right - left, abs=1), pytest.approx(bottom - top, abs=1))


def test_sizes_follow_the_picture() -> None:
    heights = {}
    for side in (96, 384):
        boxes = [_ink(_drawn("ox", seed, _plain(side))) for seed in SEEDS]
        heights[side] = np.mean([bottom - top for _, top, _, bottom in boxes])
    assert heights[384] / heights[96] == pytest.approx(4, rel=0.2)


def test_places_are_spread_over_the_picture() -> None:
    boxes = np.array([_ink(_drawn("ox", seed, _plain(224))) for seed in range(200)])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / 224
    assert (centres.min(0) < 0.2).all()
    assert (centres.max(0) > 0.8).all()
    assert centres.mean(0) == pytest.approx([0.5, 0.5], abs=0.08)


# --- lines, colours, mirror -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "lines"),
    [
        ("anchor", "anchor"),
        ("  anchor ", "anchor"),
        ("traffic light", "traffic\nlight"),
        ("traffic\tlight", "traffic\nlight"),
        ("great white shark", "great\nwhite shark"),
        ("bow tie with dots", "bow tie\nwith dots"),
    ],
)
def test_names_of_several_words_are_broken_over_two_lines(word: str, lines: str) -> None:
    assert break_lines(word) == lines


def test_two_lines_are_drawn_one_below_the_other() -> None:
    style = WordStyle(fonts=("Roboto_700Bold.ttf",), font_size=(0.1, 0.1))
    one, two = (_ink(_drawn(word, 0, _plain(256), style=style)) for word in ("tree", "tree tree"))
    assert two[2] - two[0] == pytest.approx(one[2] - one[0], abs=2)
    assert two[3] - two[1] > 1.8 * (one[3] - one[1])


def test_fill_and_stroke_are_two_different_of_the_eight_colours() -> None:
    names = {color: name for name, color in COLORS.items()}
    assert len(names) == 8
    pairs = set()
    for seed in range(150):
        attacked = draw_word(_plain(512), "anchor", np.random.default_rng(seed))
        by_share = sorted(attacked.getcolors(512 * 512) or [], reverse=True)
        fill, stroke = (names[c] for _, c in by_share if c in names)  # the rest are mixtures at the edges
        pairs.add((fill, stroke))
    assert all(fill != stroke for fill, stroke in pairs)
    assert {fill for fill, _ in pairs} == {stroke for _, stroke in pairs} == set(COLORS)


@pytest.mark.parametrize("word", ["anchor", "traffic light", "עוגן"])
def test_mirrored_twin_has_the_same_ink_mirrored(word: str) -> None:
    for seed in range(5):
        plain, twin = _drawn(word, seed), _drawn(word, seed, mirrored=True)
        left, top, right, bottom = _ink(plain)
        assert _ink(twin) == (left, top, right, bottom)
        assert (twin[top:bottom, left:right] == plain[top:bottom, left:right][:, ::-1]).all()
        assert (twin != plain).any()


def test_splits_share_no_font() -> None:
    assert len({*ALL_FONTS, FALLBACK_FONT}) == sum(map(len, FONTS.values())) + 1


# --- names in any script ----------------------------------------------------------------------------------


@pytest.mark.parametrize("font", ALL_FONTS)
@pytest.mark.parametrize("word", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_names_in_many_scripts_are_drawn(word: str, font: str) -> None:
    _assert_inside(_drawn(word, style=WordStyle(fonts=(font,))))


@pytest.mark.parametrize("script", ["Greek", "Arabic", "Hebrew", "Armenian", "Georgian"])
def test_the_fallback_is_used_where_the_font_lacks_the_letters(script: str) -> None:
    assert font_for(SCRIPTS[script], "Lato_700Bold.ttf") == font_path(FALLBACK_FONT)
    assert font_for("anchor", "Lato_700Bold.ttf") == font_path("Lato_700Bold.ttf")


def test_arabic_letters_join_and_hebrew_runs_from_right_to_left() -> None:
    path = font_path(FALLBACK_FONT)
    joined = word_mask("ببب", path, 40)[..., 1]
    assert joined.shape[1] < 2.5 * word_mask("ب", path, 40).shape[1]
    # Aleph and vav are easily told apart: the first letter in reading order must stand on the right.
    pair, aleph = word_mask("או", path, 40)[..., 1], word_mask("א", path, 40)[..., 1]
    ink = pair.any(0)
    right_letter = pair[:, np.flatnonzero(~ink)[-1] + 1 :] if not ink.all() else pair
    assert right_letter.shape[1] == pytest.approx(aleph.shape[1], abs=2)


@pytest.mark.parametrize("word", ["théière", "Ångström"])
def test_composed_and_decomposed_accents_are_drawn_alike(word: str) -> None:
    composed, decomposed = (_drawn(unicodedata.normalize(form, word), 1) for form in ("NFC", "NFD"))
    assert (composed == decomposed).all()


@pytest.mark.parametrize(
    ("word", "missing"), [("錨", "錨"), ("いかり", "い"), ("닻", "닻"), ("octopus 🐙", "🐙"), ("ลูกโป่ง", "ล")]
)
def test_characters_without_a_font_are_refused_by_name(word: str, missing: str) -> None:
    with pytest.raises(DataError) as refused:
        _drawn(word)
    message = str(refused.value)
    assert "\n" not in message
    assert repr(word) in message
    assert missing in message.partition(": ")[2]
    assert "rename the class" in message


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["", " ", "\t\n"])
def test_an_empty_word_is_refused(word: str) -> None:
    with pytest.raises(DataError, match="empty word; every class needs a name"):
        _drawn(word)


@pytest.mark.parametrize("word", ["\u200b", "\u2800"])
def test_a_word_without_ink_is_refused(word: str) -> None:
    with pytest.raises(DataError, match="cannot draw"):
        _drawn(word)


def test_an_unknown_font_is_refused_with_the_bundled_ones() -> None:
    with pytest.raises(DataError, match=r"'Comic\.ttf' is neither a file nor bundled") as refused:
        _drawn("anchor", style=WordStyle(fonts=("Comic.ttf",)))
    for name in (*ALL_FONTS, FALLBACK_FONT):
        assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_font_may_be_a_path() -> None:
    path = str(font_path("Karla_700Bold.ttf"))
    by_path, by_name = (
        _drawn("anchor", style=WordStyle(fonts=(font,))) for font in (path, "Karla_700Bold.ttf")
    )
    assert (by_path == by_name).all()


def test_no_class_of_the_demo_needs_the_fallback() -> None:
    for name in ALL_FONTS:
        assert all(font_for(word, name) == font_path(name) for word in CLASSES)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (300, 4)])
def test_a_picture_too_small_to_write_on_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=rf"picture of {size[0]} x {size[1]} pixels"):
        _drawn("hippopotamus", image=_plain(*size))
