"""Prompt templates: one given in place, ready ones by name, or a file of them.

The 80 and 7 templates for ImageNet are those of open_clip (from the CLIP authors' notebooks). The others are
the hand-written ones of CoOp (Zhou et al., arXiv 2109.01134, ``trainers/zsclip.py``), one per data set.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from clippo.errors import ConfigError

READY_TEMPLATES: dict[str, str] = {
    "imagenet": "OPENAI_IMAGENET_TEMPLATES",
    "simple": "SIMPLE_IMAGENET_TEMPLATES",
    "imagenet_a": "a photo of a {}.",
    "imagenet_r": "a photo of a {}.",
    "imagenet_sketch": "a photo of a {}.",
    "imagenet_v2": "a photo of a {}.",
    "caltech101": "a photo of a {}.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": "a photo of a {}.",
    "flowers102": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "sun397": "a photo of a {}.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
}
"""A template, or the name of a tuple of them in open_clip, by the name of its data set."""

_SHORT_NAMES = {
    "pets": "oxford_pets",
    "oxford_iiit_pet": "oxford_pets",  # the name in torchvision
    "cars": "stanford_cars",
    "flowers": "flowers102",
    "oxford_flowers": "flowers102",
    "food": "food101",
    "aircraft": "fgvc_aircraft",
    "textures": "dtd",
}


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.casefold())


_NAMES = {_plain(name): name for name in READY_TEMPLATES}
_NAMES |= {_plain(short): name for short, name in _SHORT_NAMES.items()}


def templates_of(prompt: str) -> tuple[str, ...]:
    """The templates that a prompt stands for, each with one ``{}`` in the place of the class name.

    Args:
        prompt: a template, or several, a line each; a name of ``READY_TEMPLATES``, whatever its case,
            hyphens and underscores; or the path of a text file with a template a line, without counting blank
            lines and those that begin with ``#``. A name comes before a file of that name; ``./dtd`` is a
            file.

    Raises:
        ConfigError: none of these, a file that cannot be read, or a template without exactly one ``{}``.

    >>> templates_of("a photo of a {}")
    ('a photo of a {}',)
    >>> templates_of("Oxford-Pets")
    ('a photo of a {}, a type of pet.',)
    """
    if "{}" in prompt:
        return tuple(_checked(line, "the prompt") for line in prompt.split("\n"))
    if name := _NAMES.get(_plain(prompt)):
        return _ready(READY_TEMPLATES[name])
    path = os.path.expanduser(prompt)
    if os.path.isfile(path):  # unlike Path's, it is not upset by what cannot be a path
        return _of_file(Path(path))
    near = {_NAMES[n]: None for n in difflib.get_close_matches(_plain(prompt), _NAMES, n=3)}
    choice = f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(READY_TEMPLATES)}"
    raise ConfigError(
        f"prompt {prompt!r} is no file, no name of ready templates ({choice}), "
        "and as a template it lacks {} for the class name"
    )


def without_file(prompt: str) -> str:
    """The same prompt for other machines and later runs: instead of a file the templates that are in it.

    Raises:
        ConfigError: as `templates_of`.

    >>> without_file("pets"), without_file("a photo of a {}")
    ('pets', 'a photo of a {}')
    """
    templates = templates_of(prompt)
    return prompt if "{}" in prompt or _plain(prompt) in _NAMES else "\n".join(templates)


def _ready(value: str) -> tuple[str, ...]:
    if "{}" in value:
        return (value,)
    import open_clip  # takes seconds

    return tuple(template("{}") for template in getattr(open_clip, value))


def _of_file(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt file {path} cannot be read as UTF-8 text: {error}") from error
    templates = [
        _checked(line.strip(), f"line {number} of {path}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not templates:
        raise ConfigError(
            f"prompt file {path} has no template; write one a line, with {{}} for the class name"
        )
    return tuple(templates)


def _checked(template: str, where: str) -> str:
    rest = template.replace("{}", "", 1)
    if rest == template or "{" in rest or "}" in rest:
        raise ConfigError(
            f"{where} is {template!r}; it must have {{}} once, for the class name, and no other brace"
        )
    return template
