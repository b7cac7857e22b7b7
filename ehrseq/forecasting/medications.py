"""Next medications: which drugs will be given in a visit, asked when it begins; and how good such recommendations are.

    questions = medication_questions(events, splits)
    records = question_records(events, questions, "start")     # what is known, a patient a question
    report = assess_medications(questions, {"frequency": frequency_scores(questions), ...})

A question is a visit in which a drug is given; visits are encounters of the table, those that overlap made one. Known
is the record before the visit and that it begins ("start"). "so_far" adds the diagnoses and procedures of the visit
before its first drug; "visit" adds all of them, as the literature does (GAMENet, SafeDrug): since many are coded at the
discharge, that is no forecast.

Measures, all over held-out visits: recall at k, Jaccard index and average precision (PR-AUC) of each visit, averaged
over visits (arXiv:1809.01852 and 2105.02711; theirs are averaged over patients first); average precision of each drug
(macro: of those given in ten visits or more) and of all pairs of visit and drug (micro). The set of a recommendation,
for the Jaccard index, is what scores at least a threshold, that of the largest mean Jaccard index on tuning visits.
Most of what is given was given before, so the drugs started (never given to the patient before) and those repeated are
measured apart, each among their own kind.

Glossary: n questions, c drugs (codes of training visits).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.data.schema import EVENT_COLUMNS, validate_events
from ehrseq.evaluation.bootstrap import Interval, bootstrap_intervals
from ehrseq.evaluation.metrics import Ranking
from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.tasks.encounters import encounters
from ehrseq.tokenization.ehr_codes import code_kinds, split_kind

MEDICATION_CONTEXTS = ("start", "so_far", "visit")
RECALL_AT = (5, 10, 20)
PARTS = ("all", "started", "repeated")
_MOST_CELLS = 2_000_000  # pairs of visit and drug up to which the micro average gets its interval
_LEAST_GIVEN = 10  # visits from which on a drug counts in the macro average: of fewer, a precision is chance
_ADDED_KINDS = ("diagnosis", "procedure")

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MedicationQuestions:
    """Visits with drugs.

    Attributes:
        table: question (0 .. n - 1), subject_id, start, end, first_drug (when), number (of the visit among the
            patient's, from 1), split.
        codes: The drugs that can be recommended: those of training visits.
        given: `[n, c]` what was given.
        unknown: `[n]` drugs given that no training visit holds: nothing can recommend them, and they count as missed.
        before: `[n, c]` given to the patient at any time before.
        last: `[n, c]` given in the patient's latest earlier visit with drugs.
        learnt: Questions to learn from.
        notes: What was left out, counted.
    """

    table: pl.DataFrame
    codes: list[str]
    given: Bools
    unknown: NDArray[np.int64]
    before: Bools
    last: Bools
    learnt: NDArray[np.int64]
    notes: Counter[str] = field(default_factory=Counter)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Questions of a split."""
        return np.flatnonzero((self.table["split"] == split).to_numpy())


def medication_questions(
    events: pl.DataFrame,
    splits: pl.DataFrame,
    *,
    learn_from: Sequence[str] = ("train", "pretrain"),
    code_map: Sequence[Sequence[str]] | None = None,
) -> MedicationQuestions:
    """The visits of some patients in which drugs are given.

    Args:
        events: Event table of whole patients.
        splits: subject_id, split (those to learn from, tuning, held_out); visits of others are left out.
        learn_from: Splits whose visits are learnt from.
        code_map: [regular expression, kind] pairs, default `DEFAULT_CODE_MAP`.

    Raises:
        ValueError: No encounter, no drug given in one, or none of a training patient.
    """
    notes: Counter[str] = Counter()
    unique = events["code"].unique().to_list()
    kind_of = {code: split_kind(kind)[0] for code, kind in zip(unique, code_kinds(unique, code_map), strict=True)}
    drugs = [code for code, kind in kind_of.items() if kind == "medication"]
    visits = _visits(events, code_map, notes)
    if visits.is_empty() or not drugs:
        raise ValueError(
            f"the events hold {visits.height} visits and {len(drugs)} codes of medications; both are needed. Are the "
            "codes' kinds known (code_map)?"
        )
    rows = events.filter(pl.col("code").is_in(drugs) & pl.col("time").is_not_null()).select(
        "subject_id", "time", "code"
    )
    placed = rows.sort("time").join_asof(
        visits.sort("start"), left_on="time", right_on="start", by="subject_id", check_sortedness=False
    )
    inside = placed.filter(pl.col("time") <= pl.col("end"))
    notes["drugs given outside of every visit"] = rows.height - inside.height
    first = inside.group_by("visit").agg(pl.col("time").min().alias("first_drug"))
    of_split = splits.select("subject_id", "split").filter(pl.col("split").is_in([*learn_from, "tuning", "held_out"]))
    table = visits.join(first, on="visit").join(of_split, on="subject_id")
    notes["visits in which no drug is given"] = visits.height - first.height
    notes["visits of patients of no split that is asked about"] = first.height - table.height
    table = table.sort("subject_id", "start").with_row_index("question").with_columns(pl.col("question").cast(pl.Int64))
    train = table.filter(pl.col("split").is_in(list(learn_from)))["visit"]
    codes = sorted(inside.filter(pl.col("visit").is_in(train.implode()))["code"].unique())
    if table.is_empty() or not codes:
        raise ValueError(f"no drug is given in a visit of the splits {list(learn_from)}; nothing could be learnt.")
    place = pl.DataFrame({"code": codes, "drug": np.arange(len(codes))})

    def matrix(pairs: pl.DataFrame) -> Bools:
        known = pairs.join(place, on="code")
        array = np.zeros((table.height, len(codes)), bool)
        array[known["question"].to_numpy(), known["drug"].to_numpy()] = True
        return array

    of_visit = inside.select("visit", "code").unique().join(table.select("visit", "question"), on="visit")
    given = matrix(of_visit)
    total = of_visit.group_by("question").len().sort("question")["len"].to_numpy().astype(np.int64)
    earlier = (
        rows.join(table.select("question", "subject_id", "start"), on="subject_id")
        .filter(pl.col("time") < pl.col("start"))
        .select("question", "code")
        .unique()
    )
    last = np.zeros_like(given)
    subjects = table["subject_id"].to_numpy()
    same = np.flatnonzero(subjects[1:] == subjects[:-1]) + 1
    last[same] = given[same - 1]
    return MedicationQuestions(
        table.drop("visit"),
        codes,
        given,
        total - given.sum(1),
        matrix(earlier),
        last,
        np.flatnonzero(table["split"].is_in(list(learn_from)).to_numpy()),
        Counter(+notes),
    )


def question_records(
    events: pl.DataFrame,
    questions: MedicationQuestions,
    context: str = "start",
    *,
    code_map: Sequence[Sequence[str]] | None = None,
) -> pl.DataFrame:
    """What is known at each question, as an event table whose subject_id is the question: a model's input.

    Args:
        events: The events that the questions were made of.
        questions: From `medication_questions`.
        context: "start": what was recorded before the visit, and its start; "so_far": with its diagnoses and procedures
            before its first drug; "visit": with all of them.
        code_map: As of `medication_questions`.

    Raises:
        ValueError: Another context.
    """
    if context not in MEDICATION_CONTEXTS:
        raise ValueError(f"context got {context!r}; expected one of {list(MEDICATION_CONTEXTS)}.")
    unique = events["code"].unique().to_list()
    kinds = dict(zip(unique, (split_kind(kind)[0] for kind in code_kinds(unique, code_map)), strict=True))
    asked = questions.table.select("question", "subject_id", "start", "end", "first_drug")
    # A row of unknown time is a fact of the patient, unless it is of a kind that would tell the future.
    fixed = [code for code, kind in kinds.items() if kind in ("static", "birth")]
    starts = [code for code, kind in kinds.items() if kind == "visit_start"]
    added = [code for code, kind in kinds.items() if kind in _ADDED_KINDS]
    joined = events.join(asked, on="subject_id")
    time, start = pl.col("time"), pl.col("start")
    known = (time < start) | (time.is_null() & pl.col("code").is_in(fixed))
    known |= (time == start) & pl.col("code").is_in(starts)
    if context == "so_far":
        known |= (time >= start) & (time < pl.col("first_drug")) & pl.col("code").is_in(added)
    if context == "visit":
        known |= (time >= start) & (time <= pl.col("end")) & pl.col("code").is_in(added)
    columns = [name for name in EVENT_COLUMNS if name in events.columns and name != "subject_id"]
    rows = joined.filter(known.fill_null(value=False)).select(pl.col("question").alias("subject_id"), *columns)
    return validate_events(rows)


def _visits(events: pl.DataFrame, code_map: Sequence[Sequence[str]] | None, notes: Counter[str]) -> pl.DataFrame:
    """subject_id, start, end, visit (a number), number (of the patient's visits, from 1): encounters, merged."""
    found = encounters(events, code_map)
    last = (
        events.filter(pl.col("time").is_not_null())
        .group_by("subject_id", "visit_id")
        .agg(pl.col("time").max().alias("last_row"))
        if "visit_id" in events.columns
        else pl.DataFrame(schema={"subject_id": pl.Int64, "visit_id": pl.String, "last_row": pl.Datetime("us")})
    )
    found = found.join(last, on=["subject_id", "visit_id"], how="left").with_columns(
        known_end=pl.coalesce("end", "last_row")
    )
    notes["encounters without an end, which end at their last row"] = found["end"].null_count()
    notes["encounters without any end, left out"] = found["known_end"].null_count()
    whole = found.filter(pl.col("known_end") >= pl.col("start")).sort("subject_id", "start", maintain_order=True)
    latest = pl.col("known_end").cum_max().shift(1).over("subject_id")
    opens = (pl.col("start") > latest).fill_null(value=True)
    return (
        whole.with_columns(visit=opens.cum_sum())
        .group_by("subject_id", "visit", maintain_order=True)
        .agg(pl.col("start").min(), pl.col("known_end").max().alias("end"))
        .with_columns(number=pl.int_range(1, pl.len() + 1).over("subject_id"))
    )


# -- what needs no model ---------------------------------------------------------------------------------------------


def frequency_scores(questions: MedicationQuestions) -> Floats:
    """`[n, c]` share of training visits in which each drug is given: the same list for everybody."""
    return np.tile(questions.given[questions.learnt].mean(0), (len(questions.given), 1))


def last_visit_scores(questions: MedicationQuestions) -> Floats:
    """`[n, c]` what was given in the visit before comes first; among equals, and without such a visit, the frequent."""
    return np.asarray((questions.last + frequency_scores(questions)) / 2)


# -- measures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MedicationMeasures:
    """How good one system's scores are for some drugs of some visits.

    Attributes:
        system: Its name.
        part: "all", "started" or "repeated" drugs.
        visits: Held-out visits that have such a drug; "first" or "later" visits of patients.
        which: "first" or "later".
        figures: recall@k, jaccard, pr_auc (of visits), pr_auc_macro, pr_auc_micro, with intervals over patients.
        threshold: From which score on a drug is in the set.
    """

    system: str
    part: str
    visits: int
    which: str
    figures: Mapping[str, Interval]
    threshold: float


@dataclass(frozen=True)
class MedicationReport:
    """What `assess_medications` measured."""

    measures: list[MedicationMeasures]
    drugs: int
    notes: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"drugs": self.drugs, "notes": dict(self.notes), "measures": [asdict(each) for each in self.measures]}

    def tables(self) -> list[ReportTable]:
        """A table for each kind of visits and drugs."""
        tables = []
        for which in dict.fromkeys(each.which for each in self.measures):
            for part in PARTS:
                rows = [each for each in self.measures if (each.which, each.part) == (which, part)]
                if rows:
                    names = list(rows[0].figures)
                    cells = [[each.system, *(_cell(each.figures[name]) for name in names)] for each in rows]
                    title = f"{which} visits, {'all drugs' if part == 'all' else f'drugs {part}'}"
                    tables.append(ReportTable(title, ["system", *names], cells, f"{rows[0].visits:,} held-out visits."))
        return tables

    def to_markdown(self) -> str:
        """The tables, and what was left out."""
        told = [f"- {what}: {count:,}" for what, count in self.notes.items()]
        return "\n".join([*(table.to_markdown() for table in self.tables()), *told, ""])


