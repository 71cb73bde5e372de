"""Every test and program that docs/VERIFIED.md names exists, and goals that were missed are said."""

import ast
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import RESULTS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/VERIFIED.md").read_text()
ROWS = [row for row in TEXT.splitlines() if row.startswith("| ") and not row.startswith("| promise")]
COMMAND = re.compile(r"`((?:pytest|python|make) [^`]+)`")
COMMANDS = COMMAND.findall(TEXT)
MARK = "**not reached**"
HOW = {"--runs", "--rounds", "--processes"}
"""Flags that say how a benchmark is run, and not which case it measures."""


def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def missing_of(command: str) -> list[str]:
    """What a command names that does not exist."""
    program, *arguments = command.split()
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [target for target in arguments if target not in targets]
    if program == "python":
        assert arguments[0] == "-m", command
        path = ROOT / (arguments[1].replace(".", "/") + ".py")
        flags = [flag.removeprefix("--").replace("-", "_") for flag in arguments if flag.startswith("--")]
        if not path.is_file():
            return [arguments[1]]
        return [flag for flag in flags if not re.search(rf"\b{flag}\b", path.read_text())]
    missing = []
    for argument in arguments:
        path, _, test = argument.partition("::")
        if not (ROOT / path).is_file() or (test and test not in names_in(path)):
            missing.append(argument)
    return missing


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_what_it_names_exists(command: str) -> None:
    assert missing_of(command) == []


Case = tuple[str, frozenset[tuple[str, ...]]]


def case_of(command: str) -> Case:
    """The module of a benchmark and the flags that name the case; what is no flag's is left out."""
    program, *words = shlex.split(command)
    assert (program, words[0]) == ("python", "-m"), command
    flags: list[list[str]] = []
    for word in words[2:]:
        if word.startswith("--"):
            flags.append(word.split("="))
        elif flags:
            flags[-1].append(word)
    return words[1], frozenset(tuple(flag) for flag in flags if flag[0] not in HOW)


def wrong_marks(rows: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Results with goals that no row shows, and rows whose mark is not what their results say."""
    cases = {name: case_of(found["command"]) for name, found in results.items()}
    of_rows = {
        row: {case_of(command) for command in COMMAND.findall(row) if command.startswith("python -m")}
        for row in rows
    }
    shown = {case for of_row in of_rows.values() for case in of_row}
    with_goals = {name for name, r in results.items() if any(line["goal"] is not None for line in r["lines"])}
    wrong = [f"{name} has goals and no row" for name in sorted(with_goals) if cases[name] not in shown]
    for row, of_row in of_rows.items():
        lines = [line for name, found in results.items() if cases[name] in of_row for line in found["lines"]]
        missed = [line["what"] for line in lines if line["met"] is False]
        if (MARK in row) != bool(missed):
            wrong.append(f"missed are {missed}: {row}")
    return wrong


def test_every_promise_has_a_command() -> None:
    assert len(ROWS) > 150
    assert [row for row in ROWS if not re.search(r"`(pytest|python -m|make) [^`]+` ?.*\|$", row)] == []


def test_goals_that_were_missed_are_said() -> None:
    results = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert len(results) > 10
    assert wrong_marks(ROWS, results) == []


def line(met: bool | None) -> dict[str, Any]:
    return {"what": "a ratio", "goal": None if met is None else 2.0, "met": met}


MISSED = {"command": "python -m benchmarks.slow --pairs 64 --processes 1", "lines": [line(True), line(False)]}
REACHED = {"command": "python -m benchmarks.fast --runs 3", "lines": [line(True), line(None)]}
NO_GOAL = {"command": "python -m benchmarks.slow", "lines": [line(None)]}
RIGHT = (
    "| slow (**not reached**) | `python -m benchmarks.slow --pairs 64` |",
    "| fast | `python -m benchmarks.fast STORE...`, `python -m benchmarks.fast --runs 1` |",
    "| no goal | `python -m benchmarks.slow` |",
    "| tested | `pytest tests/benchmarks/test_verified.py` |",
)


@pytest.mark.parametrize(
    ("number", "row", "complaint"),
    [
        (0, "| slow | `python -m benchmarks.slow --pairs 64` |", "missed are ['a ratio']: | slow |"),
        (0, "| slow | `python -m benchmarks.slow --processes 2 --pairs=64` |", "missed are ['a ratio']"),
        (
            0,
            "| slow | `pytest tests/a.py`, `python -m benchmarks.slow --pairs 64` |",
            "missed are ['a ratio']",
        ),
        (0, "| slow | `python -m benchmarks.slow --pairs 16` |", "slow.json has goals and no row"),
        (0, "| slow | `python -m benchmarks.slow` |", "slow.json has goals and no row"),
        (1, "| fast | `pytest tests/a.py` |", "fast.json has goals and no row"),
        (1, "| fast (**not reached**) | `python -m benchmarks.fast` |", "missed are []"),
        (2, "| no goal (**not reached**) | `python -m benchmarks.slow` |", "missed are []"),
        (3, "| tested (**not reached**) | `pytest tests/a.py` |", "missed are []"),
    ],
)
def test_a_mark_that_is_wrong_is_found(number: int, row: str, complaint: str) -> None:
    results = {"slow.json": MISSED, "fast.json": REACHED, "plain.json": NO_GOAL}
    assert wrong_marks(RIGHT, results) == []
    (found,) = wrong_marks([*RIGHT[:number], row, *RIGHT[number + 1 :]], results)
    assert found.startswith(complaint)


def test_what_does_not_exist_is_found() -> None:
    assert missing_of("pytest tests/benchmarks/test_verified.py::test_what_it_names_exists") == []
    for nothing in (
        "pytest tests/benchmarks/test_verified.py::test_nothing",
        "pytest tests/nothing.py",
        "python -m benchmarks.nothing",
        "python -m benchmarks.step --nothing",
        "make nothing",
    ):
        assert len(missing_of(nothing)) == 1, nothing


def test_other_documents_lead_there() -> None:
    assert "docs/VERIFIED.md" in (ROOT / "README.md").read_text()
    assert "../docs/VERIFIED.md" in (ROOT / "benchmarks/README.md").read_text()
