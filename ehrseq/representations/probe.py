"""Linear probes: how much of a task a straight line reads off a model's vectors, and from how few labels.

    report = probe_tasks({"ehrmamba": "vectors.parquet"}, "data/prepared")
    print(report.to_markdown())

The protocol of the field's benchmarks (EHRSHOT, arXiv:2307.02028): for each size k positive and k negative labels of
training patients are drawn, and as many of tuning patients (all, where there are fewer); a logistic regression with an
L2 penalty is fitted to the standardised vectors, its penalty chosen by the likelihood of the drawn tuning labels; the
test is on every held-out label. Draws are repeated, and the spread over draws is told. Last comes the fit to all labels
as they are, with an interval over the held-out patients; its risks are written, and `ehrseq evaluate` reads them.

Several files of vectors are probed with the same draws, on the labels for which all of them have a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ehrseq._html import html_page, note
from ehrseq.data.dataset import EventDataset
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.evaluation.bootstrap import Interval, bootstrap_interval
from ehrseq.evaluation.metrics import Ranking
from ehrseq.evaluation.plots import few_shot_curves
from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.evaluation.reports import MIN_CLASS_COUNT
from ehrseq.representations.embedding_files import read_embeddings
from ehrseq.tasks.label_sources import read_audited
from ehrseq.tasks.moments import LabelSource
from ehrseq.work.files import check_replaceable, write_whole

SHOT_SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths of the L2 penalty (C) that are tried, on standardised columns."""
_DEFAULT_PENALTY = 1e-2  # where there is no tuning label of both classes


@dataclass(frozen=True)
class ShotResult:
    """One draw.

    Attributes:
        labels: Training labels drawn, half of them positive.
        draw: Number of the draw.
        auroc, auprc: On every held-out label.
        penalty: C that was chosen.
        tuning_labels: By how many labels; 0 = the default stands.
    """

    labels: int
    draw: int
    auroc: float
    auprc: float
    penalty: float
    tuning_labels: int


@dataclass(frozen=True)
class ProbedTask:
    """A task probed on one file of vectors.

    Attributes:
        name: The file's name in the report.
        task: The task.
        counts: (labels, positives) by split.
        shots: The draws.
        whole: AUROC of the fit to all training labels, with its interval; None where nothing can be told.
        whole_auprc: Its average precision, likewise.
        whole_penalty: Its C.
        reason: Why nothing can be told, else None.
        notes: What was left out.
        risks: subject_id, prediction_time, task, score, boolean_value of the held-out labels by the fit to all.
    """

    name: str
    task: str
    counts: Mapping[str, tuple[int, int]]
    shots: list[ShotResult] = field(default_factory=list)
    whole: Interval | None = None
    whole_auprc: Interval | None = None
    whole_penalty: float | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    risks: pl.DataFrame | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ProbeReport:
    """Every task on every file of vectors."""

    probes: list[ProbedTask]

    def table(self) -> pl.DataFrame:
        """One row a draw, and one for the fit to all labels (draw null): for CSV."""
        rows: list[dict[str, Any]] = []
        for probe in self.probes:
            key = {"embeddings": probe.name, "task": probe.task}
            rows += [{**key, **asdict(shot)} for shot in probe.shots]
            if probe.whole is not None and probe.whole_auprc is not None:
                whole = {"labels": probe.counts["train"][0], "auroc": probe.whole.value, "low": probe.whole.low}
                rows.append(
                    {**key, **whole, "high": probe.whole.high, "auprc": probe.whole_auprc.value}
                    | {"penalty": probe.whole_penalty, "tuning_labels": probe.counts["tuning"][0]}
                )
        schema = {"embeddings": pl.String, "task": pl.String, "labels": pl.Int64, "draw": pl.Int64, "auroc": pl.Float64}
        schema |= {"low": pl.Float64, "high": pl.Float64, "auprc": pl.Float64, "penalty": pl.Float64}
        return pl.DataFrame(rows, schema={**schema, "tuning_labels": pl.Int64})

    def risks(self) -> pl.DataFrame:
        """Held-out risks of the fits to all labels, as `ehrseq predict` writes them, with the file's name."""
        frames = [
            probe.risks.with_columns(embeddings=pl.lit(probe.name)) for probe in self.probes if probe.risks is not None
        ]
        return pl.concat(frames) if frames else pl.DataFrame()

    def curves(self) -> dict[str, dict[str, dict[int, list[float]]]]:
        """Task -> file -> number of labels -> AUROC of each draw."""
        curves: dict[str, dict[str, dict[int, list[float]]]] = {}
        for probe in self.probes:
            of_file = curves.setdefault(probe.task, {}).setdefault(probe.name, {})
            for shot in probe.shots:
                of_file.setdefault(shot.labels, []).append(shot.auroc)
            if probe.whole is not None:
                of_file.setdefault(probe.counts["train"][0], []).append(probe.whole.value)
        return {task: of_task for task, of_task in curves.items() if any(of_task.values())}

    def tables(self) -> list[ReportTable]:
        """A table a task: AUROC by number of labels."""
        tasks = dict.fromkeys(probe.task for probe in self.probes)
        return [_task_table([probe for probe in self.probes if probe.task == task]) for task in tasks]

    def to_markdown(self) -> str:
        """The tables."""
        return "\n".join(table.to_markdown() for table in self.tables())