def assess_medications(
    questions: MedicationQuestions,
    scores: Mapping[str, Floats],
    *,
    rows: NDArray[np.int64] | None = None,
    num_resamples: int = 200,
    seed: int = 0,
) -> MedicationReport:
    """Measure scores of drugs on held-out visits.

    Args:
        questions: The visits.
        scores: System -> `[n, c]` scores, larger = likelier; rows that are NaN have none.
        rows: Questions to measure; None = held-out ones for which every system has scores.
        num_resamples: Bootstrap resamples of patients.
        seed: Of these.

    Raises:
        ValueError: No system, scores of another shape, nothing held out.
    """
    shape = questions.given.shape
    wrong = {name: each.shape for name, each in scores.items() if each.shape != shape}
    if not scores or wrong:
        raise ValueError(f"scores got {wrong or 'no system'}; expected arrays of visits and drugs, {shape}.")
    has = np.all([np.isfinite(each).all(1) for each in scores.values()], axis=0)
    notes = Counter(questions.notes)
    chosen = questions.rows("held_out") if rows is None else rows
    notes["held-out visits without a score of every system, left out"] = int((~has[chosen]).sum())
    chosen = chosen[has[chosen]]
    if not len(chosen):
        raise ValueError("no held-out visit has a score of every system; are there held-out patients with visits?")
    notes["drugs given in these visits that no training visit holds"] = int(questions.unknown[chosen].sum())
    tuning = questions.rows("tuning")
    tuning = tuning[has[tuning]]
    number = questions.table["number"].to_numpy()
    measures = []
    for which, mask in (("later", number[chosen] > 1), ("first", number[chosen] == 1)):
        for part in PARTS if which == "later" else ("all",):
            for system, each in scores.items():
                found = _measure(questions, each, chosen[mask], tuning, part, num_resamples, seed)
                if found is not None:
                    visits, figures, threshold = found
                    measures.append(MedicationMeasures(system, part, visits, which, figures, threshold))
    return MedicationReport(measures, shape[1], +notes)


