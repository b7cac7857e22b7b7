"""docs/mimic_iv.md: its commands, one after the other, on simulated patients and with a tiny budget."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ehrseq.data.simulate.cohort import simulate
from tests.benchmark.cohorts import write_budget

PAGE = (Path(__file__).parents[2] / "docs" / "mimic_iv.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)


def commands():
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def test_the_page_has_the_way_from_files_to_the_table():
    assert [words[1] for words in commands()] == [
        "prepare", "label", "split", "stats", "benchmark", "label", "tokenize", "audit", "benchmark"
    ]  # fmt: skip


@pytest.mark.slow
def test_its_commands_run(tmp_path):
    simulate(250, 3, progress=False).write_fhir(tmp_path / "MIMIC", compress=True)
    budget = write_budget(tmp_path, finetune_splits=["train"])
    quick = ["--models", "logistic,ehrmamba", "--workers", "1", "--resamples", "20"]
    for words in commands():
        assert words[0] == "ehrseq"
        if words[1] == "benchmark":
            words = [str(budget) if word == "full" else "1" if word == "3" else word for word in words] + quick
        done = subprocess.run(
            [sys.executable, "-m", "ehrseq.cli.app", *words[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        told = f"{words}: {done.stdout[-1500:]} {done.stderr[-1500:]}"
        if words[1] == "audit":  # as the page says, the paper's own tasks are found out, and nothing else is
            findings = re.findall(r"FINDING (\S+)", done.stdout)
            assert done.returncode == 1, told
            assert findings
            assert all("_paper" in finding for finding in findings), told
        else:
            assert done.returncode == 0, told
    assert (tmp_path / "mimic" / "table" / "report.html").is_file()
    assert (tmp_path / "mimic" / "table_prospective" / "report.html").is_file()
