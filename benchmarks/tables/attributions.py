r"""Which explanation to believe: methods x measures on simulated patients whose true risk is known.

EhrMamba is the checkpoint that comes with the package (or another, `--checkpoint`), HyMaTE a small one that is trained
here and kept. Both are asked about patients, or stays, that no training saw, of another seed. A row is a method, with
numbers drawn by chance and gradient x input beside the others; a figure is the mean over questions with its 95 %
interval over patients.

    truth: AUROC        do events that carry the true risk have the larger contributions? (0.5 = chance)
    truth: Spearman     do contributions rank as the true risk changes when an event is taken out? (0 = chance)
    truth: by code      the same of the sums by code, and of all events of a code taken out
    truth: as it came   do contributions rank as the true risk moved when each event was recorded? (0 = chance)
    comprehensiveness   log-odds that the model loses without the top events (more is better)
    sufficiency         log-odds that it loses with nothing else (less is better)
    left                share of the log-odds that the contributions leave unexplained
    random weights      rank correlation with the explanation of an untrained model (near 0 is better)
    seeds               rank correlation under other seeds of the method (1 is the same)

Of stays the truth is which triplets a planted bout of shock moved; their hidden course gives no risk without a triplet,
so that there is no rank correlation. Comparisons are paired: the same questions, the difference and its interval, with
+ or - where it leaves 0 out. The recommended method (of `explain` without a name) is printed in bold.

    python -m benchmarks.tables.attributions --output runs/attributions           # about 20 minutes on one thread
    python -m benchmarks.tables.attributions --output runs/attributions --report  # the table of what is there
    python -m benchmarks.tables.attributions --output /tmp/attributions --quick   # does it run?
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.harness import machine, write_json, write_parquet
from ehrseq.data.physionet2012.codes import ADMISSION_TIME, TASK_CONFIG
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.simulate import simulate
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.data.simulate.truth import true_changes, true_deltas
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.evaluation import Interval, bootstrap_interval
from ehrseq.hub.checkpoints import Checkpoint, load_checkpoint
from ehrseq.hub.families import STARTER
from ehrseq.interpretability.faithfulness import (
    agreement,
    completeness,
    event_contributions,
    rank_correlation,
    removable_events,
    removal,
    sanity,
    stability,
)
from ehrseq.interpretability.methods import default_method, methods_of
from ehrseq.interpretability.questions import Question, read_question
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.training import Stage, TripletRecipe, finetune, hold_out_stays

CHANCE, GRADIENT = "random_contributions", "gradient_times_input"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    CHANCE: (CHANCE, {}),
    GRADIENT: (GRADIENT, {}),
    "prefix_deltas": ("prefix_deltas", {}),
    "occlusion": ("occlusion", {"groups": "event"}),
    "relevance": ("relevance", {}),
    "integrated_gradients": ("integrated_gradients", {"nodes": 32}),
    "integrated_gradients, from the mean code": ("integrated_gradients", {"nodes": 32, "baseline": "mean"}),
    "integrated_gradients, from the kinds": ("integrated_gradients", {"nodes": 32, "baseline": "structure"}),
    "integrated_gradients, noise": ("integrated_gradients", {"nodes": 16, "noise": 4, "noise_share": 0.2}),
}
"""Row -> (method, its settings); a row that a model lacks is left out."""
SEEDED = (CHANCE, "integrated_gradients, noise")
MEASURES = {
    "auroc": "truth: AUROC",
    "spearman": "truth: Spearman",
    "by_code": "truth: by code",
    "as_it_came": "truth: as it came",
    "comprehensiveness": "comprehensiveness",
    "sufficiency": "sufficiency",
    "left": "left",
    "sanity": "random weights",
    "stability": "seeds",
}
COMPARED = ("auroc", "spearman", "by_code", "as_it_came", "comprehensiveness", "sufficiency")
TASKS = ("mortality_30d", "readmission_30d", "lipid_disorder")
PATIENTS_SEED = 2021  # the starting checkpoint has seen seed 0
SHOCK_EFFECT = 4.0
RECIPE = TripletRecipe(
    name="small",
    model={
        "hidden_size": 16,
        "num_mamba_layers": 2,
        "num_attention_layers": 1,
        "num_attention_heads": 1,
        "state_size": 8,
        "hidden_dropout_prob": 0.0,
    },
    pretrain=None,
    finetune=Stage(epochs=12, learning_rate=8e-3, schedule="cosine", batch_size=16, patience=12),
    max_length=500,
    variable_dropout=0.0,
    weigh_classes=False,
)


@dataclass
class Asked:
    """A question and the truth about its events.

    Attributes:
        subject: The patient's number.
        task: Name of the task.
        question: What is explained.
        carries: Whether each event bears on the true risk.
        by_event: How the true risk changes without it, None where that is not known.
        by_code: How it changes without any event of its code.
        deltas: How it moved when the event was recorded.
    """

    subject: int
    task: str
    question: Question
    carries: np.ndarray
    by_event: np.ndarray | None = None
    by_code: np.ndarray | None = None
    deltas: np.ndarray | None = None


# -- questions whose answers are known -------------------------------------------------------------------------------


def asked_patients(checkpoint: Checkpoint, patients: int, tasks: Iterable[str]) -> Iterator[Asked]:
    """Every task at one discharge of each simulated patient, where the true risk is known."""
    cohort = simulate(patients, seed=PATIENTS_SEED, progress=False)
    events = cohort.events().partition_by("subject_id", as_dict=True)
    discharges = cohort.admissions().filter("alive").group_by("subject_id", maintain_order=True)
    for subject, end in discharges.agg(pl.col("end").last()).iter_rows():
        record = events[(subject,)]
        for task in tasks:
            if np.isnan(cohort.true_risk(task, [subject], [end])[0]):
                continue
            patient = {"subject_id": subject, "events": record.drop("subject_id").to_dicts()}
            question = read_question(checkpoint, patient, task, prediction_time=end)
            truth = true_changes(record, task, end)
            if question.has_answer and len(removable_events(question)) > 1:
                deltas = true_deltas(record, task, end)
                yield Asked(subject, task, question, truth.carries, truth.by_event, truth.by_code, deltas)


def asked_stays(checkpoint: Checkpoint, stays: int) -> Iterator[Asked]:
    """Fresh stays; of those with a bout of shock it is known which triplets it moved."""
    simulated = simulate_stays(stays, PATIENTS_SEED, first_record=500_001, shock_effect=SHOCK_EFFECT)
    with tempfile.TemporaryDirectory() as folder:
        events = load_physionet2012(simulated.write(folder)).events
    shock = simulated.rows.filter(simulated.in_shock()).select("stay", "minute", "parameter").rows()
    moved = {(int(simulated.record_ids[stay]), minute, parameter) for stay, minute, parameter in shock}
    for (subject,), record in events.partition_by("subject_id", as_dict=True, maintain_order=True).items():
        patient = {"subject_id": subject, "events": record.drop("subject_id").to_dicts()}
        try:
            question = read_question(checkpoint, patient, TASK_CONFIG["name"])
        except ValueError as error:
            print(f"stay {subject} is left out: {error}", file=sys.stderr)  # some stays hold no series
            continue
        keys = [(subject, _minute(event.time), event.code.rpartition("//")[2]) for event in question.events]
        yield Asked(subject, TASK_CONFIG["name"], question, np.array([key in moved for key in keys]))


def _minute(time: int | None) -> int:
    """Whole minutes since the admission."""
    return (
        -1
        if time is None
        else (datetime(1970, 1, 1) + timedelta(microseconds=time) - ADMISSION_TIME) // timedelta(minutes=1)
    )


def trained_hymate(folder: Path, stays: int, epochs: int, seed: int = 0) -> Checkpoint:
    """The small HyMaTE of this table, trained once and kept."""
    if not (folder / "config.json").is_file():
        print(f"training HyMaTE on {stays} stays ...", file=sys.stderr, flush=True)
        simulated = simulate_stays(stays, seed, shock_effect=SHOCK_EFFECT)
        with tempfile.TemporaryDirectory() as files:
            loaded = load_physionet2012(simulated.write(files))
        train, tuning = hold_out_stays(build_triplets(loaded.events, PHYSIONET2012, loaded.labels))
        stage = Stage(**{**vars(RECIPE.finetune), "epochs": epochs, "patience": epochs})
        recipe = TripletRecipe(**{**vars(RECIPE), "finetune": stage})
        told = finetune(recipe, HyMaTEFeatureExtractor.fit(train), train, tuning, folder, task=TASK_CONFIG, seed=seed)
        print(f"  {json.dumps(told, default=str)[:400]}", file=sys.stderr, flush=True)
    return load_checkpoint(folder)


# -- what is measured --------------------------------------------------------------------------------------------------


def measure(row: str, asked: Asked, threshold: float, is_checked: bool) -> dict[str, float]:
    """The measures of one method on one question; `is_checked`: the costly ones too."""
    name, settings = ROWS[row]
    question = asked.question
    method: Callable[..., Any] = methods_of(question.checkpoint.model)[name].load()
    settings = {**settings, "seed": asked.subject} if row in SEEDED else settings
    start = time.perf_counter()
    explanation = method(question, **settings)
    seconds = time.perf_counter() - start
    values = event_contributions(explanation, question)
    places = removable_events(question)
    changes = None if asked.by_event is None else asked.by_event[places]
    truth = agreement(values[places], asked.carries[places], changes)
    lost = removal(question, values, threshold=threshold)
    found = {
        "auroc": truth.auroc,
        "spearman": truth.spearman,
        "by_code": _by_code(asked, values, places),
        "as_it_came": _as_it_came(asked, values, places),
        "comprehensiveness": lost.comprehensiveness,
        "sufficiency": lost.sufficiency,
        "risk_comprehensiveness": lost.risk_comprehensiveness,
        "risk_sufficiency": lost.risk_sufficiency,
        "left": completeness(explanation),
        "seconds": seconds,
    }
    if is_checked:
        found["sanity"] = sanity(question, method, **settings)
        fixed = {key: value for key, value in settings.items() if key != "seed"}
        found["stability"] = stability(question, method, [1, 2, 3], **fixed) if row in SEEDED else 1.0
    return found


def _by_code(asked: Asked, values: np.ndarray, places: np.ndarray) -> float:
    if asked.by_code is None:
        return float("nan")
    codes = np.array([asked.question.events[place].code for place in places])
    names, which = np.unique(codes, return_inverse=True)
    sums = np.bincount(which, values[places], len(names))
    changes = np.zeros(len(names))
    changes[which] = asked.by_code[places]
    return rank_correlation(sums, changes)


def _as_it_came(asked: Asked, values: np.ndarray, places: np.ndarray) -> float:
    if asked.deltas is None:
        return float("nan")
    timed = places[np.isfinite(asked.deltas[places])]  # static facts did not come
    return rank_correlation(values[timed], asked.deltas[timed])


def run_model(name: str, questions: list[Asked], rows: list[str], checked: int) -> pl.DataFrame:
    """One line a question and row."""
    scores = {}
    for asked in questions:
        with torch.no_grad():
            scores.setdefault(asked.task, []).append(float(torch.sigmoid(asked.question.log_odds())[0]))
    # What is predicted of a rare outcome is told from its mean risk, or it would never be predicted.
    thresholds = {task: min(max(float(np.mean(values)), 1e-6), 1 - 1e-6) for task, values in scores.items()}
    lines = []
    for row in rows:
        start = time.perf_counter()
        for number, asked in enumerate(questions):
            found = measure(row, asked, thresholds[asked.task], number < checked)
            lines.append({"model": name, "method": row, "subject_id": asked.subject, "task": asked.task, **found})
        print(f"{name}: {row}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return pl.DataFrame(lines, infer_schema_length=None)


# -- the table --------------------------------------------------------------------------------------------------------


def interval_of(values: np.ndarray, subjects: np.ndarray) -> Interval | None:
    """Mean over the questions that have a value, with its interval over patients; None where none has."""
    known = np.isfinite(values)
    if not known.any():
        return None
    values, subjects = values[known], subjects[known]

    def mean(weights: Any) -> Any:
        return values.mean(keepdims=True) if weights is None else weights @ values / weights.sum(1)

    return bootstrap_interval(mean, subjects)


def tables(lines: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """One entry a model: intervals of each row and measure, and differences of its recommended method."""
    for (model,), part in lines.group_by("model", maintain_order=True):
        rows = {row: table for (row,), table in part.group_by("method", maintain_order=True)}
        measures = {
            row: {
                m: interval_of(table[m].to_numpy(), table["subject_id"].to_numpy())
                for m in MEASURES
                if m in table.columns
            }
            for row, table in rows.items()
        }
        differences = {
            other: {row: paired(table, rows[other]) for row, table in rows.items() if row not in (GRADIENT, CHANCE)}
            for other in (GRADIENT, CHANCE)
            if other in rows
        }
        yield {
            "model": model,
            "questions": len(next(iter(rows.values()))),
            "patients": part["subject_id"].n_unique(),
            "recommended": default_method(str(model)),
            "measures": measures,
            "differences": differences,
            "milliseconds": {row: 1000 * float(table["seconds"].median()) for row, table in rows.items()},
        }


def report(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown tables."""
    for table in found:
        yield f"{table['model']}: {table['questions']} questions about {table['patients']} patients"
        yield ""
        shown = [m for m in MEASURES if any(row.get(m) for row in table["measures"].values())]
        yield f"| method | {' | '.join(MEASURES[m] for m in shown)} | ms |"
        yield f"|---|{'---:|' * (len(shown) + 1)}"
        for row, values in table["measures"].items():
            cells = [str(values.get(m) or "") for m in shown]
            yield f"| {row} | {' | '.join(cells)} | {table['milliseconds'][row]:.0f} |"
        yield ""
        for other, rows in table["differences"].items():
            compared = [m for m in COMPARED if any(values[m] for values in rows.values())]
            yield f"| less {other} | {' | '.join(MEASURES[m] for m in compared)} |"
            yield f"|---|{'---:|' * len(compared)}"
            for row, values in rows.items():
                name = f"**{row}**" if row == table["recommended"] else row
                yield f"| {name} | {' | '.join(told(values[m], m) for m in compared)} |"
            yield ""


