"""The `ehrseq` command: it starts without what it does not use.

`import ehrseq` registers the models with transformers and so loads torch and transformers, which takes seconds. The
command, and the worker processes of `ehrseq.engine` and `ehrseq.data.fhir_pool`, begin with the package's name alone
and import its modules one by one; what loads a model by an Auto class, or saves a model or tokenizer, calls
`register_all` itself. This module stands beside the package because importing anything inside of it would import the
whole.
"""

import importlib
import sys
import types
from pathlib import Path


class LightPackage(types.ModuleType):
    """The package under its name, without its `__init__` until something of it is asked for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        if sys.modules.get("ehrseq") is self:
            del sys.modules["ehrseq"]
        return getattr(importlib.import_module("ehrseq"), name)


def import_lightly() -> None:
    """Make `import ehrseq.some.module` load that module only; nothing where the package was imported already."""
    if "ehrseq" not in sys.modules:
        package = LightPackage("ehrseq")
        package.__path__ = [str(Path(__file__).resolve().with_name("ehrseq"))]
        sys.modules["ehrseq"] = package


def worker_command(module: str, function: str) -> list[str]:
    """Command line of a process that calls a function of the package, imported lightly."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ehrseq_command; del sys.path[0]; "
        f"ehrseq_command.import_lightly(); from {module} import {function}; {function}()"
    )
    return [sys.executable, "-c", code, str(Path(__file__).resolve().parent)]


def main() -> None:
    """Run the command line."""
    import_lightly()
    from ehrseq.cli import main as run

    run()


if __name__ == "__main__":
    main()
