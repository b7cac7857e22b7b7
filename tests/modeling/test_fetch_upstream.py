"""Where transformers' own tests cannot be had, the suites that build on them say why."""

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from tests.modeling import fetch_upstream, upstream


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache, and a pip that reaches nobody."""

    def refused(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: Could not find a version: no route to host")

    monkeypatch.setattr(fetch_upstream, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(fetch_upstream.subprocess, "run", refused)


def test_a_failed_download_is_the_reason_of_the_skip(offline, monkeypatch):
    monkeypatch.setattr(upstream, "transformers", SimpleNamespace(__version__="9.9.9"))
    with pytest.raises(pytest.skip.Exception, match="absent: nobody has fetched them; `python tests/modeling/fetch"):
        upstream.upstream("test_modeling_common")
    assert "no route to host" in fetch_upstream.fetch("9.9.9")
    with pytest.raises(pytest.skip.Exception, match=r"absent: pip download transformers==9\.9\.9 failed.*no route"):
        upstream.upstream("test_modeling_common")


def test_a_download_that_works_later_leaves_no_reason(offline, monkeypatch):
    fetch_upstream.fetch("9.9.9")
    monkeypatch.setattr(fetch_upstream, "_fetch", lambda _: None)
    assert fetch_upstream.fetch("9.9.9") is None
    assert "nobody has fetched" in fetch_upstream.why_absent("9.9.9")
    (fetch_upstream.CACHE / fetch_upstream.tests_package("9.9.9")).mkdir()
    assert fetch_upstream.why_absent("9.9.9") is None


def test_the_end_of_a_run_tells_it(offline, monkeypatch):
    from tests import conftest

    monkeypatch.setattr(conftest, "version", lambda _: "9.9.9")
    fetch_upstream.fetch("9.9.9")
    lines: list[str] = []
    conftest.pytest_terminal_summary(SimpleNamespace(write_line=lambda line, **_: lines.append(line)))
    assert len(lines) == 1
    assert "NOT RUN: transformers' own tests are absent: pip download" in lines[0]
