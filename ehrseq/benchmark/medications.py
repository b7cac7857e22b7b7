"""The whole table of next medications: questions of a dataset, every system's scores, the measures, written down.

    report = recommend_medications("data/prepared", {"ehrmamba": "runs/finetuned"}, out="medications/")

A checkpoint is asked through a straight line from its vectors (any model); a pretrained EhrMamba also through the
futures that it draws (`trajectories`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq._html import html_page, note
from ehrseq.data.dataset import EventDataset
from ehrseq.data.metadata import read_settings
from ehrseq.forecasting.medication_models import line_scores, trajectory_scores
from ehrseq.forecasting.medications import (
    MedicationQuestions,
    MedicationReport,
    assess_medications,
    frequency_scores,
    last_visit_scores,
    medication_questions,
    question_records,
)
from ehrseq.forecasting.prompts import load_forecaster
from ehrseq.representations.embedding_files import read_embeddings
from ehrseq.representations.embeddings import embed_dataset
from ehrseq.tasks.moments import last_times
from ehrseq.tokenization.ehr_codes import DEFAULT_CODE_MAP
from ehrseq.work.engine import Engine
from ehrseq.work.files import check_replaceable, write_json, write_whole

if TYPE_CHECKING:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

_LISTED = 20
_WORDS = (
    "Which drugs are given in a visit of a held-out patient, from the record up to the visit's start unless the "
    "command says otherwise. Frequency lists what most training visits have, last visit what the visit before "
    "had. A drug is repeated where the record has it already, else started. recall@k: share of a visit's drugs "
    "among the first k; jaccard: overlap of the recommended and the given set; pr_auc: area under precision and "
    "recall of each visit's list, averaged over visits, _macro over drugs given often enough (empty where none "
    "is), _micro over all pairs. All lie from 0 to 1, more is better; in brackets 95 % intervals over patients."
)


def recommend_medications(
    data: str | Path,
    models: Mapping[str, str | Path],
    *,
    context: str = "start",
    pretrained: str | Path | None = None,
    learn_from: Sequence[str] = ("train", "pretrain"),
    num: int = 32,
    estimator: str = "scope",
    most_questions: int | None = None,
    num_resamples: int = 200,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
) -> MedicationReport:
    """Measure recommendations of the next medications, of models and of what needs none.

    Args:
        data: Prepared dataset with the splits train, tuning and held_out. Its events are held in memory.
        models: Name -> checkpoint, whose vectors a line is fitted to.
        context: What is known, see `question_records`.
        pretrained: A pretrained EhrMamba whose futures are drawn; only with the context "start".
        learn_from: Splits whose visits are learnt from.
        num: Futures of a visit.
        estimator: "scope" or "monte_carlo".
        most_questions: Held-out visits that are asked at most, drawn at random, and tuning visits whose futures are
            drawn; None = all.
        num_resamples: Bootstrap resamples of patients.
        seed: Of what is drawn.
        out: Folder to write: `medications.html`, `.md`, `.json`, `recommendations.parquet` (the first of each list).
        engine: Where vectors are made.

    Raises:
        ValueError: No drugs, no splits, futures in another context, or what the models refuse.
    """
    if pretrained is not None and context != "start":
        raise ValueError(f"futures are drawn from a visit's start; context got {context!r}, expected 'start'.")
    if num < 1 or (most_questions is not None and most_questions < 1):
        raise ValueError(f"num got {num}, most_questions {most_questions}; expected at least 1.")
    if out is not None:
        check_medication_folder(Path(out))
    dataset = EventDataset(data)
    rules = [*read_settings(data).code_map, *DEFAULT_CODE_MAP]
    events = dataset.events()
    questions = medication_questions(events, dataset.splits, learn_from=learn_from, code_map=rules)
    held_out = _drawn(questions, "held_out", most_questions, seed)
    records = question_records(events, questions, context, code_map=rules)
    scores = {"frequency": frequency_scores(questions), "last visit": last_visit_scores(questions)}
    for name, checkpoint in models.items():
        scores[f"{name}, line"], _ = line_scores(questions, question_vectors(checkpoint, records, questions, engine))
    if pretrained is not None:
        forecaster = load_forecaster(pretrained)
        asked = np.concatenate([_drawn(questions, "tuning", most_questions, seed), held_out])
        scores["futures"] = trajectory_scores(
            forecaster.model,
            cast("EhrTokenizer", forecaster.tokenizer),
            questions,
            records,
            num=num,
            estimator=estimator,
            seed=seed,
            rows=asked.tolist(),
        )
    report = assess_medications(questions, scores, rows=held_out, num_resamples=num_resamples, seed=seed)
    if out is not None:
        _write(report, questions, scores, held_out, Path(out))
    return report


def question_vectors(
    checkpoint: str | Path, records: pl.DataFrame, questions: MedicationQuestions, engine: Engine | None = None
) -> NDArray[np.float64]:
    """`[n, d]` a checkpoint's vector of each question's record, NaN where it has none."""
    with tempfile.TemporaryDirectory(prefix="ehrseq-") as folder:
        file = Path(folder) / "vectors.parquet"
        embed_dataset(checkpoint, records, file, prediction_times=last_times(records), engine=engine)
        found = read_embeddings(file)
    vectors = np.full((len(questions.given), found.vectors.shape[1]), np.nan)
    vectors[found.table["subject_id"].to_numpy()] = found.vectors
    return vectors


def _drawn(questions: MedicationQuestions, split: str, most: int | None, seed: int) -> NDArray[np.int64]:
    """Questions of a split, so many at most; what is left out is counted."""
    rows = questions.rows(split)
    if most is None or len(rows) <= most:
        return rows
    questions.notes[f"{split.replace('_', '-')} visits that were not drawn"] = len(rows) - most
    return np.sort(np.random.default_rng((seed, 1)).permutation(rows)[:most])


def check_medication_folder(folder: Path) -> None:
    """Raise ValueError where a report would replace what is none of ours."""
    ours = {"medications.html", "medications.md", "medications.json", "recommendations.parquet"}
    check_replaceable(folder, ours.__contains__, "a report of `ehrseq medications`")


def _write(
    report: MedicationReport,
    questions: MedicationQuestions,
    scores: Mapping[str, NDArray[np.float64]],
    rows: NDArray[np.int64],
    out: Path,
) -> None:
    parts = ["<h1>Next medications</h1>", note(_WORDS), *(table.to_html() for table in report.tables())]
    if report.notes:
        told = "; ".join(f"{what}: {count:,}" for what, count in report.notes.items())
        parts.append(note(f"Counted: {told}."))
    page = html_page("Next medications", parts)
    lists = pl.concat([_lists(questions, name, each, rows) for name, each in scores.items()])

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "medications.html").write_text(page, encoding="utf-8")
        (folder / "medications.md").write_text(report.to_markdown(), encoding="utf-8")
        write_json(folder / "medications.json", report.to_dict(), indent=2)
        lists.write_parquet(folder / "recommendations.parquet")

    write_whole(out, write)


def _lists(
    questions: MedicationQuestions, system: str, scores: NDArray[np.float64], rows: NDArray[np.int64]
) -> pl.DataFrame:
    """system, subject_id, start, rank, code, score, given: the first of each visit's list."""
    rows = rows[np.isfinite(scores[rows]).all(1)]
    top = np.argsort(-scores[rows], axis=1, kind="stable")[:, :_LISTED]
    asked = questions.table[rows].select("subject_id", "start")
    repeated = asked[np.repeat(np.arange(len(rows)), top.shape[1])]
    codes = np.asarray(questions.codes, dtype=object)
    return repeated.with_columns(
        system=pl.lit(system),
        rank=pl.Series(np.tile(np.arange(1, top.shape[1] + 1), len(rows)), dtype=pl.Int64),
        code=pl.Series(codes[top.ravel()].tolist(), dtype=pl.String),
        score=pl.Series(np.take_along_axis(scores[rows], top, 1).ravel(), dtype=pl.Float64),
        given=pl.Series(np.take_along_axis(questions.given[rows], top, 1).ravel(), dtype=pl.Boolean),
    )
