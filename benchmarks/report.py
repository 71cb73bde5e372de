"""Writes the results section of benchmarks/README.md from the JSON in benchmarks/results.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Spread, program

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results: python -m benchmarks.report -->", "<!-- end of results -->"
PROGRAMS = (
    "step-16",
    "step-64",
    "loop",
    "workers",
    "sweep",
    "growth",
    "store",
    "compile",
    "search",
    "search-driver",
    "scale",
    "gender",
)


def section(results: Path) -> str:
    """The results as Markdown, one table a program; what was not run yet is said."""
    parts = []
    for name in PROGRAMS:
        path = results / f"{name}.json"
        if not path.exists():
            parts.append(f"### {name}\n\nNot run yet.\n")
            continue
        found: dict[str, Any] = json.loads(path.read_text())
        rows = "\n".join(_row(line) for line in found["lines"])
        before, after = found["load_before_and_after"]
        about = (
            f"`{found['command']}`, {found['date']}, commit {found['commit']}, {_machine(found['machine'])}"
        )
        if sweeps := [sweep["run"] for sweep in found.get("sweeps", ())]:  # read from stores, not all at once
            about = f"Rows of the stores {', '.join(sweeps)}; last written by {about}"
        parts.append(
            f"### {name}\n\n{about}; load average {before} before and {after} after.\n\n"
            f"| what | median (quartiles) | n | goal | met |\n|---|---|---|---|---|\n{rows}\n"
        )
        if (picture := results / f"{name}.png").exists():
            parts.append(f"![{name}](results/{picture.name})\n")
    return "\n".join(parts)


def _row(line: dict[str, Any]) -> str:
    spread = Spread(line["median"], line["quartiles"][0], line["quartiles"][1], line["n"])
    goal = "" if line["goal"] is None else f"{line['goal_is']} {line['goal']:g}"
    met = {True: "yes", False: "**no**", None: ""}[line["met"]]
    return f"| {line['what']} | {spread} {line['unit']} | {line['n']} | {goal} | {met} |"


def _machine(machine: dict[str, Any]) -> str:
    kind = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    bf16 = "with" if machine["native_bf16"] else "without"
    return f"{kind} {bf16} native bfloat16, {machine['torch_threads']} threads, torch {machine['torch']}"


def with_section(readme: str, text: str) -> str:
    """The README with its results section replaced."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Replaces the results section of the README."""
    README.write_text(with_section(README.read_text(), section(RESULTS)))
    print(f"{README.name} now shows what benchmarks/results holds")


if __name__ == "__main__":
    program(main, __doc__)
