"""What the site takes from the code: the command line, the packaged tasks, the public names, the reasons.

A page asks for it on a line of its own, `<!-- generate: NAME [ARGUMENT] -->`, NAME one of `GENERATORS`. Marks of the
tests in the first line of a code block (`norun: why`, `file: name`, `prints: that`) are taken off before a page is
rendered.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from mkdocs.utils import get_relative_url
from typer.models import ArgumentInfo, OptionInfo

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ehrseq"
PRINTED = re.compile(r"^```text prints:.*$", re.MULTILINE)
MARK = re.compile(r"^(\s*```\w+) (?:norun|file):.*$", re.MULTILINE)
INTERVAL = re.compile(r"(-?\d[\d.]*) \[(-?[\d.]+), (-?[\d.]+)\]")
REQUEST = re.compile(r"^<!-- generate: (\S+)(?: (\S+))? -->$", re.MULTILINE)

ELSEWHERE = "https://unpkg.com/iframe-worker/shim"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page before it is rendered: marks taken off, requests answered."""
    markdown = PRINTED.sub("```{.text .printed}", markdown)
    markdown = MARK.sub(r"\1", markdown)
    lines = [
        INTERVAL.sub(r"\1<br>[\2,&nbsp;\3]", line) if line.startswith("|") else line for line in markdown.split("\n")
    ]
    markdown = "\n".join(lines)  # in tables a number stands above its interval
    return REQUEST.sub(lambda match: GENERATORS[match[1]](*filter(None, match.groups()[1:])), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """A page after it is rendered: the one script that the theme would fetch from elsewhere lies beside it."""
    return output.replace(ELSEWHERE, get_relative_url("img/iframe-worker.js", page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for pages without a place, such as 404.html."""
    return output_content.replace(ELSEWHERE, "/img/iframe-worker.js")


# -- the command line ------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options, read from the functions that typer runs."""
    from ehrseq.cli.app import app

    return "\n\n".join(_command(info.name, info.callback) for info in app.registered_commands)


def _command(name: str | None, function: Callable[..., Any]) -> str:
    hints = get_type_hints(function, include_extras=True)
    arguments, options = [], []
    for parameter in inspect.signature(function).parameters.values():
        kind, *notes = get_args(hints[parameter.name])
        note = next(note for note in notes if isinstance(note, OptionInfo | ArgumentInfo))
        required = parameter.default is inspect.Parameter.empty
        if isinstance(note, ArgumentInfo):
            word = parameter.name.upper()
            arguments.append((word if required else f"[{word}]", _plain(note.help or "")))
        else:
            first = [note.default] if isinstance(note.default, str) else []  # typer.Option("--patients", "-n")
            names = [*first, *(note.param_decls or ())]
            if not any(name.startswith("--") for name in names):
                names.insert(0, f"--{parameter.name.replace('_', '-')}")
            default = "required" if required else _default(parameter.default)
            shown = ", ".join(f"`{option}`" for option in names)
            options.append((shown, _value(kind), default, _plain(note.help or "")))
    name = name or function.__name__.replace("_", "-")
    usage = " ".join(["ehrseq", name, *(word for word, _ in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"## ehrseq {name}", inspect.cleandoc(function.__doc__ or ""), f"```text\n{usage}\n```"]
    if arguments:
        parts.append(_table(("argument", "what it is"), [(f"`{word}`", text) for word, text in arguments]))
    if options:
        parts.append(_table(("option", "value", "default", "what it is"), options))
    return "\n\n".join(parts)


def _value(kind: Any) -> str:
    """What an option takes, in a word."""
    kinds = [part for part in get_args(kind) if part is not type(None)] if type(None) in get_args(kind) else [kind]
    kind = kinds[0]
    if get_origin(kind) is list:
        return f"{_value(get_args(kind)[0])}, repeat"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{member.value}`" for member in kind)
    return {int: "number", float: "number", Path: "path", str: "text", bool: ""}.get(kind, str(kind))


def _default(value: Any) -> str:
    if value is None or value is False or value == []:
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


# -- tasks, budgets, reasons ------------------------------------------------------------------------------------------


def packaged_tasks() -> str:
    """The tasks that come with the package, from their YAML files."""
    rows = []
    files = (PACKAGE / "tasks" / "definitions").glob("*.yaml")
    for path in sorted(files, key=lambda path: (path.stem.endswith("_paper"), path.stem)):
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


def recipes(family: str) -> str:
    """The named recipes of a family of models, ablations aside, from their files."""
    folder = PACKAGE / "training" / "recipes"
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))}

    def family_of(values: dict[str, Any]) -> str:
        return values["family"] if "family" in values else family_of(files[values["base"]])

    rows = [
        (f"`{name}`", _plain(values["description"])) for name, values in files.items() if family_of(values) == family
    ]
    return _table(("recipe", "what it is"), rows)


def _first_comment(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


# -- tables that map what sources write ------------------------------------------------------------------------------


def mapping(path: str) -> str:
    """A table of the code that maps spellings, one row for what they are mapped to.

    Args:
        path: Module and name of a dictionary, spelling -> meaning or meaning -> its spellings.
    """
    spellings: dict[str, list[str]] = {}
    for key, value in _value_of(path).items():
        if isinstance(value, tuple):
            spellings[key] = list(value)
        else:
            spellings.setdefault(value, []).append(" ".join(key) if isinstance(key, tuple) else key)
    return _table(("read as", "written"), [(f"`{name}`", _codes(texts)) for name, texts in spellings.items()])


def code_systems() -> str:
    """The short names of code systems with all their spellings."""
    known: dict[str, tuple[list[str], list[str]]] = {}
    for system, name in _value_of("ehrseq.data.fhir.systems.SYSTEM_NAMES").items():
        known.setdefault(name, ([], []))["://" not in system].append(system.removeprefix("urn:oid:"))
    rows = [(f"`{name}`", *map(_codes, spellings)) for name, spellings in known.items()]
    return _table(("short name", "address", "object identifier, name"), rows)


def preferred_systems() -> str:
    """Which of several codings is taken, for each kind of event."""
    fhir_codes = import_module("ehrseq.data.fhir.codes")
    orders = {**fhir_codes.PREFERRED_SYSTEMS, "any other, and after these": fhir_codes.ANY_STANDARD}
    rows = [(name if " " in name else f"`{name}`", _codes(systems)) for name, systems in orders.items()]
    return _table(("kind", "systems, best first"), rows)


def visit_codes() -> str:
    """Codes of MEDS datasets that are visits, births and deaths, from the map of codes to kinds."""
    rules = _value_of("ehrseq.tokenization.ehr_codes.DEFAULT_CODE_MAP")
    kinds = ("visit_", "birth", "death")
    return _table(
        ("codes that begin with", "kind"),
        [(f"`{pattern}`", f"`{kind}`") for pattern, kind in rules if kind.startswith(kinds)],
    )


def _value_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _codes(texts: Iterable[str]) -> str:
    return ", ".join(f"`{text}`" for text in texts)


# -- Python ----------------------------------------------------------------------------------------------------------


def docstring(module: str) -> str:
    """The text on top of a module: where a table or a rule is written once, in the code that keeps it."""
    return ast.get_docstring(ast.parse(_file_of(module).read_text(encoding="utf-8"))) or ""


def tables(module: str) -> str:
    """The tables in the text on top of a module."""
    blocks = docstring(module).split("\n\n")
    return "\n\n".join(block for block in blocks if block.startswith("|"))


def public_names(face: str) -> str:
    """A request to mkdocstrings for everything that a package defines and hands out; what it hands on is elsewhere."""
    paths = {path for path in _exports(face) if path.startswith(f"{face}.")}
    return "\n\n".join(f"::: {path}" for path in sorted(paths, key=lambda path: path.rpartition(".")[2]))


def _exports(face: str) -> Iterator[str]:
    tree = ast.parse(_file_of(face).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "_EXPORTS" for t in node.targets):
            exports = import_module(face).__dict__["_EXPORTS"]
            for name, module in exports.items():
                yield _definition(module if module.startswith("ehrseq.") else f"{face}.{module}", name)
            return
    for node in tree.body:
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and module.startswith("ehrseq.") and module != "ehrseq._lazy":
            yield from (_definition(module, alias.name) for alias in node.names)


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
    "recipes": recipes,
    "mapping": mapping,
    "code_systems": code_systems,
    "preferred_systems": preferred_systems,
    "visit_codes": visit_codes,
    "docstring": docstring,
    "tables": tables,
    "public_names": public_names,
}
