"""FHIR NDJSON to a MEDS dataset on disk: megabytes of uncompressed lines a second, beside bare `orjson.loads` of the
same lines.

The lines are real (a FHIR R4 export below EHRSEQ_DATA, or `--source`) or, without that, simulated. They are written
several times over, each copy with ids and hours of its own, so that neither references nor times repeat from copy to
copy. The measured ways alternate, so that a busy machine slows all alike; the ratio to orjson compares machines.

    python -m benchmarks.speed.bench_fhir --megabytes 400 --repeats 5 --output runs/bench/fhir.json
"""

import gzip
import multiprocessing
import os
import re
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from benchmarks.harness import benchmark_parser, finish, in_turns, keep_bytecode
from ehrseq.data import read_fhir, write_dataset
from ehrseq.data.fhir.blocks import is_ndjson, open_text
from ehrseq.data.fhir.plan import fhir_files

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = 120.0  # MB/s

_ID = re.compile(rb"\b([0-9a-f]{8})(-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})\b")
_HOUR = re.compile(rb"(\d{4}-\d{2}-\d{2}T)(\d{2})(:\d{2}:)")


def find_source(given: Path | None, scratch: Path) -> Path:
    """A folder of NDJSON: the given one, a real export below EHRSEQ_DATA, else a simulated one."""
    if given is not None:
        return given
    data = Path(os.environ.get("EHRSEQ_DATA", REPOSITORY.parent / "shared" / "data"))
    for name in ("mimic-iv-fhir-demo/2.1.0/fhir", "synthea-r4/ndjson"):
        if (data / name).is_dir():
            return data / name
    from ehrseq.data.simulate.cohort import simulate

    simulate(300, seed=0).write_fhir(scratch / "simulated")
    return scratch / "simulated"


def replicate(source: Path, target: Path, size: int, packed: bool) -> int:
    """Write copies of the lines of `source` until there are `size` bytes of text; returns the bytes."""
    texts = {}
    for file in fhir_files(source):
        if is_ndjson(str(file)):
            with open_text(str(file)) as stream:
                texts[file.name.removesuffix(".gz")] = stream.read()
    copies = max(1, round(size / sum(map(len, texts.values()))))
    total = 0
    for name, text in texts.items():
        parts = []
        for copy in range(copies):
            other = _ID.sub(lambda m, c=copy: b"%08x%b" % ((int(m[1], 16) + c) % 2**32, m[2]), text)
            other = _HOUR.sub(lambda m, c=copy: b"%b%02d%b" % (m[1], (int(m[2]) + c) % 24, m[3]), other)
            parts.append(other if other.endswith(b"\n") else other + b"\n")
        whole = b"".join(parts)
        total += len(whole)
        path = target / (name + ".gz" if packed else name)
        path.write_bytes(gzip.compress(whole, 6) if packed else whole)
    return total


def bare_orjson(folder: Path) -> None:
    """Read and parse every line, and do nothing with it."""
    for file in fhir_files(folder):
        with open_text(str(file)) as stream:
            carry = b""
            while chunk := stream.read(8 << 20):
                text = carry + chunk
                cut = text.rfind(b"\n") + 1
                carry = text[cut:]
                for line in text[:cut].split(b"\n"):
                    if line:
                        orjson.loads(line)


def convert(folder: Path, dataset: Path, workers: int | None) -> int:
    """FHIR to a dataset on disk; returns the number of events."""
    table, report = read_fhir(folder, progress=False, num_workers=workers)
    write_dataset(table, dataset, dataset_name="benchmark", report=report, overwrite=True)
    return table.height


def peak_memory(folder: Path, dataset: Path, workers: int | None, results: Any) -> None:
    """Convert in a process of its own: events, and peak megabytes of that process and of its largest worker."""
    events = convert(folder, dataset, workers)
    own, worker = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    results.put((events, own, worker))


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--source", type=Path, help="folder of FHIR R4 NDJSON")
    parser.add_argument("--megabytes", type=int, default=400, help="megabytes of text to convert, about")
    parser.add_argument("--workers", type=int, default=None, help="processes; default: one a core")
    parser.add_argument("--plain", action="store_true", help="uncompressed files (default: gzip, as servers export)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        keep_bytecode(Path(scratch) / "bytecode")
        folder = Path(scratch) / "ndjson"
        folder.mkdir()
        source = find_source(options.source, Path(scratch))
        size = replicate(source, folder, options.megabytes * 10**6, not options.plain)
        dataset = Path(scratch) / "dataset"

        ways: dict[str, Callable[[], object]] = {
            "orjson.loads, one core": lambda: bare_orjson(folder),
            "FHIR -> MEDS on disk, one process": lambda: convert(folder, dataset, 1),
            "FHIR -> MEDS on disk, all workers": lambda: convert(folder, dataset, options.workers),
        }
        costs = in_turns(ways, options.repeats)
        os.environ["PYTHONSAFEPATH"] = "1"  # what is spawned finds modules as this process does
        spawn = multiprocessing.get_context("spawn")
        results = spawn.SimpleQueue()
        process = spawn.Process(target=peak_memory, args=(folder, dataset, options.workers, results))
        process.start()
        process.join()
        events, peak_own, peak_worker = results.get()

    rate = {name: size / 1e6 / cost.wall for name, cost in costs.items()}
    cpu_rate = {name: size / 1e6 / cost.cpu for name, cost in costs.items()}
    bare, single, whole = rate.values()
    result = {
        "source": source.name if options.source else "/".join(source.parts[-3:]),
        "megabytes": size / 1e6,
        "gzip": not options.plain,
        "events": events,
        "repeats": options.repeats,
        "megabytes_per_second": rate,
        "megabytes_per_cpu_second": cpu_rate,
        "one_process_over_orjson": single / bare,
        "all_workers_over_orjson": whole / bare,
        "target_megabytes_per_second": TARGET,
        "peak_megabytes_this_process": peak_own,
        "peak_megabytes_a_worker": peak_worker,
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
