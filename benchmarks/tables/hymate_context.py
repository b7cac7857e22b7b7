r"""What a longer context gives HyMaTE and what it costs: 1,000 to 8,000 triplets a stay, with and without attention.

The stays are simulated (ehrseq/data/simulate/stays.py): about 9,000 triplets in 48 hours, and in four stays of ten a
bout of shock that raises the risk and leaves no trace after its four hours. Of a stay the most recent triplets are
read, so that a context of a ninth of the record misses most bouts. Every cell, one (row, max_length, seed), trains a
small model from random weights and scores fresh stays. It is a folder with `scores.parquet` and `result.json`, written
once and kept: a run that was stopped goes on with what is missing.

    AUROC      on fresh stays, mean over seeds, with a 95 % interval over stays
    at most    on average: AUROC of one who knows the hidden courses and sees the bouts that lie in the same triplets
    costs      of batches of 8 stays, each as long as the context, random triplets, in a process of its own: stays
               trained a CPU-second, a forward pass, how far the peak of a training step lies above what was held before

    python -m benchmarks.tables.hymate_context --output runs/context              # about 18 minutes on one thread
    python -m benchmarks.tables.hymate_context --output runs/context --report     # the table of what is there
    python -m benchmarks.tables.hymate_context --output /tmp/context --quick      # seconds: does it run?
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.harness import Costs, machine, write_json, write_parquet
from benchmarks.speed.bench_memory import MIB, peak_of
from ehrseq.batches.scoring import score_stays
from ehrseq.batches.triplet_collation import DataCollatorForTriplets
from ehrseq.data.physionet2012.codes import TASK_CONFIG
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.simulate.stays import (
    HOURS,
    SHOCK_HOURS,
    SHOCK_SHARE,
    STAYS_SIMULATOR_VERSION,
    SimulatedStays,
    simulate_stays,
)
from ehrseq.encode.triplets import PHYSIONET2012, TripletTable, build_triplets
from ehrseq.evaluation import Interval, auroc, bootstrap_interval
from ehrseq.evaluation.metrics import Ranking
from ehrseq.modeling.configuration_hymate import HyMaTEConfig
from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.training import Stage, TripletRecipe, finetune, hold_out_stays

LENGTHS = (1000, 2000, 4000, 8000)
ROWS = {"mamba": 0, "mamba_attention": 1}  # self-attention blocks behind the Mamba blocks
BATCH = 8
# One head: attention's cost on a CPU grows with the number of heads, not with the width.
MODEL = {
    "hidden_size": 16,
    "num_mamba_layers": 2,
    "num_attention_heads": 1,
    "state_size": 8,
    "hidden_dropout_prob": 0.0,
}
QUICK = {"lengths": [40, 320], "stays": 60, "reported": 40, "epochs": 1, "density": 2}
FIRST_RECORDS = {"stays": 1, "reported": 500_001}  # RecordIDs: no stay is in both
SHOWN_COSTS = ("training_stays_per_cpu_second", "forward_cpu_ms_per_stay", "peak_step_mib")
Cells = list[tuple[dict[str, Any], pl.DataFrame]]
"""(result, scores) of one row and length, a seed each."""


def recipe_of(row: str, max_length: int, epochs: int) -> TripletRecipe:
    """How a cell is trained: nothing but row and length differs between cells."""
    stage = Stage(epochs=epochs, learning_rate=8e-3, schedule="cosine", batch_size=BATCH, patience=epochs)
    return TripletRecipe(
        name=f"{row}_{max_length}",
        model={**MODEL, "num_attention_layers": ROWS[row]},
        pretrain=None,
        finetune=stage,
        max_length=max_length,
        variable_dropout=0.0,
        weigh_classes=False,
    )


class Stays:
    """The simulated stays, drawn and read through the challenge's files when a cell first asks for them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._read: dict[str, tuple[SimulatedStays, TripletTable]] = {}

    def __getitem__(self, name: str) -> tuple[SimulatedStays, TripletTable]:
        if name not in self._read:
            size, first = self._settings[name], FIRST_RECORDS[name]
            print(f"simulating {size} stays ...", file=sys.stderr, flush=True)
            options = {key: self._settings[key] for key in ("density", "shock_effect")}
            simulated = simulate_stays(size, self._settings["stays_seed"], first_record=first, **options)
            with tempfile.TemporaryDirectory() as folder:
                loaded = load_physionet2012(simulated.write(folder))
            self._read[name] = simulated, build_triplets(loaded.events, PHYSIONET2012, loaded.labels)
        return self._read[name]


