"""What lies in the current folder is data: no command that is run there executes it, in whatever process.

`python -c` and `python -m` put the current folder first on the path. Two looks at it: modules are planted beside
somebody's records and the real commands run there, and every command line in this repository's code is read.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ehrseq import simulate
from tests.processes import FROM_HERE

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STANDARD = ("csv", "decimal", "gzip", "json", "pickle", "queue", "random", "socket", "struct", "uuid")
INSTALLED = ("ehrseq", "numpy", "orjson", "polars", "pyarrow", "torch", "tqdm", "transformers", "yaml")
ABSENT = ("cupy", "isal", "mamba_ssm", "sitecustomize", "usercustomize")  # or at most there, behind a guarded import
TINY = (
    "--set pretrain.tokens=500 --set shared.tokens=500 --set finetune.tokens=500 --set model.hidden_size=16 "
    "--set model.num_hidden_layers=1 --set model.state_size=4"
)

SESSION = """
import os, sys, ehrseq, orjson, polars, numpy
from ehrseq.prepare import prepare_dataset
from ehrseq.work.engine import get_engine
os.chdir("..")
sys.path[:0] = ["", os.getcwd()]
prepare_dataset("fhir", "dataset", engine=get_engine(num_workers=2))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export, with a module of every name beside it that says who has run it."""
    simulate(40, seed=0).write_fhir(tmp_path / "fhir")
    for name in (*STANDARD, *INSTALLED, *ABSENT):
        line = (
            f"open({str(tmp_path / 'executed.txt')!r}, 'a').write('{name} in ' + str(__import__('sys').argv) + '\\n')"
        )
        (tmp_path / f"{name}.py").write_text(line + "\n")
    return tmp_path


def run(folder: Path, *command: object) -> str:
    """Run a command in the folder: it succeeds, and nothing that lies there was executed. What it printed."""
    words = [str(BIN / str(command[0])), *map(str, command[1:])]
    environment = FROM_HERE | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    executed = folder / "executed.txt"
    assert not executed.exists(), executed.read_text()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_planted_modules_are_executed_where_the_folder_is_on_the_path(folder):
    """Else the other tests would show nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    for name in ("orjson", "json"):
        subprocess.run([sys.executable, *["-c", f"import {name}"]], cwd=folder, env=environment, check=False)
        assert (folder / "executed.txt").read_text().startswith(f"{name} in ")
        (folder / "executed.txt").unlink()


def test_no_command_executes_what_lies_beside_the_records(folder):
    run(folder, "ehrseq", "prepare", "fhir", "dataset", "--workers", "2")
    run(folder, "ehrseq", "label", "dataset", "--task", "mortality_30d", "--workers", "2")
    assert (folder / "dataset" / "labels" / "mortality_30d").is_dir()


@pytest.mark.slow
def test_nor_do_the_long_commands_and_torchrun(folder):
    simulate(200, seed=0).write_fhir(folder / "more")  # so many that every split has outcomes
    run(folder, "ehrseq", "prepare", "more", "dataset", "--workers", "2")
    run(folder, "ehrseq", "label", "dataset", "--task", "mortality_30d", "--workers", "2")
    run(folder, "ehrseq", "tokenize", "dataset", "--workers", "2")
    run(folder, "ehrseq", "audit", "dataset", "dataset", "--workers", "2")
    run(folder, "ehrseq", "stats", "dataset", "--workers", "2")
    run(folder, "ehrseq", "train", "dataset", "--out", "model", "--recipe", "demo", *TINY.split())
    torchrun = ("torchrun", "--nproc_per_node", "2", "--standalone", "--no-python", BIN / "ehrseq")
    run(folder, *torchrun, "train", "dataset", "--out", "two", "--recipe", "demo", *TINY.split())
    models = ("--models", "logistic", "--tasks", "mortality_30d", "--resamples", "20", "--workers", "2")
    run(folder, "ehrseq", "benchmark", "dataset", "--out", "benchmark", "--budget", "quick", *models)


def test_workers_of_a_session_in_that_folder_find_modules_elsewhere(folder):
    """A notebook has the current folder on its path: what it has imported before, its workers import anew."""
    script = folder / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(SESSION)
    (folder / "tqdm.py").unlink()  # the session would import it only now, which is its own doing
    run(folder / "elsewhere", "python", script)
    assert (folder / "dataset" / "data").is_dir()
    executed = folder / "executed.txt"
    lines = executed.read_text().splitlines() if executed.exists() else []
    assert [line for line in lines if "'-c'" in line] == []


def test_work_that_was_imported_from_the_current_folder_is_found_by_workers(tmp_path):
    (tmp_path / "mine.py").write_text("def twice(number):\n    return 2 * number\n")
    code = "from mine import twice; from ehrseq.work.engine import LocalEngine; "
    code += "print(list(LocalEngine(2).map(twice, [1, 2, 3], desc='x')))"
    command = [sys.executable, *["-c", code]]  # without -P: the module is the caller's own
    done = subprocess.run(command, cwd=tmp_path, env=FROM_HERE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[2, 4, 6]"


# ---------------------------------------------------------------------------------------------------------------------
# Every command line in the code
# ---------------------------------------------------------------------------------------------------------------------
def unsafe_commands(source: str) -> list[int]:
    """Lines of lists that start Python with a switch other than `-P`; what runs a file has that file's folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.List | ast.Tuple):
            continue
        for word, after in zip(node.elts, node.elts[1:], strict=False):
            is_python = isinstance(word, ast.Attribute) and ast.unparse(word) == "sys.executable"
            is_file = not isinstance(after, ast.Starred | ast.Constant)
            if is_python and not is_file and not (isinstance(after, ast.Constant) and after.value == "-P"):
                found.append(node.lineno)
    return found


def test_every_python_that_is_started_has_the_safe_path():
    unsafe = []
    for room in ("ehrseq", "tests", "benchmarks", "examples", ".ci"):
        for file in sorted((REPOSITORY / room).rglob("*.py")):
            if file != Path(__file__).resolve():
                lines = unsafe_commands(file.read_text(encoding="utf-8"))
                unsafe += [f"{file.relative_to(REPOSITORY)}:{line}" for line in lines]
    assert unsafe == []


def test_the_reader_of_commands_sees_what_is_unsafe():
    assert unsafe_commands('x = [sys.executable, "-c", code]') == [1]
    assert unsafe_commands("x = [sys.executable, *rest]") == [1]
    assert unsafe_commands('x = (sys.executable, "-m", "pip")') == [1]
    assert unsafe_commands('x = [sys.executable, "-P", "-c", code]') == []
    assert unsafe_commands("x = [sys.executable, __file__]") == []
