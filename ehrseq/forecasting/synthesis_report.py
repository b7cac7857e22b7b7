"""What is to be said about synthetic patients: how alike they are, what they may give away, and what neither proves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq._html import html_page, note
from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.forecasting.copies import NATURAL_SHARE, PrivacyReport, attack
from ehrseq.forecasting.fidelity import FidelityReport, TransferredTask, fidelity, transfer
from ehrseq.forecasting.patient_counts import PatientCounts
from ehrseq.work.files import write_json, write_whole

MOST_PATIENTS = 10_000
"""Real patients of a kind that are compared; more are drawn from."""
_WORDS = (
    "These patients never lived: a model drew them. They may stand in for real ones where software is tried, courses "
    "are taught or a method is rehearsed. They are no evidence about patients: what is found in them has to be found "
    "again in real records.",
    "The numbers below are no guarantee of privacy. They say how much more the tried attacks learn from these "
    "patients than from held-out ones. Others may be tried; training was not differentially private, so no bound holds "
    "for what was not tried. Whether the data may leave the hospital is for its data protection officer to say, with "
    "this report in hand.",
)


@dataclass(frozen=True)
class SynthesisReport:
    """What was drawn, and how it compares.

    Attributes:
        model, like: Names of the checkpoint and the dataset.
        notice: What everybody must know of the model.
        seed: Of the call.
        asked, patients: Patients asked for and written.
        refused, missing: Draws that were refused as copies; patients of whom every draw was.
        events, tokens: Written and drawn.
        ends: Why records end -> patients.
        notes: What was left out or mended.
        allowed_run: Longest run of events that may be shared with a training patient; None = any was allowed.
        copied, natural, refused_runs: Median, 99th percentile and longest shared run of the written patients, of
            held-out patients, and of what was refused.
        fitted_on_training: Whether the model's tokenizer was fitted on the dataset's own training patients.
        synthetic_fidelity, real_fidelity: Synthetic patients, and another half of the real ones, against real ones.
        tasks: Trained on synthetic patients, tested on real ones.
        privacy: Attacks.
    """

    model: str
    notice: str
    like: str
    seed: int
    asked: int
    patients: int
    refused: int
    missing: int
    events: int
    tokens: int
    ends: Mapping[str, int]
    notes: Mapping[str, int]
    allowed_run: int | None
    copied: Mapping[str, float]
    natural: Mapping[str, float]
    refused_runs: Mapping[str, float]
    fitted_on_training: bool
    synthetic_fidelity: FidelityReport
    real_fidelity: FidelityReport
    tasks: tuple[TransferredTask, ...]
    privacy: PrivacyReport | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; null for what could not be said."""
        content: dict[str, Any] = _without_nan(asdict(self))
        return content

    def to_markdown(self) -> str:
        """The report as text."""
        parts = ["# Synthetic patients", "", *(f"{words}\n" for words in self._words())]
        return "\n".join([*parts, *(table.to_markdown() for table in self._tables())])

    def to_html(self) -> str:
        """The report as one page that needs nothing else; equal reports give equal bytes."""
        words = [f"<p>{text}</p>" for text in _WORDS] + [note(text) for text in self._words()[len(_WORDS) :]]
        parts = ["<h1>Synthetic patients</h1>", *words, *(table.to_html() for table in self._tables())]
        return html_page("ehrseq synthesize", parts)

    def __str__(self) -> str:
        lines = [f"{self.patients:,} synthetic patients, {self.events:,} events, like {self.like}, seed {self.seed}"]
        lines += [f"  {self.refused:,} draws refused as copies, {self.missing:,} patients missing for it"]
        lines += [f"  {name}: {count:,}" for name, count in self.notes.items()]
        lines += [
            f"  told from real patients with AUROC {_number(self.synthetic_fidelity.apart)} (two halves of the real "
            f"ones: {_number(self.real_fidelity.apart)})",
            f"  longest run shared with a training patient: {_number(self.copied.get('longest'))} events (held-out "
            f"patients: {_number(self.natural.get('longest'))})",
        ]
        if self.privacy is not None:
            natural = _number(self.privacy.natural_membership)
            lines.append(f"  membership attack: AUROC {_number(self.privacy.membership)} (held-out ones: {natural})")
        return "\n".join(lines)

    # -- parts ---------------------------------------------------------------------------------------------------------
    def _words(self) -> list[str]:
        words = [*_WORDS, *([self.notice] if self.notice else [])]
        if not self.fitted_on_training:
            words.append(
                f"The model's tokenizer was not fitted on the training patients of {self.like}. So the numbers on "
                "privacy are about patients that the model has probably never seen, and say nothing about those that "
                "it was trained on: give --like the dataset that it was trained on."
            )
        if self.allowed_run is None:
            words.append("Copies were allowed: a patient was written whatever run it shares with a training patient.")
        if self.privacy is None:
            words.append("Too few patients for attacks: at least 4 of each kind are needed.")
        return words

    def _tables(self) -> list[ReportTable]:
        tables = [self._counts(), self._fidelity(), self._medians(), self._codes()]
        if self.tasks:
            tables.append(self._tasks())
        tables.append(self._runs())
        if self.privacy is not None:
            tables.append(_privacy(self.privacy))
        return tables

    def _counts(self) -> ReportTable:
        rows = [
            ["patients asked for", f"{self.asked:,}"],
            ["patients written", f"{self.patients:,}"],
            ["draws refused as copies", f"{self.refused:,}"],
            ["patients of whom every draw was refused", f"{self.missing:,}"],
            ["events", f"{self.events:,}"],
            *([f"records that end by: {name}", f"{count:,}"] for name, count in self.ends.items()),
            *([name, f"{count:,}"] for name, count in self.notes.items()),
        ]
        return ReportTable(
            "What was drawn", ["", "number"], rows, f"Like {self.like}, by {self.model}, seed {self.seed}."
        )

    def _fidelity(self) -> ReportTable:
        own, real = self.synthetic_fidelity, self.real_fidelity
        rows = [
            ["patients", f"{own.patients[0]:,}", f"{real.patients[0]:,}", ""],
            ["told from real ones, AUROC", _number(own.apart), _number(real.apart), "0.5"],
            ["divergence of codes, bits", _number(own.divergence), _number(real.divergence), "0"],
            ["rank correlation of prevalences", _number(own.prevalence_rank), _number(real.prevalence_rank), "1"],
            [
                "mean difference of prevalences",
                *map(_number, (own.prevalence_difference, real.prevalence_difference)),
                "0",
            ],
            ["correlation of pairs' log odds", _number(own.co_occurrence), _number(real.co_occurrence), "1"],
            [f"values, median KS of {own.values[2]} tests", _number(own.values[0]), _number(real.values[0]), "0"],
            ["values, largest KS", _number(own.values[1]), _number(real.values[1]), "0"],
            *(
                [f"{name}, KS", _number(own.distances[name]), _number(real.distances[name]), "0"]
                for name in own.distances
            ),
        ]
        words = "Against real training patients; beside it another half of the real ones, which is as alike as can be."
        return ReportTable("How alike", ["", "synthetic", "real", "best"], rows, words)

    def _medians(self) -> ReportTable:
        rows = [[name, *map(_number, pair)] for name, pair in self.synthetic_fidelity.medians.items()]
        return ReportTable("Medians", ["", "synthetic", "real"], rows, "Of deaths the share.")

    def _codes(self) -> ReportTable:
        rows = [[code, f"{own:.1%}", f"{real:.1%}"] for code, own, real in self.synthetic_fidelity.codes]
        return ReportTable(
            "Codes that differ most", ["code", "synthetic", "real"], rows, "Share of patients who have it."
        )

    def _tasks(self) -> ReportTable:
        names = list(self.tasks[0].trained)
        header = ["task", *(f"trained on {name}" for name in names), "tested on", "positives"]
        rows = [
            [each.task, *(_number(each.trained[name]) for name in names), f"{each.tested[0]:,}", f"{each.tested[1]:,}"]
            for each in self.tasks
        ]
        words = "AUROC of boosting on counts on held-out real patients; empty where a class has too few labels."
        return ReportTable("Trained on synthetic, tested on real", header, rows, words)

    def _runs(self) -> ReportTable:
        rows = [
            [what, *(_number(runs.get(name)) for name in ("median", "p99", "longest"))]
            for what, runs in (
                ("synthetic patients that were written", self.copied),
                ("held-out patients", self.natural),
                ("draws that were refused", self.refused_runs),
            )
            if runs
        ]
        limit = "any run" if self.allowed_run is None else f"up to {self.allowed_run} events"
        words = (
            "Events in a row (code and value's bin) that some training patient has too. What held-out patients share "
            f"is common by nature; {limit} may be shared."
        )
        header = ["longest run shared with a training patient", "median", f"{NATURAL_SHARE:.0%}", "longest"]
        return ReportTable("Copied runs", header, rows, words)


