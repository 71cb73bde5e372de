"""Prompts: templates in place, by name, and from a file."""

import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clippo.config import ModelConfig
from clippo.data.prompts import READY_TEMPLATES, templates_of, without_file
from clippo.errors import ConfigError

# What a class name or a line may hold, braces apart.
WORDS = st.text(st.characters(exclude_characters="{}\n", exclude_categories=["Cs"]), max_size=30)


@given(WORDS, WORDS)
def test_a_template_stands_for_itself(before: str, after: str) -> None:
    assert templates_of(before + "{}" + after) == (before + "{}" + after,)


@pytest.mark.parametrize("name", READY_TEMPLATES)
def test_every_ready_template_takes_exactly_one_class_name(name: str) -> None:
    templates = templates_of(name)
    assert len(templates) == len(set(templates)) > 0
    for template in templates:
        assert template.count("{}") == 1
        assert "king penguin" in template.format("king penguin")


def test_imagenet_has_the_80_templates_and_simple_the_7_of_open_clip() -> None:
    full, simple = templates_of("imagenet"), templates_of("simple")
    assert (len(full), len(simple)) == (80, 7)
    assert set(simple) < set(full)
    by_open_clip = [template("axolotl") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [template.format("axolotl") for template in full] == by_open_clip


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("oxford_pets", "a photo of a {}, a type of pet."),
        ("Oxford-Pets", "a photo of a {}, a type of pet."),
        ("OxfordIIITPet", "a photo of a {}, a type of pet."),
        ("pets", "a photo of a {}, a type of pet."),
        ("FGVCAircraft", "a photo of a {}, a type of aircraft."),
        ("Flowers102", "a photo of a {}, a type of flower."),
        ("imagenet-r", "a photo of a {}."),
        ("DTD", "{} texture."),
    ],
)
def test_names_are_found_in_any_spelling(name: str, template: str) -> None:
    assert templates_of(name) == (template,)


def test_open_clip_is_not_imported_before_it_is_needed() -> None:
    program = (
        "import sys; from clippo.data.prompts import templates_of; templates_of('oxford_pets'); "
        "sys.exit('open_clip' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_default_prompt_is_a_template() -> None:
    assert templates_of(ModelConfig().prompt) == (ModelConfig().prompt,)


def test_a_file_has_a_template_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(
        "\ufeff# two of them\r\n\r\n  a photo of a {}  \r\n   # and\r\nein Foto: größte {}\r\n".encode()
    )
    assert templates_of(str(file)) == ("a photo of a {}", "ein Foto: größte {}")


def test_a_name_comes_before_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dtd").write_text("my {}\n")
    assert templates_of("dtd") == ("{} texture.",)
    assert templates_of("./dtd") == ("my {}",)
    assert (without_file("dtd"), without_file("./dtd"), without_file("a {}\nb {}")) == (
        "dtd",
        "my {}",
        "a {}\nb {}",
    )
    with pytest.raises(ConfigError, match="and no other brace"):
        without_file("a {} of {}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a {}\na photo of a dog\n", "line 2 of .* is 'a photo of a dog'; it must have {} once"),
        (b"a {} and a {}\n", "line 1 of"),
        (b"# nothing\n\n", "has no template; write one a line"),
        (b"\xff\xfea {}\n", "cannot be read as UTF-8 text"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        templates_of(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["a {} and a {}", "a {name} of {}", "{}}", "{{}}"])
def test_other_braces_are_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"it must have \{\} once"):
        templates_of(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("imagnet", r"'imagnet' is no file, no name of ready templates \(did you mean imagenet"),
        ("oxford_pet", r"did you mean oxford_pets"),
        ("aircrafts", r"did you mean fgvc_aircraft\?"),
        ("a photo of a dog", r"one of: imagenet, simple, .*lacks {} for the class name"),
        ("", r"one of: imagenet"),
        ("prompts/none.txt", r"is no file"),
        ("x" * 5000, r"is no file"),
        ("a\0b", r"is no file"),
        ("~nobody-of-this-name/prompts.txt", r"is no file"),
    ],
)
def test_anything_else_is_refused_with_near_names(prompt: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        templates_of(prompt)


def test_a_folder_is_no_file_of_templates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no file"):
        templates_of(str(tmp_path))
