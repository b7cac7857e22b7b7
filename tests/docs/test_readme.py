"""What the README tells a reader to do works: its Python runs, its commands exist, its paths are there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# Commands that CI itself runs, or that would install something.
RUN_BY_CI = {"make demo", "make test", "pip install -c constraints.txt ."}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `demo_output` in it, as a much smaller demo leaves it."""
    from ehrseq.demo.run import DemoSettings, run_demo

    folder = tmp_path_factory.mktemp("readme")
    tiny = DemoSettings(
        num_patients=150,
        hidden_size=16,
        num_layers=1,
        context=64,
        pretrain_tokens=4_096,
        finetune_rows=64,
        max_test_rows=100,
        batch_size=16,
    )
    run_demo(folder / "demo_output", settings=tiny)
    return folder


def test_the_python_of_the_readme_runs_from_top_to_bottom(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(demo_folder)
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    scores = namespace["risk"](namespace["patient"])
    assert scores
    assert all(0 < row["score"] < 1 for row in scores)
    assert "mortality_30d" in capsys.readouterr().out


def commands(block: str) -> list[list[str]]:
    """The words of each line of a block that is ours to run."""
    lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
    return [
        words
        for line in lines
        if line not in RUN_BY_CI and not line.startswith("git clone") and (words := shlex.split(line, comments=True))
    ]


# A block is one test: its later commands read what the earlier ones wrote.
@pytest.mark.parametrize("block", [block for block in blocks("bash") if commands(block)])
def test_each_command_of_the_readme_runs(block: str, demo_folder: Path) -> None:
    shutil.copytree(ROOT / "examples", demo_folder / "examples", dirs_exist_ok=True)
    for words in commands(block):
        program = {"python": [sys.executable], "ehrseq": [sys.executable, "-m", "ehrseq.cli.app"]}[words[0]]
        done = subprocess.run([*program, *words[1:]], cwd=demo_folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"


def test_the_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^`?make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_paths_that_the_readme_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
