"""How fast a table becomes sequences: fitting, histories, pretraining windows, prompts, lazy rows.

The events are simulated patients (`ehrseq.data.simulate.cohort`), or a dataset of yours.

    python -m benchmarks.speed.bench_tokenizer --patients 10000 --repeats 5 --output runs/bench/tokenizer.json
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.harness import benchmark_parser, finish, in_turns
from ehrseq.data import load_events
from ehrseq.data.simulate.cohort import simulate
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

TASKS = ["mortality_30d", "long_stay_7d", "readmission_30d", "hypertension", "fluid_disorder", "lipid_disorder"]


def rate(work: Callable[[], Any], units: int, repeats: int) -> dict[str, float]:
    """Median units per second of wall and of CPU time (all threads), after one call that is not counted."""
    cost = in_turns({"work": work}, repeats, warm_up=1)["work"]
    return {
        "per_second": units / cost.wall,
        "per_cpu_second": units / cost.cpu,
        "median_seconds": cost.wall,
    }


def label_tables(events: pl.DataFrame, per_task: int) -> dict[str, pl.DataFrame]:
    """Labels at times of the patients' own rows: `per_task` for each patient and task."""
    timed = events.filter(pl.col("time").is_not_null()).select("subject_id", "time")
    tables = {}
    for seed, task in enumerate(TASKS):
        drawn = timed.sample(fraction=1.0, shuffle=True, seed=seed).group_by("subject_id", maintain_order=True)
        tables[task] = (
            drawn.head(per_task).rename({"time": "prediction_time"}).with_columns(boolean_value=pl.lit(False))
        )
    return tables


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--patients", type=int, default=10_000)
    parser.add_argument("--data", type=Path, help="FHIR or MEDS folder to measure on instead")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--labels", type=int, default=10, help="labels for each patient and task")
    parser.add_argument("--lazy-rows", type=int, default=20_000)
    options = parser.parse_args()

    events = load_events(options.data)[0] if options.data else simulate(options.patients, seed=0).events()
    events = events.rechunk()
    count = events.height
    tokenizer = EhrTokenizer.train(events, tasks=TASKS)
    histories = tokenizer.encode_histories(events)
    labels = label_tables(events, options.labels)
    index = histories.index_labels(labels)
    prompts = {task: table.group_by("subject_id", maintain_order=True).head(1) for task, table in labels.items()}
    rows = np.random.default_rng(0).integers(0, len(index), options.lazy_rows)
    windows = histories.windows(options.max_length)
    some_windows = np.random.default_rng(0).integers(0, len(windows), options.lazy_rows)
    length = options.max_length

    def lazily() -> None:
        for row in rows:
            histories.prompted_row(index, row, length)

    def windows_lazily() -> None:
        for row in some_windows:
            windows[row]

    def prompt_table() -> Any:
        return tokenizer.encode_table(events, prompts, max_length=length)

    repeats = options.repeats
    result = {
        "events": count,
        "patients": len(histories),
        "tokens": histories.num_tokens,
        "vocabulary": len(tokenizer),
        "repeats": repeats,
        "train_events": rate(lambda: EhrTokenizer.train(events, tasks=TASKS), count, repeats),
        "encode_histories_events": rate(lambda: tokenizer.encode_histories(events), count, repeats),
        "encode_table_events": rate(lambda: tokenizer.encode_table(events), count, repeats),
        "encode_table_windows_events": rate(lambda: tokenizer.encode_table(events, max_length=length), count, repeats),
        "encode_table_prompts_events": rate(prompt_table, count, repeats),
        "index_labels_rows": rate(lambda: histories.index_labels(labels), len(index), repeats),
        "lazy_prompted_rows": rate(lazily, len(rows), repeats),
        "lazy_window_rows": rate(windows_lazily, len(some_windows), repeats),
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
