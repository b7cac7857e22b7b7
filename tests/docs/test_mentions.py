"""What the changelog and the security page name is there: modules, their names, paths, commands."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import typer.main

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["CHANGELOG.md", "SECURITY.md"]
MODULE = re.compile(r"ehrseq(\.\w+)+(\.\*)?")
PYTHON_M = re.compile(r"python -m ([\w.]+)")


def mentions(page: str) -> list[str]:
    """Words in code marks: not those of what was removed or mended, nor of the column of what was before."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^### (?:Removed|Fixed)\n.*?(?=^##|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
    return re.findall(r"`([^`]+)`", text)


def commands() -> set[str]:
    from ehrseq.cli.app import app

    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def missing(mention: str) -> str | None:
    """What of a mention is not there, None where nothing is missing or it names nothing of ours."""
    words = mention.split()
    if words[0] == "ehrseq":
        return None if len(words) == 1 or words[1].startswith("-") or words[1] in commands() else f"command {words[1]}"
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return None if words[1] in targets else f"make {words[1]}"
    if called := PYTHON_M.match(mention):
        return _module(re.sub(r"\.(bench_)?X$", "", called[1]))
    if MODULE.fullmatch(mention):
        return _module(mention.removesuffix(".*"))
    if "/" in mention and (ROOT / mention.split("/")[0]).exists():
        return None if (ROOT / mention).exists() else f"path {mention}"
    return None


def _module(dotted: str) -> str | None:
    """A module, or a public name of one."""
    head, _, name = dotted.rpartition(".")
    try:
        import_module(dotted)
    except ModuleNotFoundError:
        try:
            return None if hasattr(import_module(head), name) else f"name {dotted}"
        except ModuleNotFoundError:
            return f"module {dotted}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    assert [gone for mention in mentions(page) if (gone := missing(mention))] == []


def test_the_changelog_is_read() -> None:
    named = mentions("CHANGELOG.md")
    assert {"ehrseq.work.files", "ehrseq/training/recipes", "examples/meds_dev/"} <= {
        word.strip("()") for word in named
    }
    assert "ehrseq.predict" not in named


@pytest.mark.parametrize(
    ("mention", "gone"),
    [
        ("ehrseq.tasks.nothing", "name ehrseq.tasks.nothing"),
        ("ehrseq.nowhere.nothing", "module ehrseq.nowhere.nothing"),
        ("ehrseq nothing --out x", "command nothing"),
        ("make nothing", "make nothing"),
        ("docs/nothing.md", "path docs/nothing.md"),
        ("python -m benchmarks.nowhere.bench_X", "name benchmarks.nowhere"),
        ("python -m benchmarks.speed.bench_X", None),
        ("ehrseq.tasks.load_task", None),
        ("owner/name", None),
    ],
)
def test_what_is_missing_is_found(mention: str, gone: str | None) -> None:
    assert missing(mention) == gone
