"""Fetch transformers' own tests, which its wheel does not carry, from the source distribution of the installed version.

    python tests/modeling/fetch_upstream.py        (`make install` runs it)

They land in `.cache/` of the repository and stay there. What the source distribution leaves out
(`tests/{generation,exporters,models,utils}`) is replaced by the smallest stubs that let the rest be imported: there are
no generation and export tests in it, and `config_common_kwargs` is a table of fields. Where nothing can be fetched,
the tests that need them are skipped; they, and the end of every run of the tests, say why.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache"
SECONDS = 120
STUBS = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "models/__init__.py": "",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        'config_common_kwargs = {"return_dict": False, "output_hidden_states": True, "dtype": "float16",\n'
        '    "chunk_size_feed_forward": 5, "architectures": ["X"], "id2label": {0: "label"},\n'
        '    "label2id": {"label": "0"}, "problem_type": "regression"}\n'
    ),
}


def tests_package(release: str) -> str:
    """Name of the package that the tests of a release of transformers become in `CACHE`."""
    return f"transformers_tests_{release.replace('.', '_')}"


def why_absent(release: str) -> str | None:
    """Why the tests of a release of transformers are not there, None where they are."""
    if (CACHE / tests_package(release)).is_dir():
        return None
    failed = _failure(release)
    reason = failed.read_text(encoding="utf-8") if failed.is_file() else "nobody has fetched them"
    return f"{reason}; `python tests/modeling/fetch_upstream.py` fetches them"


def fetch(release: str) -> str | None:
    """Download and unpack the tests of a release of transformers; returns what went wrong, or None.

    What went wrong is kept for `why_absent`.
    """
    CACHE.mkdir(exist_ok=True)
    problem = _fetch(release)
    if problem is None:
        _failure(release).unlink(missing_ok=True)
    else:
        _failure(release).write_text(problem, encoding="utf-8")
    return problem


def _failure(release: str) -> Path:
    return CACHE / f"{tests_package(release)}.failed"


def _fetch(release: str) -> str | None:
    target = CACHE / tests_package(release)
    if target.is_dir():
        return None
    wanted = f"transformers=={release}"
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "-q"]
        command += ["-d", scratch]
        try:
            done = subprocess.run([*command, wanted], capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"pip download {wanted} took more than {SECONDS} s"
        archives = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode or not archives:
            return f"pip download {wanted} failed: {done.stderr.strip()[-300:]}"
        with tarfile.open(archives[0]) as archive:
            archive.extractall(scratch, filter="data")
        tests = next(Path(scratch).glob("transformers-*/tests"))
        for name, text in STUBS.items():
            file = tests / name
            file.parent.mkdir(exist_ok=True)
            if not file.exists():
                file.write_text(text)
        tests.replace(target)
    return None


if __name__ == "__main__":
    if problem := fetch(version("transformers")):
        print(f"transformers' own tests cannot be had, those that build on them are skipped: {problem}")