def first_minutes(table: TripletTable, max_length: int) -> np.ndarray:
    """Minute from which on a stay is read, [s]; 0 where all of it is."""
    first = np.maximum(table.offsets[1:] - max_length, table.offsets[:-1])
    return np.where(first > table.offsets[:-1], table.minutes[first], 0.0)


def read_shocks(simulated: SimulatedStays, table: TripletTable, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the table's stays among the simulated, whether a bout of shock lies in what is read), [s] each."""
    at = np.searchsorted(simulated.record_ids, table.subject_ids)
    shocks = simulated.shocks[at]
    return at, (shocks >= 0) & ((shocks + SHOCK_HOURS) * 60 > first_minutes(table, max_length))


def best_scores(simulated: SimulatedStays, table: TripletTable, max_length: int, shock_effect: float) -> np.ndarray:
    """P(death | the hidden course, and the bout of shock where it lies in what is read), [s].

    Where none lies there, a bout may have ended before: P = SHOCK_SHARE * share of the starts that end in time.
    """
    at, seen = read_shocks(simulated, table, max_length)
    starts = np.arange(HOURS - SHOCK_HOURS + 1)
    ended = ((starts + SHOCK_HOURS) * 60 <= first_minutes(table, max_length)[:, None]).mean(1)
    unseen = SHOCK_SHARE * ended / (SHOCK_SHARE * ended + 1 - SHOCK_SHARE)
    true = simulated.true_risks[at]
    calm = np.log(true / (1 - true)) - shock_effect * (simulated.shocks[at] >= 0)
    with_shock, without = (1 / (1 + np.exp(-(calm + effect))) for effect in (shock_effect, 0.0))
    return np.where(seen, with_shock, unseen * with_shock + (1 - unseen) * without)


def run_cell(
    stays: Stays, settings: dict[str, Any], row: str, max_length: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Train one cell, score fresh stays, measure; write `scores.parquet` and, last, `result.json`; return it."""
    costs = costs_in_own_process(row, max_length, settings["threads"])
    train, tuning = hold_out_stays(stays["stays"][1])
    extractor = HyMaTEFeatureExtractor.fit(train)
    checkpoint = folder / "outcome"
    start = time.process_time()
    recipe = recipe_of(row, max_length, settings["epochs"])
    trained = finetune(recipe, extractor, train, tuning, checkpoint, task=TASK_CONFIG, seed=seed)
    seconds = time.process_time() - start
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    simulated, reported = stays["reported"]
    scores = score_stays(model, extractor, reported, max_length=max_length, batch_size=BATCH)
    labels: Any = reported.labels
    table = pl.DataFrame({"subject_id": reported.subject_ids, "label": labels, "score": scores})
    write_parquet(table, folder / "scores.parquet")
    at, seen = read_shocks(simulated, reported, max_length)
    result = {
        "settings": settings,
        "row": row,
        "max_length": max_length,
        "seed": seed,
        "auroc": auroc(labels, scores),
        "best_auroc": auroc(labels, best_scores(simulated, reported, max_length, settings["shock_effect"])),
        "shocks_read": float(seen.sum() / max(1, (simulated.shocks[at] >= 0).sum())),
        "stays_cut": float((reported.lengths > max_length).mean()),
        "median_triplets": float(np.median(reported.lengths)),
        "deaths": float(np.mean(labels)),
        "costs": costs,
        "training_cpu_seconds": seconds,
        "finetune": trained,
        "machine": machine(),
    }
    write_json(result, result_file(folder))
    return result


def result_file(folder: Path) -> Path:
    """What says that a cell is done."""
    return folder / "result.json"


def costs_in_own_process(row: str, max_length: int, threads: int) -> dict[str, Any]:
    """Run `measure_costs` in a fresh process, where nothing else has raised the peak."""
    command = [sys.executable, __file__, "--child", row, str(max_length), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {row} at {max_length} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_costs(row: str, max_length: int, repeats: int = 3) -> dict[str, Any]:
    """Memory of a training step (forward, backward, AdamW), then CPU seconds of it and of a forward pass."""
    torch.manual_seed(0)
    config = HyMaTEConfig(**MODEL, num_attention_layers=ROWS[row])
    model = HyMaTEForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    def forward(batch: dict[str, torch.Tensor]) -> None:
        with torch.inference_mode():
            model(**batch)

    batch = random_batch(config, max_length)
    step(random_batch(config, 16))  # libraries load what they need, the optimiser's state is made
    before, peak = peak_of(lambda: step(batch))  # first of all: later the allocator holds what it once had
    training, predicting = Costs(), Costs()
    for _ in range(repeats):
        training.add(lambda: step(batch))
    model.eval()
    for _ in range(repeats):
        predicting.add(lambda: forward(batch))
    return {
        "batch_size": BATCH,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_stays_per_cpu_second": BATCH / training.cpu,
        "forward_cpu_ms_per_stay": 1000 * predicting.cpu / BATCH,
        "peak_step_mib": (peak - before) / MIB,
        "held_mib": before / MIB,
        "all_training_cpu_seconds": training.cpu_all,
        "all_forward_cpu_seconds": predicting.cpu_all,
    }


def random_batch(config: HyMaTEConfig, length: int) -> dict[str, torch.Tensor]:
    """Stays of random triplets, all of one length."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "variable_ids": rng.integers(0, config.num_variables, length),
            "times": np.sort(rng.uniform(-1, 1, length)).astype(np.float32),
            "values": rng.normal(size=length).astype(np.float32),
            "attention_mask": np.ones(length, np.int64),
            "static_values": rng.normal(size=config.num_static).astype(np.float32),
            "labels": number % 2,
        }
        for number in range(BATCH)
    ]
    return DataCollatorForTriplets(SimpleNamespace(padding_side="right"))(rows)