class _Rows(NamedTuple):
    """Labelled vectors of one split: vectors [n, d], labels [n], subjects [n], and the keys."""

    vectors: NDArray[np.float32]
    labels: NDArray[np.bool_]
    table: pl.DataFrame


def probe_tasks(
    embeddings: Mapping[str, str | Path] | str | Path,
    data: str | Path | None,
    *,
    labels: LabelSource | None = None,
    splits: pl.DataFrame | None = None,
    tasks: Sequence[str] | None = None,
    sizes: Sequence[int] = SHOT_SIZES,
    draws: int = 5,
    num_resamples: int = 1000,
    seed: int = 0,
) -> ProbeReport:
    """Probe files of vectors.

    Args:
        embeddings: Name -> file of `ehrseq embed`, made at the labels' times; or one file.
        data: Prepared dataset, whose splits say who trains, tunes and is held out. None: `splits` says it.
        labels: Labels, as of `embed_dataset`, with their answers; None = those of the dataset.
        splits: subject_id, split (train, tuning, held_out), in place of the dataset's.
        tasks: Tasks to probe, None = all that have labels.
        sizes: Numbers of training labels, even, ascending; what the labels do not suffice for is left out and told.
        draws: Draws of each size.
        num_resamples: Bootstrap resamples of the held-out patients, for the fit to all labels.
        seed: Of the draws and the bootstrap.

    Raises:
        ValueError: Vectors of visits, no labels, unknown tasks, no split, sizes that are none, labels of other times.
    """
    _check_sizes(sizes, draws)
    files = embeddings if isinstance(embeddings, Mapping) else {Path(embeddings).stem: embeddings}
    if not files:
        raise ValueError("embeddings got no file; give at least one that `ehrseq embed` wrote.")
    found = {name: read_embeddings(file) for name, file in files.items()}
    for name, each in found.items():
        if "visit" in each.table.columns:
            raise ValueError(f"{name} holds vectors of visits; a probe needs one vector a label (--level patient).")
    if data is None and (labels is None or splits is None):
        raise ValueError("without a dataset, give both labels and splits.")
    split_of = splits if splits is not None else EventDataset(str(data)).splits
    if not {"subject_id", "split"} <= set(split_of.columns) or split_of.is_empty():
        raise ValueError("there are no splits; give a dataset of `ehrseq prepare`, or subject_id and split of each.")
    labelled = _read_labels(data if labels is None else labels, tasks)
    probes = []
    for task, table in labelled.items():
        if table.select(LABEL_KEYS).is_duplicated().any():
            raise ValueError(f"the labels of {task} hold two answers for one patient and time; keep one of them.")
        keyed = table.select(*LABEL_KEYS, "boolean_value").sort(LABEL_KEYS)
        keyed = keyed.join(split_of.select("subject_id", "split"), on="subject_id", maintain_order="left")
        have = keyed
        for each in found.values():
            have = have.join(each.table.select(LABEL_KEYS), on=list(LABEL_KEYS), how="semi", maintain_order="left")
        missing = keyed.height - have.height
        if have.is_empty():
            raise ValueError(
                f"no label of {task} has a vector at its time in every file; embed at the labelled times (--labels)."
            )
        for name, each in found.items():
            place = have.join(
                each.table.with_row_index("place"), on=list(LABEL_KEYS), how="left", maintain_order="left"
            )["place"].to_numpy()
            vectors, answers = each.vectors[place], have["boolean_value"].to_numpy()
            of_split = {}
            for split in ("train", "tuning", "held_out"):
                rows = np.flatnonzero((have["split"] == split).to_numpy())
                of_split[split] = _Rows(vectors[rows], answers[rows], have[rows])
            probe = _probe(name, task, of_split, sizes, draws, num_resamples, seed)
            if keyed.height < table.height:
                probe.notes.append(f"{table.height - keyed.height:,} labels of patients without a split are left out.")
            if missing:
                probe.notes.append(f"{missing:,} labels without a vector at their time are left out.")
            probes.append(probe)
    return ProbeReport(probes)