def _privacy(found: PrivacyReport) -> ReportTable:
    number = _number
    rows = [
        ["median distance to the nearest training patient", number(found.nearest_training), ""],
        ["... to the nearest of as many held-out patients", number(found.nearest_held_out), ""],
        [
            "closer to a training patient than to a held-out one",
            number(found.closer_to_training),
            number(found.natural_closer),
        ],
        ["nearest through second nearest distance", number(found.distance_ratio), number(found.natural_distance_ratio)],
        ["was this person trained on? AUROC", number(found.membership), number(found.natural_membership)],
        ["does this training patient have the code? AUROC", number(found.attribute), number(found.attribute_natural)],
        ["... the same about held-out patients", number(found.attribute_held_out), ""],
    ]
    words = (
        "Half is chance where a row asks for an AUROC, or for who lies closer. In the right column held-out patients "
        "stand in place of the synthetic ones, from whom nothing of the training patients can leak. A code that is "
        "guessed as well of held-out patients was inferred, not leaked; asked were "
        f"{len(found.sensitive)} diagnoses. Compared were {found.patients[0]:,} synthetic, {found.patients[1]:,} "
        f"training and {found.patients[2]:,} held-out patients."
    )
    return ReportTable("Attacks", ["", "synthetic", "held-out in their place"], rows, words)


