"""transformers' own model tests, of the version that is installed, fetched from its source distribution.

The wheel does not carry them. They land in `.cache/` of the repository (never in git) and stay there. What the source
distribution leaves out (`tests/{generation,exporters,models,utils}`) is replaced by the smallest stubs that let the
rest be imported: there are no generation and export tests in it, and `config_common_kwargs` is a table of fields.
"""

import importlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import transformers
from transformers.models.auto import modeling_auto

CACHE = Path(__file__).resolve().parents[2] / ".cache"
PACKAGE = f"transformers_tests_{transformers.__version__.replace('.', '_')}"
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


class UpstreamSuite:
    """What the suites of all families do alike; first base of a test class, before upstream's mixins.

    `model_type` and `tables` (those by which upstream decides which labels a class takes) say whose suite it is.
    `explained` maps what upstream's skips say to why that is right for the family: another skip fails.
    """

    model_type: str
    tables: dict
    explained: dict
    test_can_init_all_missing_weights_before_2023 = True  # asks for that test; it reads the year in the file's header

    @classmethod
    def setUpClass(cls):
        for table, name in cls.tables.items():
            getattr(modeling_auto, table)[cls.model_type] = name

    @classmethod
    def tearDownClass(cls):
        for table in cls.tables:
            getattr(modeling_auto, table).pop(cls.model_type)

    def is_explained(self, reason):
        return any(re.search(pattern, reason) for pattern in self.explained)

    def skipTest(self, reason):
        if not self.is_explained(reason):
            self.fail(f"a skip that `explained` does not cover: {reason}")
        super().skipTest(reason)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_skips_decided_before_the_run_are_explained(self):
        methods = [getattr(self, name) for name in dir(self) if name.startswith("test_")]
        reasons = {method.__unittest_skip_why__ for method in methods if getattr(method, "__unittest_skip__", False)}
        assert not [reason for reason in reasons if not self.is_explained(reason)]


def upstream(module):
    """A module of the upstream tests; the calling test module is skipped, with the reason, where it cannot be had."""
    folder = CACHE / PACKAGE
    if not folder.is_dir():
        problem = _fetch(folder)
        if problem:
            pytest.skip(f"transformers' own tests cannot be had: {problem}", allow_module_level=True)
    pytest.importorskip("parameterized", reason="transformers' own tests need the package parameterized")
    if str(CACHE) not in sys.path:
        sys.path.insert(0, str(CACHE))
    return importlib.import_module(f"{PACKAGE}.{module}")


def _fetch(folder):
    """Download and unpack; returns what went wrong, or None."""
    CACHE.mkdir(exist_ok=True)
    wanted = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-binary",
            ":all:",
            "--no-deps",
            "-q",
            "-d",
            scratch,
            wanted,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
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
        try:
            tests.replace(folder)
        except OSError:  # another test process was faster
            if not folder.is_dir():
                raise
    return None