def _cell(figure: Interval) -> str:
    """A figure as text: nothing where it does not exist."""
    if not np.isfinite(figure.value):
        return ""
    return str(figure) if np.isfinite(figure.low) else f"{figure.value:.3f}"


def _measure(
    questions: MedicationQuestions,
    scores: Floats,
    rows: NDArray[np.int64],
    tuning: NDArray[np.int64],
    part: str,
    num_resamples: int,
    seed: int,
) -> tuple[int, dict[str, Interval], float] | None:
    """Visits, figures and threshold; None where no visit has such a drug."""

    def of(chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], Bools, Bools, NDArray[np.int64]]:
        """Visits with such a drug; which drugs are candidates; which were given; how many more were."""
        before = questions.before[chosen]
        candidates = np.ones_like(before) if part == "all" else before if part == "repeated" else ~before
        truth = questions.given[chosen] & candidates
        more = questions.unknown[chosen] if part != "repeated" else np.zeros(len(chosen), np.int64)
        kept = truth.sum(1) + more > 0
        return chosen[kept], candidates[kept], truth[kept], more[kept]

    rows, candidates, truth, more = of(rows)
    if not len(rows):
        return None
    tuned, tuned_candidates, tuned_truth, tuned_more = of(tuning)
    threshold = best_jaccard_threshold(np.where(tuned_candidates, scores[tuned], -np.inf), tuned_truth, tuned_more)
    ranked = np.where(candidates, scores[rows], -np.inf)
    per_visit = {f"recall@{k}": recall_at(ranked, truth, more, k) for k in RECALL_AT}
    per_visit["jaccard"] = jaccard(ranked >= threshold, truth, more)
    per_visit["pr_auc"] = visit_precision(ranked, truth, candidates)

    def mean_of(values: Floats) -> Callable[[Floats | None], Floats]:
        known = np.isfinite(values)

        def metric(weights: Floats | None) -> Floats:
            drawn = np.ones((1, len(values))) if weights is None else weights
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(drawn[:, known] @ values[known] / drawn[:, known].sum(1))

        return metric

    metrics: dict[str, Callable[[Floats | None], Floats]] = {name: mean_of(each) for name, each in per_visit.items()}
    metrics["pr_auc_macro"] = _macro(scores[rows], truth, candidates)
    subjects = questions.table["subject_id"].to_numpy()[rows]
    figures = bootstrap_intervals(metrics, subjects, num_resamples=num_resamples, seed=seed)
    figures["pr_auc_micro"] = _micro(scores[rows], truth, candidates, subjects, num_resamples, seed)
    return len(rows), figures, threshold


