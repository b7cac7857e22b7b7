"""What the README and the site tell a reader to do works: every block of their commands and their Python is run.

A page's blocks run from top to bottom in a folder of its own, where each reads what the earlier ones wrote. What the
folder holds at the start is on the page: `<!-- starts with: records dataset -->`. The first line of a block may say
`file: NAME` (the block becomes that file), `norun: why` (it is not run here) or `prints: that` (the Python before it
prints this text). Commands run in this process, on few patients and for few steps.
"""

import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(SITE.rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)(?: (\w+): ([^\n]+))?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
STARTS_WITH = re.compile(r"^<!-- starts with: (.*) -->$", flags=re.MULTILINE)
MIMIC = SITE / "guides" / "mimic_iv.md"
TASKS = ("mortality_30d", "long_stay_7d", "readmission_30d")
SHORT = "pretrain.tokens=2000 shared.tokens=2000 finetune.tokens=2000"  # of training EhrMamba
SMALLER = {"2000": "80", "1000": "200", "100": "20"}  # numbers of patients, by what the pages say


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its mark (`norun`, `file`, `prints`) with what the mark says, its text."""

    language: str
    mark: str
    about: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]


def runnable(page: Path) -> bool:
    return any(block.language in ("bash", "python") and block.mark != "norun" for block in blocks(page))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages start with: an export, a dataset with labels and encoded rows, a model (untrained)."""
    from ehrseq import EhrMambaConfig, EhrMambaForSequenceClassification, simulate
    from ehrseq.encode import tokenize_dataset
    from ehrseq.prepare import prepare_dataset
    from ehrseq.tasks import load_task
    from ehrseq.tasks.shards import label_dataset
    from ehrseq.work.engine import get_engine

    folder = tmp_path_factory.mktemp("pages")
    here = get_engine("local", num_workers=1)
    simulate(60, seed=3, progress=False).write_fhir(folder / "records")
    prepare_dataset(folder / "records", folder / "dataset", engine=here)
    tasks = [load_task(task) for task in TASKS]
    label_dataset(folder / "dataset", tasks, engine=here)
    tokenize_dataset(folder / "dataset", None, engine=here)
    tokenizer = _tokenizer(folder / "dataset" / "encoded" / "tokenizer")
    config = EhrMambaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        max_position_embeddings=64,
        tasks=[task.to_config() for task in tasks],
    )
    config.update_from_tokenizer(tokenizer)
    EhrMambaForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def _tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    import ehrseq  # noqa: F401

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder: a clone's scripts, and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page) and page != MIMIC], ids=name)
def test_a_page_runs_from_top_to_bottom(
    page: Path,
    request: pytest.FixtureRequest,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for wanted in " ".join(STARTS_WITH.findall(page.read_text())).split():
        if wanted != "nothing":
            _copy(request.getfixturevalue("folders") / wanted, here / wanted)
    namespace: dict = {"__name__": "page"}
    printed, last = "", ""
    for block in blocks(page):
        if block.mark == "norun":
            continue
        if block.mark == "file":
            (here / block.about).write_text(block.text)
        elif block.mark == "prints":
            assert last == block.text
        elif block.language == "python":
            capsys.readouterr()
            exec(compile(block.text, name(page), "exec"), namespace)
            last = capsys.readouterr().out
            printed += last
        elif block.language == "bash":
            for words in commands(block):
                run(words, monkeypatch)
        else:
            assert block.language == "text", f"{name(page)}: a block of {block.language} is neither run nor a file"
    if "risk" in namespace:  # a pipeline, asked about the page's patient
        assert "'mortality_30d'" in printed
    if page.name == "README.md":
        scores = namespace["risk"](namespace["patient"])
        assert scores
        assert all(0 < row["score"] < 1 for row in scores)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def commands(block: Block) -> list[list[str]]:
    """The words of each line."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """One line of a page, in this process; how it ended."""
    from ehrseq.cli.app import main

    if words[0] == "python" and words[1].endswith(".py"):
        monkeypatch.setattr(sys, "argv", words[1:])
        code = _exit_code(lambda: runpy.run_path(words[1], run_name="__main__"))
    elif words[0] == "ehrseq":
        monkeypatch.setattr(sys, "argv", smaller(words))
        code = _exit_code(main)
    else:
        raise AssertionError(f"{words}: nobody runs this line; mark its block `norun: why`")
    # An audit ends with 1 where it finds something, as its page says; on few patients it may.
    assert code in ((0, 1) if words[1] == "audit" else (0,)), f"{words} ended with {code}"
    return code


def smaller(words: list[str]) -> list[str]:
    """The same command on few patients, for few steps, in one process."""
    takes_workers = {"prepare", "split", "label", "tokenize", "audit", "stats", "embed", "medications"}
    words = [SMALLER.get(word, word) if before == "-n" else word for before, word in zip(["", *words], words)]  # noqa: B905
    prepared = words[1] in ("predict", "forecast") and Path(words[words.index("--data") + 1], "metadata").is_dir()
    if words[1] in takes_workers or prepared:
        words += ["--workers", "1"]
    if words[1] == "train" and "--list" not in words:
        short = "pretrain.epochs=1 finetune.epochs=1" if "hymate" in words else SHORT
        words += [f"--set={change}" for change in short.split()]
    if words[1] == "forecast" and "--num" not in words:
        words += ["--num", "4"]
    if words[1] == "evaluate":
        words += ["--resamples", "20"]
    return words


def _exit_code(call) -> int:  # type: ignore[no-untyped-def]
    try:
        call()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# -- MIMIC-IV, on simulated patients and with a tiny budget ----------------------------------------------------------


def mimic_commands() -> list[list[str]]:
    return [words for block in blocks(MIMIC) for words in commands(block)]


def test_the_mimic_page_has_the_way_from_files_to_the_table() -> None:
    assert [words[1] for words in mimic_commands()] == [
        "prepare", "label", "split", "stats", "benchmark", "label", "tokenize", "audit", "benchmark"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_mimic_page_runs(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ehrseq import simulate
    from tests.benchmark.cohorts import write_budget

    simulate(250, 3, progress=False).write_fhir(here / "MIMIC", compress=True)
    budget = write_budget(here, finetune_splits=["train"])
    quick = ["--models", "logistic,ehrmamba", "--workers", "1", "--resamples", "20"]
    for words in mimic_commands():
        assert words[0] == "ehrseq"
        if words[1] == "benchmark":
            words = [str(budget) if word == "full" else "1" if word == "3" else word for word in words] + quick
        capsys.readouterr()
        code = run(words, monkeypatch)
        if words[1] == "audit":  # as the page says, the paper's own tasks are found out, and nothing else is
            findings = re.findall(r"FINDING (\S+)", capsys.readouterr().out)
            assert code == 1
            assert findings
            assert all("_paper" in finding for finding in findings), findings
    assert (here / "mimic" / "table" / "report.html").is_file()
    assert (here / "mimic" / "table_prospective" / "report.html").is_file()


# -- what pages name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_marks_are_understood(page: Path) -> None:
    for block in blocks(page):
        assert block.mark in ("", "norun", "file", "prints"), f"{block.mark}: expected norun, file or prints"
    fences = [line for line in page.read_text().splitlines() if line.startswith("```")]
    assert len(fences) == 2 * len(blocks(page)), "a fenced block has no language, or is not closed"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_commands_that_it_names_exist(page: Path) -> None:
    from ehrseq.cli.app import app

    known = {info.name or info.callback.__name__.replace("_", "-") for info in app.registered_commands}
    named = set(re.findall(r"^(?:\w+=\S+ )*ehrseq ([a-z][a-z-]*)", page.read_text(), flags=re.MULTILINE))
    named |= set(re.findall(r"`ehrseq ([a-z][a-z-]*)", page.read_text()))
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_modules_and_scripts_that_it_names_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m (benchmarks\.[\w.]+|ehrseq\.[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    for path in re.findall(r"`((?:ehrseq|tests|benchmarks|examples|hub_cards|docs)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or page.name == "CHANGELOG.md", path


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_the_paths_that_it_links_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_the_make_targets_that_it_names_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE))
    assert named
    assert named <= targets
