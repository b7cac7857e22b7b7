"""Build hook: compiles the C++ kernels into the wheel, or leaves them out where no compiler is.

With them the wheel is for this platform and any Python 3 (`py3-none-linux_x86_64`), without them it is `py3-none-any`:
the install succeeds either way. pip hides what a build says (unless `pip install -v`); `ehrseq doctor` says what
came of it. An editable install compiles into the source tree, a wheel's build touches nothing there.
"""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):
    """Compiles before a wheel is put together."""

    PLUGIN_NAME = "custom"
    _scratch: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell the wheel what it now holds."""
        builder = _load_builder(Path(self.root, "ehrseq", "kernels", "build_library.py"))
        if version == "editable":
            built, message = builder.build_libraries()
        else:
            self._scratch = Path(tempfile.mkdtemp(prefix="ehrseq-kernels-"))
            built, message = builder.build_libraries(self._scratch)
            for path in built:
                build_data["force_include"][str(path)] = f"ehrseq/kernels/lib/{path.name}"
            if built:
                build_data["pure_python"] = False
                platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
                build_data["tag"] = f"py3-none-{platform}"
        (self.app.display_info if built else self.app.display_warning)(f"ehrseq: {message}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel has taken in."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _load_builder(path: Path) -> Any:
    """The module by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("build_library", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is missing: the source tree is not complete.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
