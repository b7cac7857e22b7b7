"""What the site takes from the code: the command line, the packaged tasks, the public names, the reasons.

A page asks for it on a line of its own, `<!-- generate: NAME [ARGUMENT] -->`, NAME one of `GENERATORS`. Marks of the
tests in the first line of a code block (`norun: why`, `file: name`) are taken off before a page is rendered.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ehrseq"
MARK = re.compile(r"^(\s*```\w+) (?:norun|file):.*$", re.MULTILINE)
REQUEST = re.compile(r"^<!-- generate: (\S+)(?: (\S+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page before it is rendered: marks taken off, requests answered."""
    markdown = MARK.sub(r"\1", markdown)
    return REQUEST.sub(lambda match: GENERATORS[match[1]](*filter(None, match.groups()[1:])), markdown)


# -- the command line ------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options, from the typer application itself."""
    import typer.main

    from ehrseq.cli.app import app

    group = typer.main.get_command(app)
    context = group.make_context("ehrseq", [], resilient_parsing=True)
    parts = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(["ehrseq", name, *(_argument(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
        parts += [f"## ehrseq {name}", _plain(command.help or ""), f"```text\n{usage}\n```"]
        if arguments:
            rows = [(f"`{_argument(p)}`", _plain(getattr(p, "help", "") or "")) for p in arguments]
            parts.append(_table(("argument", "what it is"), rows))
        if options:
            parts.append(_table(("option", "value", "default", "what it is"), [_option(p) for p in options]))
    return "\n\n".join(parts)


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).upper()
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    choices = getattr(parameter.type, "choices", None)
    value = " or ".join(f"`{getattr(c, 'value', c)}`" for c in choices) if choices else _type(parameter)
    default = parameter.default() if callable(parameter.default) else parameter.default
    default = getattr(default, "value", default)
    if parameter.required:
        shown = "required"
    else:
        shown = "" if default in (None, False, (), []) or parameter.is_flag else f"`{default}`"
    repeat = " (repeat)" if parameter.multiple else ""
    return names, value + repeat, shown, _plain(parameter.help or "")


def _type(parameter: Any) -> str:
    if parameter.is_flag:
        return ""
    words = {"integer": "number", "integer range": "number", "float": "number", "path": "path", "text": "text"}
    return words.get(parameter.type.name, parameter.type.name)


# -- tasks, budgets, reasons ------------------------------------------------------------------------------------------


def packaged_tasks() -> str:
    """The tasks that come with the package, from their YAML files."""
    rows = []
    for path in sorted((PACKAGE / "tasks" / "definitions").glob("*.yaml")):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows.append((f"`{task['name']}`", _plain(task["definition"]), _plain(task["positive_label"])))
    return _table(("task", "what is asked, when and of whom", "label 1"), rows)


def reasons() -> str:
    """Why an admission has no label, from the labelling engine."""
    table = import_module("ehrseq.tasks.labelling").REASONS
    return _table(("reason", "what it means"), [(f"`{name}`", _plain(text)) for name, text in table.items()])


def budgets() -> str:
    """What the named budgets of `ehrseq benchmark` allow, from the first lines of their files."""
    rows = []
    for path in sorted((PACKAGE / "benchmark" / "budgets").glob("*.yaml")):
        rows.append((f"`{path.stem}`", _plain(_first_comment(path.read_text(encoding="utf-8")))))
    return _table(("budget", "what it is"), rows)


def _first_comment(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


# -- Python ----------------------------------------------------------------------------------------------------------


def docstring(module: str) -> str:
    """The text on top of a module: where a table or a rule is written once, in the code that keeps it."""
    return ast.get_docstring(ast.parse(_file_of(module).read_text(encoding="utf-8"))) or ""


def tables(module: str) -> str:
    """The tables in the text on top of a module."""
    blocks = docstring(module).split("\n\n")
    return "\n\n".join(block for block in blocks if block.startswith("|"))


def public_names(face: str) -> str:
    """A request to mkdocstrings for everything that a package hands out, each from the module that defines it."""
    return "\n\n".join(f"::: {path}" for path in sorted(_exports(face), key=lambda path: path.rpartition(".")[2]))


def _exports(face: str) -> Iterator[str]:
    tree = ast.parse(_file_of(face).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "_EXPORTS" for t in node.targets):
            exports = import_module(face).__dict__["_EXPORTS"]
            for name, module in exports.items():
                yield _definition(module if module.startswith("ehrseq.") else f"{face}.{module}", name)
            return
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ehrseq.") and "_lazy" not in node.module:
            yield from (_definition(node.module, alias.name) for alias in node.names)


def _definition(module: str, name: str) -> str:
    """`module.name`, or where that is a package that hands the name on, the module that it comes from."""
    path = _file_of(module)
    if path.name == "__init__.py":
        for exported in _exports(module):
            if exported.rpartition(".")[2] == name:
                return exported
    return f"{module}.{name}"


def _file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


# -- Markdown --------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text on one line, safe in a table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


GENERATORS: dict[str, Callable[..., str]] = {
    "command_line": command_line,
    "packaged_tasks": packaged_tasks,
    "reasons": reasons,
    "budgets": budgets,
    "docstring": docstring,
    "tables": tables,
    "public_names": public_names,
}
