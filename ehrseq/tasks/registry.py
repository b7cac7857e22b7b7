"""The tasks that come with the package, by name."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from ehrseq.tasks.schema import Task

_ORDER = ("mortality_30d", "long_stay_7d", "readmission_30d", "hypertension", "fluid_disorder", "lipid_disorder")


@cache
def _packaged() -> dict[str, Task]:
    folder = files("ehrseq.tasks") / "definitions"
    tasks = [Task.from_yaml(Path(str(entry))) for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    rank = {name: k for k, name in enumerate(_ORDER)}
    tasks.sort(key=lambda task: (task.retrospective, rank.get(task.name.removesuffix("_paper"), len(rank)), task.name))
    return {task.name: task for task in tasks}


def list_tasks(*, retrospective: bool | None = False, paper: bool | None = True) -> list[str]:
    """Names of the packaged tasks: the six of the EhrMamba paper in its order, then the others by name.

    Args:
        retrospective: False for the tasks that can be predicted, True for the `*_paper` variants that use hindsight and
            serve the reproduction of the paper's table only, None for both.
        paper: True for the tasks of the paper, False for the others, None for all.
    """
    return [
        name
        for name, task in _packaged().items()
        if (retrospective is None or task.retrospective is retrospective)
        and (paper is None or (name.removesuffix("_paper") in _ORDER) is paper)
    ]


def load_task(name: str | Path) -> Task:
    """A packaged task by its name, or any task by its YAML file.

    Raises:
        ValueError: An unknown name, or a file that `Task.from_yaml` refuses.
    """
    if isinstance(name, Path) or (isinstance(name, str) and name.endswith((".yaml", ".yml"))):
        return Task.from_yaml(name)
    tasks = _packaged()
    if not isinstance(name, str) or name not in tasks:
        raise ValueError(f"Unknown task {name!r}; expected one of {list(tasks)} or the path of a .yaml file.")
    return tasks[name]
