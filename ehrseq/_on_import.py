"""A call that waits for the import of another package: `import ehrseq` does not load transformers, yet is known to it.

A finder stands first on `sys.meta_path` and finds nothing itself: it lets the others find a module, and calls behind
that module's own code. It leaves once the call has succeeded.

Threads make that harder than it sounds. The call runs inside the import of transformers and imports this package's
classes; another thread may be importing one of them at that moment, which waits for transformers in turn. Python ends
such a circle with a module that is not finished, or with an error. So a call that fails while a module of this package
is being imported is made again behind that import.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import _bootstrap
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Python's own tools for modules that several threads import: not public, so a later Python may lack them.
_wait_for_import: Callable[[str], None] = getattr(_bootstrap, "_lock_unlock_module", lambda name: None)
_DeadlockError: type[RuntimeError] = getattr(_bootstrap, "_DeadlockError", RuntimeError)


class CallAfterImport(MetaPathFinder):
    """Makes a call behind the import of a package, and until it succeeds behind each import of the calling package.

    Args:
        package: Name of the package that the call needs.
        caller: Name of the package whose modules the call imports.
        call: May be made several times, and by two threads at once.
    """

    def __init__(self, package: str, caller: str, call: Callable[[], None]) -> None:
        self._package = package
        self._caller = f"{caller}."
        self._call = call
        self._imports = 0  # finished so far
        self._thread = threading.local()

    def install(self) -> None:
        """Watch from now on; make the call at once where the package is imported already."""
        sys.meta_path.insert(0, self)
        # Another thread may be importing the package and have looked for it before this finder stood here. This waits
        # for the end of such an import, and does nothing where there is none.
        _wait_for_import(self._package)
        self.imported(self._caller)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that calls back; None for what is not watched."""
        if name != self._package and not name.startswith(self._caller):
            return None
        if getattr(self._thread, "looking_for", None) == name:
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

    def imported(self, name: str) -> None:
        """Make the call behind the import of a module, if its package is there.

        A call that failed is made again at once where a module was finished meanwhile, and otherwise left to the import
        that is still under way.

        Raises:
            ImportError, AttributeError: Of the call, where no import could have been in its way.
        """
        self._imports += 1
        if self._package not in sys.modules or getattr(self._thread, "calling", False):
            return
        self._thread.calling = True
        try:
            while self in sys.meta_path:
                seen = self._imports
                try:
                    self._call()
                except (ImportError, AttributeError, _DeadlockError) as error:
                    in_the_way = isinstance(error, _DeadlockError) or self._is_importing_but(name)
                    if self._imports != seen:
                        continue
                    if in_the_way:
                        return
                    raise
                with suppress(ValueError):  # another thread's call was faster
                    sys.meta_path.remove(self)
        finally:
            self._thread.calling = False

    def _is_importing_but(self, name: str) -> bool:
        """Whether a module of the calling package other than this one is being imported, in whatever thread."""
        return any(
            getattr(getattr(module, "__spec__", None), "_initializing", False)
            for key, module in list(sys.modules.items())
            if key.startswith(self._caller) and key != name
        )


class _CallingLoader(Loader):
    """Runs a module by its own loader, puts that back in its place, and calls. Copied or pickled, it is that loader."""

    def __init__(self, loader: Loader, watch: CallAfterImport) -> None:
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
        self._watch.imported(module.__name__)

    def __getattr__(self, name: str) -> Any:  # whoever looks at a spec wants its loader's `get_source`, `path` ...
        return getattr(self._loader, name)

    def __reduce__(self) -> tuple[Callable[[Loader], Loader], tuple[Loader]]:
        return _itself, (self._loader,)


def _itself(loader: Loader) -> Loader:
    return loader
