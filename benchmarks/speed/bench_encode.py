"""`ehrseq label` and `ehrseq tokenize` on a prepared dataset: events a second, memory, bytes; how near the limit.

The dataset is one of yours (`--data`), or simulated: about a million events, written over and over with other patients,
times and values until there are `--events`. Six tasks are labelled, a tokenizer is fitted, and every patient is encoded
(Arrow and Parquet), by `--workers` processes; beside them, what nothing can be faster than: decoding the columns that
each of them reads, by the same processes, and hashing the files, by which a restart knows them. Ways take turns; rates
are given by CPU seconds (times `--workers`: an idle machine's) and by the clock. Memory is that of all processes
together, sampled in runs of their own.

    python -m benchmarks.speed.bench_encode --events 1e7 --repeats 3 --output runs/bench/encode.json
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.harness import benchmark_parser, finish, in_turns, keep_bytecode
from benchmarks.speed.bench_prepare import Watch
from benchmarks.speed.decoding import decode, nothing
from ehrseq.data.dataset import write_parquet
from ehrseq.data.schema import EVENT_COLUMNS, arrow_schema
from ehrseq.data.shards import dataset_shards
from ehrseq.data.simulate.cohort import simulate
from ehrseq.encode import encode_dataset, fit_tokenizer
from ehrseq.encode.fitting import _COLUMNS as COUNTED_COLUMNS
from ehrseq.tasks.shards import label_dataset
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.work.engine import get_engine
from ehrseq.work.files import file_digest, remove

TASKS = ["mortality_30d", "long_stay_7d", "readmission_30d", "hypertension", "fluid_disorder", "lipid_disorder"]
LABEL_COLUMNS = ("subject_id", "time", "code", "visit_id")
TRAINING = ("pretrain", "train")
BARS = {"label_seconds_at_1e7": 60.0, "fit": 10e6, "encode arrow": 4e6, "encode parquet": 4e6}  # events a second
MOST_BYTES = {"parquet": 1.0, "arrow": 3.0}  # times the dataset's
MEMORY_BAR = 2048  # MiB
PATIENTS = 2500  # of the simulated part: about a million events

_RUN = """
import sys
from ehrseq.encode import tokenize_dataset
from ehrseq.work.engine import get_engine
from ehrseq.tasks.shards import label_dataset
dataset, output, form = sys.argv[1:4]
engine = get_engine(num_workers=int(sys.argv[4]))
if form == "labels":
    label_dataset(dataset, sys.argv[5:], end_of_data="2030-01-01", engine=engine)
else:
    tokenize_dataset(dataset, output, tasks=[], format=form, engine=engine)