def compare_cohorts(
    synthetic: pl.DataFrame,
    training: pl.DataFrame,
    held_out: pl.DataFrame,
    *,
    tasks: Sequence[str] = (),
    code_map: Sequence[Sequence[str]] | None = None,
    end_of_data: datetime,
    seed: int = 0,
) -> dict[str, Any]:
    """What `SynthesisReport` says of fidelity, tasks and privacy.

    Args:
        synthetic, training, held_out: Event tables.
        tasks: Packaged tasks that are learned and tested.
        code_map: What codes mean.
        end_of_data: Last moment of the real data.
        seed: Of what is drawn.
    """
    random = np.random.default_rng(seed)
    synthetic, training, held_out = (_some(table, random) for table in (synthetic, training, held_out))
    subjects = training["subject_id"].unique().sort().to_numpy()
    order = random.permutation(len(subjects))
    halves = [_of(training, subjects[part]) for part in np.array_split(order, 2)]
    own = fidelity(synthetic, halves[0], code_map=code_map, seed=seed)
    real = fidelity(halves[1], halves[0], code_map=code_map, seed=seed)
    learned = {"synthetic": synthetic, "real": training}
    done = transfer(learned, held_out, tasks, end_of_data=end_of_data, code_map=code_map, seed=seed) if tasks else []
    counts = [PatientCounts.of(table, code_map=code_map) for table in (synthetic, training, held_out)]
    enough = min(map(len, counts)) >= 4
    return {
        "synthetic_fidelity": own,
        "real_fidelity": real,
        "tasks": tuple(done),
        "privacy": attack(*counts, seed=seed) if enough else None,
    }


def write_synthesis_report(report: SynthesisReport, folder: str | Path) -> Path:
    """Write `report.md`, `report.html` and `report.json`; returns the page."""
    folder = Path(folder)

    def write(unfinished: Path) -> None:
        unfinished.mkdir()
        (unfinished / "report.md").write_text(report.to_markdown(), encoding="utf-8")
        (unfinished / "report.html").write_text(report.to_html(), encoding="utf-8")
        write_json(unfinished / "report.json", report.to_dict(), indent=2)

    write_whole(folder, write)
    return folder / "report.html"


def _some(events: pl.DataFrame, random: np.random.Generator) -> pl.DataFrame:
    subjects = events["subject_id"].unique().sort().to_numpy()
    if len(subjects) <= MOST_PATIENTS:
        return events
    return _of(events, random.choice(subjects, MOST_PATIENTS, replace=False))


def _of(events: pl.DataFrame, subjects: np.ndarray) -> pl.DataFrame:
    wanted = pl.DataFrame({"subject_id": subjects}, schema={"subject_id": pl.Int64})
    return events.join(wanted, on="subject_id", how="semi", maintain_order="left")


def _number(value: float | None) -> str:
    if value is None or value != value:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.3g}"


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content


__all__ = ["SynthesisReport", "compare_cohorts", "write_synthesis_report"]
