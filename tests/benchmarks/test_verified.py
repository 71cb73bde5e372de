"""Every test and program that docs/VERIFIED.md names exists, and goals that were missed are said."""

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks.common import RESULTS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/VERIFIED.md").read_text()
COMMANDS = re.findall(r"`((?:pytest|python|make) [^`]+)`", TEXT)


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


def test_every_promise_has_a_command() -> None:
    rows = [row for row in TEXT.splitlines() if row.startswith("| ") and not row.startswith("| promise")]
    assert len(rows) > 50
    assert [row for row in rows if not re.search(r"`(pytest|python -m|make) [^`]+` ?.*\|$", row)] == []


def test_goals_that_were_missed_are_said() -> None:
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    by_command = {found["command"].removesuffix(" --processes 1"): found["lines"] for found in results}
    with_goals = {c for c, lines in by_command.items() if any(line["goal"] for line in lines)}
    told = {command for command in by_command if f"`{command}`" in TEXT}
    assert {c for c in with_goals if " benchmarks.gender" not in c and "store" not in c} <= told
    for row in TEXT.splitlines():
        for command, lines in by_command.items():
            if f"`{command}`" in row:
                missed = any(line["met"] is False for line in lines)
                assert ("**not reached**" in row) == missed, row


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