"""


def simulated(events: int, folder: Path) -> None:
    """A prepared dataset of about so many events: files of a million, four in five of training patients."""
    part = simulate(PATIENTS, seed=0, progress=False).events()
    copies = max(1, round(events / part.height))
    if events < part.height:
        part = part[:events].filter(pl.col("subject_id") < part["subject_id"][events - 1])
    for copy in range(copies):
        split = ("pretrain", "train", "pretrain", "held_out", "train")[copy % 5]
        file = folder / "data" / split / f"{copy}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        # Other patients, some hours later, with other values (an instrument that reads a little higher).
        rows = part.with_columns(
            pl.col("subject_id") + copy * 10**7,
            pl.col("time") + pl.duration(minutes=61 * copy),
            (pl.col("numeric_value") * (1 + copy / 1000)).round(3).cast(pl.Float32),
        ).select(EVENT_COLUMNS)
        write_parquet(rows.to_arrow().cast(arrow_schema()), file)


def peak(dataset: Path, scratch: Path, form: str, workers: int) -> float:
    """MiB of all processes together, at worst."""
    arguments = [dataset, scratch / "peak", form, workers, *TASKS]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _RUN, *map(str, arguments)], env={**os.environ, "TQDM_DISABLE": "1"}
    )
    watch = Watch(process.pid, scratch / "peak")
    watch.start()
    if process.wait():
        raise RuntimeError(f"the run of {form} failed")
    watch.over.set()
    watch.join()
    remove(scratch / "peak")
    return watch.all / 2**20


def memory_bandwidth() -> float:
    """GB a second of one core that copies."""
    source = np.ones(1 << 26, np.uint8)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        np.copyto(target, source)
        best = min(best, time.process_time() - started)
    return 2 * len(source) / best / 1e9


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--data", type=Path, help="prepared dataset to measure on instead")
    parser.add_argument("--events", type=float, default=1e7, help="events of the simulated dataset, about")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        keep_bytecode(scratch / "bytecode")
        os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
        dataset = options.data or scratch / "dataset"
        if options.data is None:
            simulated(int(options.events), dataset)
        shards = dataset_shards(dataset)
        rows = {shard.path: pl.scan_parquet(shard.path).select(pl.len()).collect().item() for shard in shards}
        events = sum(rows.values())
        fitted = sum(rows[shard.path] for shard in shards if shard.split in TRAINING)
        engine = get_engine(num_workers=options.workers)
        tokenizer = fit_tokenizer(dataset, scratch / "counts", tasks=TASKS, engine=engine)
        remove(scratch / "counts")
        summaries: dict[str, Any] = {}

        def decoded(columns: tuple[str, ...], splits: tuple[str, ...] | None = None) -> None:
            tasks = [(shard, columns) for shard in shards if splits is None or shard.split in splits]
            list(engine.map(decode, tasks, desc="Decoding"))

        def hashed() -> None:
            list(engine.map(file_digest, [shard.path for shard in shards], desc="Hashing"))

        def fit() -> EhrTokenizer:
            remove(scratch / "counts")
            return fit_tokenizer(dataset, scratch / "counts", tasks=TASKS, engine=engine)

        def encode(form: str) -> None:
            remove(scratch / form)
            summaries[form] = encode_dataset(dataset, scratch / form, tokenizer, format=form, engine=engine)

        def label() -> None:
            label_dataset(dataset, TASKS, end_of_data="2030-01-01", engine=engine)

        ways: dict[str, Callable[[], object]] = {
            "workers start": lambda: list(engine.map(nothing, [0] * options.workers, desc="Starting")),
            "hash": hashed,
            "decode for labels": partial(decoded, LABEL_COLUMNS),
            "label": label,
            "decode for fit": partial(decoded, COUNTED_COLUMNS, TRAINING),
            "fit": fit,
            "decode for encode": partial(decoded, EVENT_COLUMNS),
            "encode arrow": partial(encode, "arrow"),
            "encode parquet": partial(encode, "parquet"),
        }
        costs = in_turns(ways, options.repeats)
        memory = {form: peak(dataset, scratch, form, options.workers) for form in ("labels", "arrow", "parquet")}

    of_way = {"fit": fitted, "decode for fit": fitted}
    per_second = {name: of_way.get(name, events) / cost.cpu * options.workers for name, cost in costs.items()}
    limits = {"label": "decode for labels", "fit": "decode for fit"}
    limits |= dict.fromkeys(("encode arrow", "encode parquet"), "decode for encode")
    start = costs["workers start"].cpu
    ratio = {form: summary["bytes"] / summary["source_bytes"] for form, summary in summaries.items()}
    label_at_1e7 = (costs["label"].cpu - start) / options.workers * 1e7 / events + start / options.workers
    result = {
        "events": events,
        "fitted_events": fitted,
        "patients": summaries["arrow"]["patients"],
        "files": len(shards),
        "workers": options.workers,
        "repeats": options.repeats,
        "cpu_seconds": {name: cost.cpu for name, cost in costs.items()},
        "wall_seconds": {name: cost.wall for name, cost in costs.items()},
        "events_per_second_by_cpu": per_second,
        "events_per_second_by_clock": {name: of_way.get(name, events) / cost.wall for name, cost in costs.items()},
        "share_of_decoding": {way: costs[limit].cpu / costs[way].cpu for way, limit in limits.items()},
        "gigabytes_per_second_of_memory": memory_bandwidth(),
        "label_seconds_at_1e7_by_cpu": label_at_1e7,
        "bin_rank_error": tokenizer.fitted["bin_rank_error"],
        "bytes_per_event": {form: summary["bytes"] / events for form, summary in summaries.items()},
        "source_bytes_per_event": summaries["arrow"]["source_bytes"] / events,
        "bytes_over_source": ratio,
        "peak_mebibytes": memory,
        "bars": {**BARS, "bytes_over_source": MOST_BYTES, "peak_mebibytes": MEMORY_BAR},
        "met": {
            "label": label_at_1e7 <= BARS["label_seconds_at_1e7"],
            **{way: per_second[way] >= BARS[way] for way in ("fit", "encode arrow", "encode parquet")},
            **{f"bytes {form}": ratio[form] <= MOST_BYTES[form] for form in ratio},
            "memory": max(memory.values()) <= MEMORY_BAR,
        },
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
