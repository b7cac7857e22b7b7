"""A fresh environment that holds one wheel and what it declares, and nothing else.

python wheel_smoke_test_environment.py FOLDER WHEEL     (run by the project's own interpreter)

The declared dependencies, and theirs, are linked from this interpreter's environment instead of being installed again,
which takes minutes. What is not declared stays invisible; what is declared and absent, or of a version out of its
range, is an error. The wheel itself is installed by pip.
"""

import subprocess
import sys
import venv
from collections.abc import Iterable
from email.parser import HeaderParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement


def declared(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata."""
    with ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])


def installed(requirements: Iterable[str]) -> dict[str, Distribution]:
    """The distributions here that these requirements ask for, with all that those ask for, by name."""
    found: dict[str, Distribution] = {}
    seen: set[str] = set()
    waiting = [(text, "") for text in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if f"{text} for {extra}" in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        seen.add(f"{text} for {extra}")
        try:
            there = distribution(requirement.name)
        except PackageNotFoundError:
            raise SystemExit(f"the wheel needs {text}, which is not installed here: run `make install`") from None
        if not requirement.specifier.contains(there.version, prereleases=True):
            raise SystemExit(f"the wheel needs {text}, {there.version} is installed here: run `make install`")
        found[there.name] = there
        waiting += [(more, wanted) for more in there.requires or [] for wanted in ("", *requirement.extras)]
    return found


def link(found: Iterable[Distribution], site_packages: Path) -> None:
    """Link the top-level files and folders of each distribution."""
    for there in found:
        for top in {file.parts[0] for file in there.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            target = site_packages / top
            if not target.is_symlink():
                target.symlink_to(Path(str(there.locate_file(top))))


def main() -> None:
    """Make the environment and install the wheel into it."""
    folder, wheel = Path(sys.argv[1]), Path(sys.argv[2])
    venv.create(folder, symlinks=True)
    link(installed(declared(wheel)).values(), next(folder.glob("lib/python3*/site-packages")))
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main()
