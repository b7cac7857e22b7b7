"""`ehrseq prepare`: throughput beside bare `orjson.loads` and typed parsing, then time, memory and disk by size.

Throughput: the lines of a real FHIR R4 export (below EHRSEQ_DATA, or `--source`; without it simulated ones) several
times over, gzipped, by one process: parsed into rows, and prepared down to Parquet. Typed parsing is fhir.resources'
(pydantic) on a sample of the same lines. Ways take turns, and CPU seconds are compared.

Sizes: a simulated cohort of about as many events is streamed to disk as FHIR R4 (`--fhir 1e5 1e6`) or MEDS
(`--meds 1e6 1e8`) and prepared by a process of its own, whose memory, children included, is sampled.

    python -m benchmarks.speed.bench_prepare --megabytes 280 --repeats 3 --fhir 1e5 1e6 --output runs/bench/prepare.json
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import orjson

from benchmarks.harness import benchmark_parser, finish, in_turns, keep_bytecode
from benchmarks.speed.bench_fhir import bare_orjson, find_source, replicate
from ehrseq.data.fhir.blocks import ReadTask, open_text, read_task
from ehrseq.data.fhir.plan import fhir_files, size_of
from ehrseq.data.simulate.cohort import simulate
from ehrseq.prepare import prepare_dataset
from ehrseq.work.engine import get_engine
from ehrseq.work.files import remove

EVENTS_PER_PATIENT = 415  # of the simulator
SAMPLE = 2000  # lines that are parsed as typed resources
BARS = {"parsing": 0.4, "gzip to Parquet": 0.3, "over typed parsing": 15.0}
MEMORY_BAR = 2048  # MiB

_IMPORTS = """
import sys
from ehrseq.work.engine import get_engine
from ehrseq.prepare import prepare_dataset
"""
_PREPARE = (
    _IMPORTS
    + """
workers = int(sys.argv[3])
report = prepare_dataset(sys.argv[1], sys.argv[2], engine=get_engine(num_workers=workers or None))
print(report.conversion.events_written)
"""
)


def parse(folder: Path) -> None:
    """Every line as rows in arrays, as the first stage parses them."""
    for index, file in enumerate(fhir_files(folder)):
        for _ in read_task(ReadTask(index, str(file))):
            pass


def prepare(folder: Path, dataset: Path) -> None:
    """The whole way, by this process."""
    remove(dataset)
    prepare_dataset(folder, dataset, engine=get_engine(num_workers=1))


def sample_lines(folder: Path) -> list[bytes]:
    """Lines of the types that become events, drawn evenly."""
    models = import_module("fhir.resources.R4B")
    lines: list[bytes] = []
    for file in fhir_files(folder):
        with open_text(str(file)) as stream:
            lines += [line for line in stream.read(4 << 20).splitlines()[:-1] if _model_of(models, line)]
    return random.Random(0).sample(lines, min(SAMPLE, len(lines)))


def _model_of(models: Any, line: bytes) -> Any:
    return models.get_fhir_model_class(orjson.loads(line)["resourceType"]) is not None


def typed(lines: list[bytes]) -> None:
    """The lines as fhir.resources' models."""
    models = import_module("fhir.resources.R4B")
    for line in lines:
        resource = orjson.loads(line)
        models.get_fhir_model_class(resource["resourceType"]).model_validate(resource)


def throughput(options: Any, scratch: Path) -> dict[str, Any]:
    """Megabytes of text a CPU second of each way, and their ratios."""
    folder, few = scratch / "ndjson", scratch / "few"
    folder.mkdir()
    size = replicate(find_source(options.source, scratch), folder, options.megabytes * 10**6, True)
    dataset = scratch / "dataset"
    ways: dict[str, Callable[[], object]] = {
        "orjson.loads": lambda: bare_orjson(folder),
        "parsing": lambda: parse(folder),
        "gzip to Parquet": lambda: prepare(folder, dataset),
    }
    typed_bytes = 0
    try:
        lines = sample_lines(folder)
    except ImportError:
        lines = []
    if lines:
        few.mkdir()
        (few / "lines.ndjson").write_bytes(b"\n".join(lines))
        typed_bytes = sum(map(len, lines))
        ways["fhir.resources"] = lambda: typed(lines)
    costs = in_turns(ways, options.repeats)
    rate = {name: (typed_bytes if name == "fhir.resources" else size) / 1e6 / cost.cpu for name, cost in costs.items()}
    ratios = {name: rate[name] / rate["orjson.loads"] for name in ("parsing", "gzip to Parquet")}
    if lines:
        ratios["over typed parsing"] = rate["parsing"] / rate["fhir.resources"]
    return {
        "megabytes": size / 1e6,
        "megabytes_per_cpu_second": rate,
        "ratios": ratios,
        "bars": BARS,
        "met": {name: ratio >= BARS[name] for name, ratio in ratios.items()},
    }


