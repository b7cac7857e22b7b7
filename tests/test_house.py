"""The plan of the house: who may import whom. Every import is read, those inside functions too.

A room is a folder of `ehrseq/`. It stands on a floor and may import rooms of lower floors, of its own floor only those
named beside it, and itself. An `__init__.py` that only hands names on is a face: who imports a name from it imports
the module that defines the name.

Three rooms travel with a checkpoint (`modeling`, `tokenization`, `pipelines`) and stand alone without the rest of the
package. What they can do only with it, they reach through a guarded import (`try: ... except ImportError`).
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeGuard

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ehrseq"
LOOSE = {"__init__", "version", "_lazy", "_on_import", "_html"}
MOST_LINES = 600

FLOORS: tuple[tuple[str, ...], ...] = (
    ("work", "kernels", "tokenization", "modeling", "pipelines"),
    ("data",),
    ("tasks", "encode"),
    ("prepare", "batches", "evaluation", "audit", "stats", "calibration"),
    ("baselines", "hub"),
    ("training", "prediction", "interpretability", "forecasting", "representations", "monitoring"),
    ("benchmark", "demo", "serving"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
BESIDE = {"encode": {"tasks"}}
"""Rooms of its own floor that a room may import: a tokenizer gets a token for every task that has labels."""
GUARDED = {
    "modeling": {"kernels"},
    "tokenization": {"encode"},
    "pipelines": {"data", "forecasting", "interpretability"},
}
"""What a travelling room reaches by a guarded import, and only so."""
WORDS_OF_CODES = {"ehr_codes", "ehr_vocabulary", "triplet_stays"}
"""What `data` may take of `tokenization`."""


@dataclass(frozen=True)
class Arrow:
    """One import.

    Attributes:
        source: Module that imports, dotted, without the package's name.
        target: Module that defines what is imported.
        line: Where.
        guarded: Whether it stands in a `try` that catches ImportError.
        typing: Whether only type checkers run it.
    """

    source: str
    target: str
    line: int
    guarded: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} -> {self.target}"


def room_of(module: str) -> str:
    return module.split(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, dotted, without the package's name."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"] = path
    return named


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def handed_on(face: str) -> dict[str, str]:
    """Name -> module that defines it, of a face's table `_EXPORTS` and of its own imports."""
    names: dict[str, str] = {}
    for node in ast.walk(tree_of(face)):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_EXPORTS" for t in node.targets):
            if isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                        whole = str(value.value)
                        prefix = "" if face == "__init__" else f"{face}."
                        names[str(key.value)] = whole.removeprefix("ehrseq.") if "ehrseq." in whole else prefix + whole
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ehrseq."):
            names |= {alias.asname or alias.name: node.module.removeprefix("ehrseq.") for alias in node.names}
    return names


def is_face(module: str) -> bool:
    return modules()[module].name == "__init__.py"


def defining_module(module: str, name: str) -> str:
    """The module that a name comes from, through however many faces."""
    inner = f"{module}.{name}" if module != "__init__" else name
    if inner in modules():
        return inner
    if module in modules() and is_face(module) and name in handed_on(module):
        return defining_module(handed_on(module)[name], name)
    return module


def imports_in(module: str) -> Iterator[tuple[str, int, bool, bool]]:
    """(imported module, line, guarded, typing) of every import of the package in a module."""
    package = module if is_face(module) else module.rpartition(".")[0]

    def targets(node: ast.stmt) -> Iterator[str]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("ehrseq."):
                    yield alias.name.removeprefix("ehrseq.")
        elif isinstance(node, ast.ImportFrom):
            whole = node.module or ""
            if node.level:
                base = package.split(".") if package else []
                above = base[: len(base) - node.level + 1]
                whole = ".".join([*above, whole] if whole else above)
            elif whole == "ehrseq":
                whole = "__init__"
            elif whole.startswith("ehrseq."):
                whole = whole.removeprefix("ehrseq.")
            else:
                return
            for alias in node.names:
                yield defining_module(whole, alias.name)

    def visit(node: ast.AST, guarded: bool, typing: bool) -> Iterator[tuple[str, int, bool, bool]]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets(node):
                yield target, node.lineno, guarded, typing
            return
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    inside = isinstance(node, ast.Try) and name == "body" and catches_import_error(node)
                    only_types = isinstance(node, ast.If) and name == "body" and "TYPE_CHECKING" in ast.dump(node.test)
                    yield from visit(child, guarded or inside, typing or only_types)

    yield from visit(tree_of(module), False, False)


