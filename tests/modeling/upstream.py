"""transformers' own model tests, of the version that is installed, from its source distribution.

`make install` fetches them (fetch_upstream.py) into `.cache/` of the repository, never in git: no test downloads.
"""

import importlib
import re
import sys

import pytest
import transformers
from transformers.models.auto import modeling_auto

from tests.modeling.fetch_upstream import CACHE, tests_package, why_absent


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
    """A module of the upstream tests; the calling test module is skipped, with the reason, where they are not."""
    package = tests_package(transformers.__version__)
    if reason := why_absent(transformers.__version__):
        pytest.skip(f"transformers' own tests are absent: {reason}", allow_module_level=True)
    pytest.importorskip("parameterized", reason="transformers' own tests need the package parameterized")
    if str(CACHE) not in sys.path:
        sys.path.insert(0, str(CACHE))
    return importlib.import_module(f"{package}.{module}")