def finished(output: Path) -> dict[tuple[int, str], Cells]:
    """(max_length, row) -> (result, scores) of its finished seeds, in the table's order."""
    cells: dict[tuple[int, str], Cells] = {}
    for file in sorted(output.glob("*/*/seed*/result.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        scores = pl.read_parquet(file.with_name("scores.parquet"))
        cells.setdefault((result["max_length"], result["row"]), []).append((result, scores))
    return dict(sorted(cells.items()))


def report(output: Path) -> Iterator[str]:
    """Lines of the Markdown table of what is there, and what it was made with."""
    cells = finished(output)
    if not cells:
        yield "Nothing is done yet."
        return
    results = [result for done in cells.values() for result, _ in done]
    if any(result["settings"] != results[0]["settings"] for result in results):
        raise SystemExit(f"{output} holds cells of different settings: give one folder to each.")
    shortest = min(length for length, _ in cells)
    yield (
        f"| triplets read | row | seeds | bouts of shock in them | AUROC | at most | AUROC over {shortest} "
        "| trained stays a CPU-s | forward, CPU-ms a stay | peak of a step, MiB |"
    )
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for (length, row), done in cells.items():
        first = done[0][0]
        costs = {name: np.median([result["costs"][name] for result, _ in done]) for name in SHOWN_COSTS}
        bar = cells.get((shortest, row))
        over = "" if bar is None or length == shortest else str(auroc_of(done, bar))
        shown = [f"{length:,}", row, str(len(done)), f"{first['shocks_read']:.0%}", str(auroc_of(done))]
        shown += [f"{first['best_auroc']:.3f}", over, *(f"{costs[name]:.3g}" for name in SHOWN_COSTS[:2])]
        yield "| " + " | ".join([*shown, f"{costs[SHOWN_COSTS[2]]:,.0f}"]) + " |"
    yield ""
    settings, cpu = results[0]["settings"], results[0]["machine"]
    seeds = sorted({result["seed"] for result in results})
    total = sum(result["training_cpu_seconds"] for result in results)
    yield (
        f"Settings: {', '.join(f'{name} {value}' for name, value in settings.items())}; training seeds {seeds}. "
        f"Reported stays: {len(next(iter(cells.values()))[0][1])}, median {results[0]['median_triplets']:,.0f} "
        f"triplets, {results[0]['deaths']:.0%} deaths. Training took {total:,.0f} CPU-seconds in all. {cpu['cpu']}, "
        f"torch {cpu['torch']}, {cpu['torch_threads']} thread(s)."
    )


def auroc_of(done: Cells, others: Cells | None = None) -> Interval:
    """Mean AUROC over seeds with its interval over stays; with `others` the paired difference to theirs."""
    subjects = done[0][1]["subject_id"]
    if not all(table["subject_id"].equals(subjects) for _, table in [*done, *(others or [])]):
        raise SystemExit("cells of one folder hold other stays: were they made by other versions?")
    ours, theirs = (
        [Ranking(table["label"].to_numpy(), table["score"].to_numpy()) for _, table in cells]
        for cells in (done, others or [])
    )

    def value(weights: Any) -> Any:
        mean = np.mean([ranking.auroc(weights) for ranking in ours], axis=0)
        return mean - np.mean([ranking.auroc(weights) for ranking in theirs], axis=0) if theirs else mean

    return bootstrap_interval(value, subjects.to_numpy(), num_resamples=1000)


def is_done(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a cell needs no run.

    Raises:
        SystemExit: It was run with other settings.
    """
    if not result_file(folder).is_file():
        return False
    theirs = json.loads(result_file(folder).read_text(encoding="utf-8"))["settings"]
    if theirs != settings:
        raise SystemExit(f"{folder} was made with {theirs}; got {settings}. Give another --output.")
    return True


def main() -> None:
    """Run the missing cells, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/context"), help="folder of the cells")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="what is trained")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="triplets read of a stay at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and order, one or more")
    parser.add_argument("--stays", type=int, default=500, help="to learn from, a fifth of them to choose the epoch")
    parser.add_argument("--reported", type=int, default=600, help="fresh stays that are scored")
    parser.add_argument("--stays_seed", type=int, default=0, help="of the simulated stays")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the stays, a cosine schedule over all")
    parser.add_argument("--density", type=int, default=30, help="of simulate_stays: 300 triplets a stay each")
    parser.add_argument(
        "--shock_effect", type=float, default=4.0, help="of simulate_stays: log-odds of a bout of shock"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, train nothing")
    parser.add_argument("--quick", action="store_true", help="few and short stays: does it run?")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure_costs(options.child[0], int(options.child[1]))))
        return
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    names = ("stays", "reported", "stays_seed", "epochs", "density", "shock_effect", "threads")
    settings = {name: getattr(options, name) for name in names} | {"simulator": STAYS_SIMULATOR_VERSION}
    if not options.report:
        print(f"{settings}, lengths {options.lengths}, training seeds {options.seeds}", file=sys.stderr, flush=True)
        stays = Stays(settings)
        for seed in options.seeds:
            for length in options.lengths:
                for row in options.rows:
                    folder = options.output / row / str(length) / f"seed{seed}"
                    if is_done(folder, settings):
                        continue
                    folder.mkdir(parents=True, exist_ok=True)
                    print(f"{row} {length} seed {seed} ...", file=sys.stderr, flush=True)
                    done = run_cell(stays, settings, row, length, seed, folder)
                    print(f"  AUROC {done['auroc']:.4f}", file=sys.stderr, flush=True)
    print("\n".join(report(options.output)))


if __name__ == "__main__":
    main()
