"""Calls that wait for the import of other modules: `import ehrseq` does not load transformers, yet is known to it.

A finder stands first on `sys.meta_path` and finds nothing itself: it lets the others find a module, and calls behind
that module's own code. It leaves once every module that it waits for has been imported.

A call is made while Python holds the lock of the module's import. So it must import nothing: what it needs might be
under way in another thread, which waits for this very module in turn, and Python ends such a circle with a module that
is not finished or with an error.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import _bootstrap
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Call = Callable[[ModuleType], None]

# Python's own tool for modules that several threads import: not public, so a later Python may lack it.
_wait_for_import: Callable[[str], None] = getattr(_bootstrap, "_lock_unlock_module", lambda name: None)


class CallsAfterImport(MetaPathFinder):
    """Makes one call behind the import of each of some modules.

    Args:
        calls: Name of a module -> what to call with it, once. It imports nothing.
    """

    def __init__(self, calls: Mapping[str, Call]) -> None:
        self._calls = dict(calls)  # those not made yet
        self._thread = threading.local()

    def install(self) -> None:
        """Watch from now on; call at once for modules that are imported already."""
        sys.meta_path.insert(0, self)
        for name in list(self._calls):
            if name in sys.modules:
                # Another thread may be importing it and have looked for it before this finder stood here. This waits
                # for the end of such an import, and does nothing where there is none.
                _wait_for_import(name)
                self.imported(sys.modules[name])

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that calls back; None for what is not watched."""
        if name not in self._calls or getattr(self._thread, "looking_for", None) == name:
            return None
        self._thread.looking_for = name
        try:
            finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
            specs = (finder.find_spec(name, path, target) for finder in finders)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._thread.looking_for = None
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _CallingLoader(spec.loader, self)
        return spec

    def imported(self, module: ModuleType) -> None:
        """Make the call that waited for a module, if it was not made yet."""
        call = self._calls.pop(module.__name__, None)
        if call is not None:
            call(module)
        if not self._calls:
            with suppress(ValueError):  # another thread's import was the last one too
                sys.meta_path.remove(self)


class _CallingLoader(Loader):
    """Runs a module by its own loader, puts that back in its place, and calls. Copied or pickled, it is that loader."""

    def __init__(self, loader: Loader, watch: CallsAfterImport) -> None:
        self._loader = loader
        self._watch = watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        in_place = sys.modules.get(module.__name__, module)
        if in_place is not module:
            # transformers puts another module into its place, and Python (3.11) gives the first one, empty, to threads
            # that waited for the import: let that one answer as the other.
            vars(module)["__getattr__"] = partial(getattr, in_place)
        self._watch.imported(in_place)

    def __getattr__(self, name: str) -> Any:  # whoever looks at a spec wants its loader's `get_source`, `path` ...
        return getattr(self._loader, name)

    def __reduce__(self) -> tuple[Callable[[Loader], Loader], tuple[Loader]]:
        return _itself, (self._loader,)


def _itself(loader: Loader) -> Loader:
    return loader
