"""The list of slow tests in CONTRIBUTING.md is what is marked so."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def marked() -> set[tuple[str, str]]:
    """(file, name) of every function and class that is `slow`, or has slow parameters; no name: the whole file."""
    found = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        text = file.read_text()
        for statement in ast.parse(text).body if "mark.slow" in text else ():
            if any(isinstance(node, ast.Attribute) and node.attr == "slow" for node in ast.walk(statement)):
                found.add((str(file.relative_to(ROOT)), getattr(statement, "name", "")))
    return found


def listed() -> set[tuple[str, str]]:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("### Slow tests")[1].split("\n## ")[0]
    found = set()
    for line in section.splitlines():
        if line.startswith("| `"):
            test, why = line.strip("| ").split(" | ")
            file, *names = re.findall(r"`([^`]+)`", test)
            assert len(why.split()) > 1, line
            found |= {(file, name) for name in names or [""]}
    return found


def test_the_list_of_slow_tests_is_what_is_marked_slow() -> None:
    assert marked() - listed() == set(), "marked slow: say why in CONTRIBUTING.md"
    assert listed() - marked() == set(), "no longer marked slow: take it out of CONTRIBUTING.md"
