"""Packages with lazy exports: every name loads, is listed, and is loaded once."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import ehrseq
from ehrseq._lazy import lazy_exports

ROOT = Path(ehrseq.__file__).parent
PACKAGES = [
    ".".join(["ehrseq", *file.parent.relative_to(ROOT).parts])
    for file in sorted(ROOT.rglob("__init__.py"))
    if "lazy_exports(" in file.read_text(encoding="utf-8")
]


def test_the_packages_are_found() -> None:
    assert {"ehrseq", "ehrseq.data", "ehrseq.data.fhir", "ehrseq.tasks", "ehrseq.training"} <= set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_loads_and_is_listed(name: str) -> None:
    package = import_module(name)
    for public in package.__all__:
        assert getattr(package, public) is getattr(package, public)
        assert public in dir(package)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing_here'"):
        _ = package.nothing_here


def test_a_name_is_loaded_when_it_is_asked_for_and_then_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    package, part = ModuleType("lazy_package"), ModuleType("lazy_package.part")
    part.value = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lazy_package", package)
    monkeypatch.setitem(sys.modules, "lazy_package.part", part)
    package.__getattr__, package.__dir__ = lazy_exports("lazy_package", {"value": "part"}, ["part"])  # type: ignore
    assert {"part", "value"} <= set(dir(package))
    assert "value" not in vars(package)
    assert package.value is part.value
    assert vars(package)["value"] is part.value
    assert package.part is part