def paired(ours: pl.DataFrame, theirs: pl.DataFrame) -> dict[str, Interval | None]:
    """Differences of the measures, question by question."""
    keys = ["subject_id", "task"]
    both = ours.join(theirs, on=keys, suffix=" of the other", maintain_order="left")
    subjects = both["subject_id"].to_numpy()
    return {m: interval_of((both[m] - both[f"{m} of the other"]).to_numpy(), subjects) for m in COMPARED}


def told(difference: Interval | None, measure: str) -> str:
    """A difference, and + or - where its interval leaves 0 out on the better or the worse side."""
    if difference is None:
        return ""
    above, below = difference.low > 0, difference.high < 0
    better, worse = (below, above) if measure == "sufficiency" else (above, below)
    return f"{difference} {'+' if better else '-' if worse else ''}".rstrip()


def as_json(found: list[dict[str, Any]]) -> Any:
    """Intervals as lists."""
    return json.loads(json.dumps(found, default=lambda i: [i.value, i.low, i.high]))


def main() -> None:
    """Ask and measure what is not there yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of what is measured")
    parser.add_argument("--models", nargs="+", default=["ehrmamba", "hymate"], choices=["ehrmamba", "hymate"])
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), help="rows of the table; all by default")
    parser.add_argument("--checkpoint", type=Path, default=STARTER, help="EhrMamba; by default the package's own")
    parser.add_argument("--hymate", type=Path, help="folder of the HyMaTE; by default trained into the output")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of EhrMamba")
    parser.add_argument("--patients", type=int, default=150, help="simulated patients, and as many stays")
    parser.add_argument(
        "--checked", type=int, default=30, help="questions for the measures with other weights and seeds"
    )
    parser.add_argument("--stays", type=int, default=2000, help="stays that HyMaTE is trained on")
    parser.add_argument("--epochs", type=int, default=12, help="of them")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="few of everything: does it run?")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, measure nothing")
    options = parser.parse_args()
    if options.patients < 2 or options.stays < 20 or options.epochs < 1:
        raise SystemExit("give at least 2 patients, 20 stays and 1 epoch.")
    if options.quick:
        options.patients, options.checked, options.stays, options.epochs = 4, 2, 60, 1
    torch.set_num_threads(options.threads)
    file = options.output / "questions.parquet"
    parts = [] if options.report else list(measured(options))
    if parts:
        lines = pl.concat(parts, how="diagonal_relaxed")
        write_parquet(lines, file)
        lines.write_csv(options.output / "questions.csv")
    if not file.is_file():
        raise SystemExit(f"{file} is not there: run without --report first.")
    found = list(tables(pl.read_parquet(file)))
    if parts:
        command = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        settings = {"command": ["python", "-m", "benchmarks.tables.attributions", *sys.argv[1:]], "options": command}
        write_json({**settings, "tables": as_json(found), "machine": machine()}, options.output / "result.json")
    print("\n".join(report(found)))


def measured(options: argparse.Namespace) -> Iterator[pl.DataFrame]:
    """What each model's methods are worth."""
    for model in options.models:
        if model == "ehrmamba":
            checkpoint = load_checkpoint(options.checkpoint)
            questions = list(asked_patients(checkpoint, options.patients, options.tasks))
        else:
            checkpoint = trained_hymate(options.hymate or options.output / "hymate", options.stays, options.epochs)
            questions = list(asked_stays(checkpoint, options.patients))
        family = checkpoint.model.config.model_type
        if family != model:
            raise SystemExit(f"the checkpoint of {model} is a {family}; give --checkpoint or --hymate another.")
        available = methods_of(checkpoint.model)
        rows = [row for row in options.methods or ROWS if ROWS[row][0] in available]
        if model == "hymate":
            rows = [row for row in rows if "baseline" not in ROWS[row][1]]  # stays have one
        yield run_model(model, questions, rows, options.checked)


if __name__ == "__main__":
    main()