def catches_import_error(node: ast.Try) -> bool:
    return any(handler.type is not None and "ImportError" in ast.dump(handler.type) for handler in node.handlers)


@cache
def arrows() -> tuple[Arrow, ...]:
    """Every import between two modules of the package; those of faces and of loose modules are none."""
    return tuple(
        Arrow(module, target, line, guarded, typing)
        for module in modules()
        if not is_face(module) and module not in LOOSE
        for target, line, guarded, typing in imports_in(module)
        if target != module and target not in LOOSE
    )


def complaint(arrow: Arrow) -> str | None:
    """What is wrong with an import, None where nothing is."""
    source, target = room_of(arrow.source), room_of(arrow.target)
    if source == target:
        return None
    if source in GUARDED:
        if target not in GUARDED[source]:
            return "a travelling room stands alone"
        return None if arrow.guarded or arrow.typing else "a travelling room reaches this by a guarded import only"
    if FLOOR[source] == 0:
        return "the ground imports nothing"
    if FLOOR[target] > FLOOR[source]:
        return "an arrow that runs up"
    if FLOOR[target] == FLOOR[source] and target not in BESIDE.get(source, set()):
        return "a neighbour on the same floor"
    if source == "data" and target == "tokenization" and arrow.target.split(".")[1] not in WORDS_OF_CODES:
        return "data takes the words of codes only"
    return None


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for module in modules()} - LOOSE
    assert rooms <= set(FLOOR), f"name the floor of {sorted(rooms - set(FLOOR))} in FLOORS"


def test_no_module_lies_loose() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == LOOSE, "a module belongs into a room"


def test_no_arrow_runs_up() -> None:
    wrong = [f"{arrow}: {why}" for arrow in arrows() if (why := complaint(arrow))]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_command() -> None:
    assert not [str(arrow) for arrow in arrows() if arrow.target.startswith("cli.") and room_of(arrow.source) != "cli"]


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for arrow in arrows():
        if not arrow.typing:
            graph[arrow.source].add(arrow.target)
    state: dict[str, int] = {}
    circles: list[str] = []

    def walk(module: str, path: list[str]) -> None:
        state[module] = 1
        for following in sorted(graph[module]):
            if state.get(following) == 1:
                circles.append(" -> ".join([*path[path.index(following) :], following]))
            elif following not in state:
                walk(following, [*path, following])
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            walk(module, [module])
    assert not circles, "\n".join(circles)


def test_no_public_name_stands_twice() -> None:
    places = defaultdict(list)
    for module in modules():
        for node in tree_of(module).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(where)}" for name, where in twice.items())


def test_no_public_constant_stands_twice() -> None:
    """Of two constants of one name, sooner or later one is read for the other."""
    places = defaultdict(set)
    for module in modules():
        for node in tree_of(module).body:
            assigned = node.targets if isinstance(node, ast.Assign) else [node.target] if has_value(node) else []
            names = [name for target in assigned for name in ast.walk(target) if isinstance(name, ast.Name)]
            for name in names:
                if name.id.isupper() and not name.id.startswith("_"):
                    places[name.id].add(module)
    twice = {name: sorted(where) for name, where in places.items() if len(where) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(where)}" for name, where in twice.items())


def has_value(node: ast.stmt) -> TypeGuard[ast.AnnAssign]:
    return isinstance(node, ast.AnnAssign) and node.value is not None


@pytest.mark.parametrize("module", modules())
def test_a_file_is_one_idea_of_readable_length(module: str) -> None:
    assert len(modules()[module].read_text(encoding="utf-8").splitlines()) <= MOST_LINES