def recall_at(scores: Floats, truth: Bools, more: NDArray[np.int64], k: int) -> Floats:
    """`[n]` share of the drugs given that are among the k of the highest scores; -inf is never among them."""
    top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    listed = np.take_along_axis(np.isfinite(scores) & truth, top, axis=1)
    return np.asarray(listed.sum(1) / (truth.sum(1) + more))


def jaccard(chosen: Bools, truth: Bools, more: NDArray[np.int64]) -> Floats:
    """`[n]` drugs both chosen and given, over drugs chosen or given."""
    return np.asarray((chosen & truth).sum(1) / np.maximum((chosen | truth).sum(1) + more, 1))


def visit_precision(scores: Floats, truth: Bools, candidates: Bools) -> Floats:
    """`[n]` average precision over the candidates of each visit; NaN where none of them was given."""
    values = np.full(len(scores), np.nan)
    for row in np.flatnonzero(truth.any(1)):
        here = candidates[row]
        values[row] = Ranking(truth[row][here], scores[row][here]).average_precision()[0]
    return values


def best_jaccard_threshold(scores: Floats, truth: Bools, more: NDArray[np.int64], candidates: int = 200) -> float:
    """The score with the largest mean Jaccard index, of so many quantiles of the scores; 0.5 without a visit."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return 0.5
    tried = np.unique(np.quantile(finite, np.linspace(0, 1, candidates), method="nearest"))
    values = [float(jaccard(scores >= threshold, truth, more).mean()) for threshold in tried]
    return float(tried[int(np.argmax(values))])


def _macro(scores: Floats, truth: Bools, candidates: Bools) -> Callable[[Floats | None], Floats]:
    """Mean over drugs, those given in some visits at least, of their average precision over visits where they are
    candidates.
    """
    drugs = np.flatnonzero(truth.sum(0) >= _LEAST_GIVEN)
    rankings = [(candidates[:, d], Ranking(truth[candidates[:, d], d], scores[candidates[:, d], d])) for d in drugs]

    def metric(weights: Floats | None) -> Floats:
        if not rankings:
            return np.full(1 if weights is None else len(weights), np.nan)
        values = [
            ranking.average_precision(None if weights is None else weights[:, here]) for here, ranking in rankings
        ]
        known = np.isfinite(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(known, values, 0.0).sum(0) / known.sum(0))

    return metric


def _micro(
    scores: Floats, truth: Bools, candidates: Bools, subjects: NDArray[np.int64], num_resamples: int, seed: int
) -> Interval:
    """Average precision over all pairs of visit and candidate; without interval where there are too many."""
    visit, _ = np.nonzero(candidates)
    ranking = Ranking(truth[candidates], scores[candidates])
    if len(visit) > _MOST_CELLS:
        return Interval(float(ranking.average_precision()[0]), float("nan"), float("nan"))
    metric = {"micro": ranking.average_precision}
    return bootstrap_intervals(metric, subjects[visit], num_resamples=num_resamples, seed=seed)["micro"]
