"""Calls that wait for the import of another package: `import ehrseq` does not load transformers, yet is known to it.

A finder stands first on `sys.meta_path` and finds nothing itself: it lets the others find a watched module and calls
back right behind that module's own code. Modules that define a registered class are watched beside transformers:
where two threads import transformers and such a module at the same time, each waits for the other, and Python then
hands one of them a module that is not finished. What could not be registered by the one is registered by the other.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Watch:
    """Calls back behind the import of some modules."""

    def __init__(self, modules: frozenset[str], call: Callable[[], None]) -> None:
        self._modules = modules
        self._call = call
        self._looking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that calls back; None for what is not watched."""
        if name not in self._modules or getattr(self._looking, "name", None) == name:
            return None
        self._looking.name = name
        try:
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._looking.name = None
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            self._call()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def call_when_imported(package: str, others: Iterable[str], call: Callable[[], None]) -> None:
    """Call back once a package is imported: now, where it is, and behind each later import of it or of the others.

    Args:
        package: Name of the package that the call needs.
        others: Modules whose import may end behind that of the package; the call is made again then.
        call: Must do no harm when it is made twice, or by two threads at once. What it imports itself does not call it.
    """
    calling = threading.local()

    def call_with_package() -> None:
        if package in sys.modules and not getattr(calling, "now", False):
            calling.now = True
            try:
                call()
            finally:
                calling.now = False

    sys.meta_path.insert(0, _Watch(frozenset([package, *others]), call_with_package))
    if package in sys.modules:
        importlib.import_module(package)  # waits, where another thread is importing it right now
        call_with_package()
