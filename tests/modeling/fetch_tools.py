"""Install the libraries of the extra `tools` (adapters, quantised weights) where only their own tests see them.

    python tests/modeling/fetch_tools.py        (`make install` runs it)

In the environment itself, transformers would import all of them in every process that imports transformers, which costs
each of some hundred test processes a second. They land in `.cache/` of the repository, in the versions of
constraints.txt, without what they depend on (torch and its like are there). Where they cannot be had, this says so and
the tests that need them are skipped.
"""

import hashlib
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


def wanted() -> list[str]:
    """`name==version` of every library of the extra."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tools"]
    names = [requirement.split(">")[0] for requirement in extra]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return [f"{name}=={pins[name]}" for name in names]


def folder() -> Path:
    """Where they are, or would be."""
    return ROOT / ".cache" / f"tools_{hashlib.sha256(' '.join(wanted()).encode()).hexdigest()[:8]}"


def fetch() -> str | None:
    """Install them unless they are there; returns what went wrong, or None."""
    target = folder()
    if target.is_dir():
        return None
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-compile"]
        command += ["--no-deps", "--only-binary", ":all:", "--target", f"{scratch}/site", *wanted()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"pip install {' '.join(wanted())} took more than {SECONDS} s"
        if done.returncode:
            return f"pip install {' '.join(wanted())} failed: {done.stderr.strip()[-300:]}"
        Path(scratch, "site").replace(target)
    return None


if __name__ == "__main__":
    if problem := fetch():
        print(f"peft and the libraries of quantised weights cannot be had, their tests are skipped: {problem}")
