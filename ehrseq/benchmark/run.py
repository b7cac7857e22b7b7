"""`ehrseq benchmark`: all cells, then the table, the plots, the report."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ehrseq.benchmark.budget import Budget
from ehrseq.benchmark.cells import PretrainCell, SystemCell, pretrain_cell, system_cell
from ehrseq.benchmark.data import Source, prepare_data
from ehrseq.benchmark.report import write_report
from ehrseq.benchmark.systems import REFERENCE, System, choose_systems
from ehrseq.tasks import list_tasks
from ehrseq.version import __version__
from ehrseq.work.engine import get_engine
from ehrseq.work.files import remove_unfinished, write_json

logger = logging.getLogger(__name__)

RUN = "run.json"
LOCK = ".lock"


def run_benchmark(
    dataset: str | Path,
    *,
    out: str | Path,
    test: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    seeds: int = 1,
    budget: str | Path | Budget = "quick",
    kinds: str = "all",
    reference: str = REFERENCE,
    workers: int | None = None,
    num_resamples: int = 1000,
    report_only: bool = False,
) -> str:
    """Train and evaluate every system on one dataset; what a stopped run has finished is kept.

    Args:
        dataset: MEDS dataset with the splits pretrain, train, tuning and held_out.
        out: Folder of the run.
        test: Another dataset on whose patients is reported, in place of `dataset`'s held-out ones.
        tasks: Tasks, packaged ones or label tables of the dataset; None = the paper's six.
        models: Names of `SYSTEMS`; None = all. More may be added to a run later.
        seeds: Seeds, 0 to `seeds` - 1; more may be added later.
        budget: What each system may compute: one of `BUDGETS`, or a YAML file.
        kinds: What enters a sequence: "all", or "paper", which the paper's retrospective tasks need.
        reference: The system that the others are held against.
        workers: Cells at a time; None = one a core on a CPU, one on a GPU.
        num_resamples: Bootstrap resamples of patients.
        report_only: Make the table of what is there, train nothing.

    Returns:
        The results as Markdown.

    Raises:
        ValueError: Data, tasks, models or budget that cannot be used; a folder of another run, or
            one that another process is writing; nothing to report.
    """
    systems = choose_systems(models)
    allowed = budget if isinstance(budget, Budget) else Budget.read(budget)
    choose_systems([reference])
    names = tuple(list_tasks() if tasks is None else tasks)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks got {list(names)}; expected names of tasks, each once.")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds got {seeds!r}; expected a whole number of at least 1.")
    _check_kinds(kinds, names)
    folder = Path(out).resolve()
    tested = None if test is None else str(Path(test).resolve())
    source = Source(str(folder), str(Path(dataset).resolve()), tested, names, kinds)
    _claim(folder, source, allowed)
    if not report_only:
        with _alone(folder):
            _run_cells(source, allowed, systems, seeds, workers)
    return write_report(folder, source, allowed, reference=reference, num_resamples=num_resamples)


def _run_cells(source: Source, budget: Budget, systems: Sequence[System], seeds: int, workers: int | None) -> None:
    """Prepare the data, pretrain, finetune and score: all that is not there yet."""
    remove_unfinished(Path(source.out))
    prepare_data(source, budget)
    types = dict.fromkeys(system.model_type for system in systems if system.objective is not None)
    pretraining = [PretrainCell(source, budget, name, seed) for seed in range(seeds) for name in types]
    cells = [SystemCell(source, budget, system.name, seed) for seed in range(seeds) for system in systems]
    engine = get_engine("local", num_workers=_workers(workers), keep_freed_memory=True)
    for _ in engine.map(pretrain_cell, pretraining, desc="Pretraining"):
        pass
    for _ in engine.map(system_cell, cells, desc="Finetuning and scoring"):
        pass


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder; the system lets go of it when this one ends, however it does.

    Raises:
        ValueError: Another process is at work there: it would write the same cells, and lose its unfinished files.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{folder} is being written by another `ehrseq benchmark`; wait for it, or name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_kinds(kinds: str, tasks: Sequence[str]) -> None:
    """Refuse to show a model the diagnoses that its label is made of."""
    if kinds not in ("all", "paper"):
        raise ValueError(f'kinds got {kinds!r}; expected "all" or "paper".')
    retrospective = [name for name in tasks if name in list_tasks(retrospective=True)]
    if retrospective and kinds != "paper":
        raise ValueError(
            f"{retrospective} are the paper's retrospective tasks, whose labels are made of diagnoses of the same "
            'record; give kinds="paper" (--kinds paper), so that no diagnosis is read, or name the prospective tasks.'
        )


def _claim(folder: Path, source: Source, budget: Budget) -> None:
    """Make the folder this run's, or see that it is.

    Raises:
        ValueError: It holds something else.
    """
    settings: dict[str, Any] = {
        "dataset": source.train,
        "test": source.test,
        "tasks": list(source.tasks),
        "kinds": source.kinds,
        "budget": budget.to_dict(),
    }
    file = folder / RUN
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        other = {name: known.get(name) for name, value in settings.items() if known.get(name) != value}
        if other:
            raise ValueError(
                f"{folder} holds a run with other settings, {other}; give it the same ones to go on, or name another "
                "folder."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is no folder of `ehrseq benchmark` and is not empty; name a new one.")
    write_json(file, settings | {"ehrseq": __version__, "command": sys.argv})


def _workers(workers: int | None) -> int | None:
    import torch

    return 1 if workers is None and torch.cuda.is_available() else workers