def write_meds(events: int, folder: Path) -> None:
    """A simulated cohort as MEDS files of some thousand patients, never held whole."""
    (folder / "data" / "all").mkdir(parents=True)
    cohort = simulate(max(1, events // EVENTS_PER_PATIENT), seed=0, progress=False)
    for number, rows in enumerate(cohort.iter_events()):
        rows.write_parquet(folder / "data" / "all" / f"{number}.parquet")


def write_fhir(events: int, folder: Path) -> None:
    """A simulated cohort as FHIR R4 NDJSON, gzipped, never held whole."""
    simulate(max(1, events // EVENTS_PER_PATIENT), seed=0, progress=False).write_fhir(folder, compress=True)


def disk(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # moved in the meantime
            continue
    return total


class Watch(threading.Thread):
    """Samples the memory of a process and its children, and the disk that a hidden folder takes."""

    def __init__(self, pid: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.pid, self.folder = pid, folder
        self.all = self.one = self.disk = 0
        self.over = threading.Event()

    def run(self) -> None:
        """Until it is over."""
        last = 0.0
        while not self.over.wait(0.05):
            sizes = [_resident(pid) for pid in _family(self.pid)]
            self.all, self.one = max(self.all, sum(sizes)), max(self.one, *sizes, 0)
            if time.monotonic() - last > 1:
                self.disk, last = max(self.disk, disk(self.folder)), time.monotonic()


def _family(pid: int) -> list[int]:
    found = [pid]
    for known in found:
        for task in Path(f"/proc/{known}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def at_size(kind: str, events: int, workers: int | None, scratch: Path) -> dict[str, Any]:
    """Cost of preparing a simulated cohort of about so many events."""
    source, dataset = scratch / f"{kind}-{events}", scratch / "dataset"
    (write_meds if kind == "meds" else write_fhir)(events, source)
    remove(dataset)
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _PREPARE, str(source), str(dataset), str(workers or 0)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    watch = Watch(process.pid, scratch / ".dataset.preparing")
    watch.start()
    output, _ = process.communicate()
    wall = time.perf_counter() - started
    after = os.times()
    watch.over.set()
    watch.join()
    if process.returncode:
        raise RuntimeError(f"preparing {kind} of {events} events failed")
    written = int(output)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    result = {
        "source": kind,
        "events": written,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "events_per_cpu_second": written / cpu,
        "peak_mebibytes_all_processes": watch.all / 2**20,
        "peak_mebibytes_largest_process": watch.one / 2**20,
        "within_memory": watch.all / 2**20 < MEMORY_BAR,
        "source_bytes": disk(source),
        "source_text_bytes": sum(size_of(file) for file in fhir_files(source)) if kind == "fhir" else None,
        "peak_bytes_beside_the_dataset": watch.disk,
        "dataset_bytes": disk(dataset),
    }
    remove(source)
    remove(dataset)
    return result


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--source", type=Path, help="folder of FHIR R4 NDJSON")
    parser.add_argument("--megabytes", type=int, default=280, help="megabytes of text for throughput; 0: none")
    parser.add_argument("--fhir", type=float, nargs="*", default=[1e5, 1e6], help="events, simulated as FHIR R4")
    parser.add_argument("--meds", type=float, nargs="*", default=[1e6], help="events, simulated as MEDS")
    parser.add_argument("--workers", type=int, default=None, help="processes at the sizes; default: one a core")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for what is simulated and prepared")
    options = parser.parse_args()
    result: dict[str, Any] = {"repeats": options.repeats}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        keep_bytecode(scratch / "bytecode")
        if options.megabytes:
            result |= throughput(options, scratch)
        subprocess.run([sys.executable, "-P", "-c", _IMPORTS], check=True)  # compiles what the first size would pay for
        sizes = [("fhir", size) for size in options.fhir] + [("meds", size) for size in options.meds]
        result["sizes"] = [at_size(kind, int(size), options.workers, scratch) for kind, size in sizes]
    finish(result, options.output)


if __name__ == "__main__":
    main()
