"""Packages whose attributes are loaded when they are first used (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, str], subpackages: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package's `__init__.py`.

    Args:
        package: The package's `__name__`.
        exports: Public name -> module of the package that defines it, or the whole name of one elsewhere (`ehrseq...`).
        subpackages: Modules that are attributes themselves, imported when asked for.

    Returns:
        The two functions; what was loaded once is kept in the package's namespace.
    """
    modules = frozenset(subpackages)

    def load(name: str) -> Any:
        if name in exports:
            module = exports[name]
            value = getattr(import_module(module if module.startswith("ehrseq.") else f"{package}.{module}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *exports, *modules})

    return load, names
