"""Install libraries of others where only their own tests see them: the extra `tools` (adapters, quantised weights) and
the extra `aces` (the cohort tool of the MEDS family).

    python tests/modeling/fetch_tools.py        (`make install` runs it)

In the environment itself, transformers would import the tools in every process that imports transformers, which costs
each of some hundred test processes a second. They land in `.cache/` of the repository, a folder an extra, in the
versions of constraints.txt, with what else the environment lacks (`BESIDE`; torch and its like are there). Where they
cannot be had, this says so and the tests that need them are skipped.
"""

import hashlib
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300

BESIDE = {"tools": [], "aces": ["bigtree", "pytimeparse", "ruamel.yaml"]}
"""Extra -> what its libraries import that the environment of the tests has not."""


def wanted(extra: str = "tools") -> list[str]:
    """`name==version` of every library of an extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = [requirement.split(">")[0] for requirement in extras[extra]] + BESIDE[extra]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return [f"{name}=={pins[name]}" for name in names]


def folder(extra: str = "tools") -> Path:
    """Where they are, or would be."""
    return ROOT / ".cache" / f"{extra}_{hashlib.sha256(' '.join(wanted(extra)).encode()).hexdigest()[:8]}"


def fetch(extra: str = "tools") -> str | None:
    """Install them unless they are there; returns what went wrong, or None."""
    target, libraries = folder(extra), wanted(extra)
    if target.is_dir():
        return None
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-compile"]
        command += ["--no-deps", "--only-binary", ":all:", "--target", f"{scratch}/site", *libraries]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"pip install {' '.join(libraries)} took more than {SECONDS} s"
        if done.returncode:
            return f"pip install {' '.join(libraries)} failed: {done.stderr.strip()[-300:]}"
        Path(scratch, "site").replace(target)
    return None


if __name__ == "__main__":
    for name in BESIDE:
        if problem := fetch(name):
            print(f"The libraries of the extra {name} cannot be had, their tests are skipped: {problem}")