def _check_sizes(sizes: Sequence[int], draws: int) -> None:
    good = all(isinstance(size, int) and not isinstance(size, bool) and size >= 2 and size % 2 == 0 for size in sizes)
    if not sizes or not good or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes got {list(sizes)}; expected even numbers of labels, ascending, such as 10, 100, 1000.")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws got {draws!r}; expected a whole number of at least 1.")


def _read_labels(source: Any, tasks: Sequence[str] | None) -> dict[str, pl.DataFrame]:
    tables = dict(source) if isinstance(source, Mapping) else {each.name: each.labels for each in read_audited(source)}
    for name, table in tables.items():
        lacks = {*LABEL_KEYS, "boolean_value"} - set(table.columns)
        if lacks:
            raise ValueError(f"labels of {name} lack {sorted(lacks)}; expected a label table.")
    unknown = [task for task in tasks or () if task not in tables]
    if unknown:
        raise ValueError(f"there are no labels of {unknown}; there are those of {sorted(tables)}.")
    chosen = {name: table for name, table in tables.items() if tasks is None or name in tasks}
    return {name: table.drop_nulls("boolean_value") for name, table in chosen.items()}


def _probe(
    name: str, task: str, rows: Mapping[str, _Rows], sizes: Sequence[int], draws: int, num_resamples: int, seed: int
) -> ProbedTask:
    counts = {split: (len(each.labels), int(each.labels.sum())) for split, each in rows.items()}
    train, tuning, test = rows["train"], rows["tuning"], rows["held_out"]
    rarer = {split: min(positives, total - positives) for split, (total, positives) in counts.items()}
    if rarer["held_out"] < MIN_CLASS_COUNT or not rarer["train"]:
        total, positives = counts["held_out"]
        reason = (
            f"not estimable: {positives} of {total} held-out labels are positive, {counts['train'][1]} of "
            f"{counts['train'][0]} training labels; at least {MIN_CLASS_COUNT} held-out labels of each class are needed"
        )
        return ProbedTask(name, task, counts, reason=reason)
    ranking = _ranker(test)
    shots = []
    usable = [size for size in sizes if size // 2 <= rarer["train"]]
    for size in usable:
        for draw in range(draws):
            rng = np.random.default_rng((seed, size, draw))
            drawn = balanced_draw(train.labels, size // 2, rng)
            tuned = balanced_draw(tuning.labels, min(size // 2, rarer["tuning"]), rng)
            model = _fit(train.vectors[drawn], train.labels[drawn], tuning.vectors[tuned], tuning.labels[tuned])
            auroc, auprc = ranking(model)
            shots.append(ShotResult(size, draw, auroc, auprc, model.penalty, len(tuned)))
    model = _fit(train.vectors, train.labels, tuning.vectors, tuning.labels)
    scores = model.risks(test.vectors)
    subjects = test.table["subject_id"].to_numpy()
    order = Ranking(test.labels, scores)
    whole = bootstrap_interval(order.auroc, subjects, num_resamples=num_resamples, seed=seed)
    auprc = bootstrap_interval(order.average_precision, subjects, num_resamples=num_resamples, seed=seed)
    notes = []
    left_out = [f"{size:,}" for size in sizes if size not in usable]
    if left_out:
        notes.append(
            f"Sizes without enough training labels of both classes, left out: {', '.join(left_out)} "
            f"({counts['train'][1]:,} of {counts['train'][0]:,} are positive)."
        )
    risks = test.table.select(*LABEL_KEYS, "boolean_value").with_columns(task=pl.lit(task), score=pl.Series(scores))
    return ProbedTask(name, task, counts, shots, whole, auprc, model.penalty, None, notes, risks)


def balanced_draw(labels: NDArray[np.bool_], each: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of `each` positive and as many negative labels, ascending, without repeats."""
    drawn = [rng.permutation(np.flatnonzero(labels == value))[:each] for value in (True, False)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


@dataclass(frozen=True)
class _Fitted:
    scaler: StandardScaler
    regression: LogisticRegression
    penalty: float

    def risks(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(self.regression.predict_proba(self.scaler.transform(vectors))[:, 1])


def _fit(
    vectors: NDArray[np.float32],
    labels: NDArray[np.bool_],
    tuning: NDArray[np.float32],
    tuning_labels: NDArray[np.bool_],
) -> _Fitted:
    """The regression whose penalty makes the tuning labels likeliest; of equal ones the strongest penalty."""
    scaler = StandardScaler().fit(np.asarray(vectors, np.float64))
    scaled = scaler.transform(vectors)
    has_tuning = len(np.unique(tuning_labels)) == 2
    best, best_loss = None, np.inf
    for penalty in PENALTIES if has_tuning else (_DEFAULT_PENALTY,):
        model = LogisticRegression(C=penalty, max_iter=2000).fit(scaled, labels)
        fitted = _Fitted(scaler, model, penalty)
        loss = _log_loss(tuning_labels, fitted.risks(tuning)) if has_tuning else 0.0
        if best is None or loss < best_loss - 1e-12:
            best, best_loss = fitted, loss
    if best is None:  # no penalty gives a finite loss
        raise ValueError("the regression gives no finite risks; are the vectors finite?")
    return best


def _log_loss(labels: NDArray[np.bool_], risks: NDArray[np.float64]) -> float:
    of_truth = np.clip(np.where(labels, risks, 1 - risks), 1e-15, 1.0)
    return float(-np.log(of_truth).mean())


def _ranker(test: _Rows) -> Any:
    def figures(model: _Fitted) -> tuple[float, float]:
        order = Ranking(test.labels, model.risks(test.vectors))
        return float(order.auroc()[0]), float(order.average_precision()[0])

    return figures


def _task_table(probes: Sequence[ProbedTask]) -> ReportTable:
    sizes = sorted({shot.labels for probe in probes for shot in probe.shots})
    header = ["embeddings", *(f"{size:,} labels" for size in sizes), "all labels"]
    rows = []
    for probe in probes:
        cells = []
        for size in sizes:
            values = [shot.auroc for shot in probe.shots if shot.labels == size]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.3f} ± {spread:.3f}" if values else "")
        rows.append([probe.name, *cells, str(probe.whole) if probe.whole is not None else probe.reason or ""])
    told = "; ".join(f"{split} {positives:,} of {total:,}" for split, (total, positives) in probes[0].counts.items())
    notes = dict.fromkeys(note for probe in probes for note in probe.notes)
    text = f"AUROC on every held-out label, mean and standard deviation over draws. Positive labels: {told}. "
    return ReportTable(probes[0].task, header, rows, (text + " ".join(notes)).strip())


def write_probe(report: ProbeReport, folder: str | Path) -> Path:
    """Write `probe.html` (tables and curves), `probe.md`, `probe.csv` and `risks.parquet`, whole or not at all.

    Args:
        report: What `probe_tasks` found.
        folder: Where to; a report that is there is replaced.

    Returns:
        The page.
    """
    folder = Path(folder)
    check_probe_folder(folder)
    curves = report.curves()
    parts = ["<h1>Linear probes</h1>", *([few_shot_curves(curves)] if curves else [])]
    parts += [note("The band is from the lowest to the highest draw; the last point is the fit to all labels.")]
    parts += [table.to_html() for table in report.tables()]
    page = html_page("Linear probes", parts)

    def write(unfinished: Path) -> None:
        unfinished.mkdir()
        (unfinished / "probe.html").write_text(page, encoding="utf-8")
        (unfinished / "probe.md").write_text(report.to_markdown(), encoding="utf-8")
        report.table().write_csv(unfinished / "probe.csv")
        report.risks().write_parquet(unfinished / "risks.parquet")

    write_whole(folder, write)
    return folder / "probe.html"


def check_probe_folder(folder: Path) -> None:
    """Raise ValueError where a report would replace what is none of ours."""
    ours = {"probe.html", "probe.md", "probe.csv", "risks.parquet"}
    check_replaceable(folder, ours.__contains__, "a report of `ehrseq probe`")


__all__ = [
    "PENALTIES",
    "SHOT_SIZES",
    "ProbeReport",
    "ProbedTask",
    "ShotResult",
    "balanced_draw",
    "check_probe_folder",
    "probe_tasks",
    "write_probe",
]
