"""What every benchmark needs: its arguments, turns taken by the measured ways, the machine, and a result on disk.

Peers are measured in turns in one run, so that a busy machine slows all alike, and ratios of CPU seconds are what
compares machines. A benchmark in this folder reads:

    from benchmarks.harness import benchmark_parser, finish, in_turns

    options = benchmark_parser(__doc__, repeats=5).parse_args()
    costs = in_turns({"peer": peer, "ehrseq": ours}, options.repeats)
    finish({"ratio": costs["peer"].cpu / costs["ehrseq"].cpu, "cpu_seconds": costs["ehrseq"].cpu_all}, options.output)
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ehrseq.work import files
from ehrseq.work.engine import available_cores

_LOAD_AT_START = os.getloadavg()[0]  # of the last minute, before the benchmark itself is part of it


def keep_bytecode(folder: str | Path) -> None:
    """Let the interpreters that a benchmark starts keep compiled byte-code, as those of installed packages do.

    Without it (PYTHONDONTWRITEBYTECODE is common in containers) each of them would compile the package anew.

    Args:
        folder: Where the byte-code goes; a temporary folder that is still empty.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)


@dataclass
class Costs:
    """Seconds of every call of one way: wall, and CPU of this process and its finished children, all threads."""

    wall_all: list[float] = field(default_factory=list)
    cpu_all: list[float] = field(default_factory=list)

    @property
    def wall(self) -> float:
        """Median wall seconds of a call."""
        return statistics.median(self.wall_all)

    @property
    def cpu(self) -> float:
        """Median CPU seconds of a call."""
        return statistics.median(self.cpu_all)

    def add(self, action: Callable[[], object]) -> None:
        """Call once more and keep what it cost."""
        wall, cpu = time.perf_counter(), _cpu_clock()
        action()
        self.wall_all.append(time.perf_counter() - wall)
        self.cpu_all.append(_cpu_clock() - cpu)


def _cpu_clock() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_turns(
    ways: Mapping[str, Callable[[], object]], repeats: int, *, calls: Mapping[str, int] | None = None, warm_up: int = 0
) -> dict[str, Costs]:
    """Call every way `repeats` times, one after the other in every round.

    Args:
        ways: Name -> what is measured.
        repeats: Rounds.
        calls: Calls of a way in a round where that is not 1: a short way beside a long one gets a steadier median.
        warm_up: Rounds before them that are not counted.
    """
    costs = {name: Costs() for name in ways}
    for number in range(-warm_up, repeats):
        for name, way in ways.items():
            for _ in range((calls or {}).get(name, 1)):
                (costs[name] if number >= 0 else Costs()).add(way)
    return costs


def machine() -> dict[str, Any]:
    """The machine and what a figure depends on: CPU model, cores and threads in use, load, versions."""
    result: dict[str, Any] = {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": available_cores(),
        "load_average_at_start": _LOAD_AT_START,
        "load_average_at_end": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers", "polars"):
        result[name] = _version(name)
    # Only where it is loaded already: asking must not import torch into a benchmark that does without.
    if (torch := sys.modules.get("torch")) is not None:
        result["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            result["gpu"] = torch.cuda.get_device_name()
    if (polars := sys.modules.get("polars")) is not None:
        result["polars_threads"] = polars.thread_pool_size()
    return result


def cpu_model() -> str:
    """The name of the CPU, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def benchmark_parser(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with the two options of every benchmark, `--repeats` and `--output`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds; the figures are medians over them")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    return parser


def finish(result: Mapping[str, Any], output: Path | None = None, *, show: bool = True) -> None:
    """Add the machine to a result, print it (unless the benchmark has shown it its own way), write it if asked."""
    whole = {**result, "machine": machine()}
    if show:
        print(json.dumps(whole, indent=2))
    if output is not None:
        write_json(whole, output)


def write_json(value: Any, file: Path) -> None:
    """Write a JSON file that appears whole or not at all; folders are made."""
    files.write_json(file, value, indent=2)


def write_parquet(table: Any, file: Path) -> None:
    """Write a polars table that appears whole or not at all; folders are made."""
    files.write_whole(file, table.write_parquet)


def in_a_process(module: str, *arguments: object) -> list[str]:
    """The lines that a module of ours prints in an interpreter of its own.

    Raises:
        RuntimeError: It failed.
    """
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{module} {arguments} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()
