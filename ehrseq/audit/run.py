"""The whole audit: every file of a dataset once, in blocks, then what only all of them together tell."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.audit.codes import MOMENT_FEATURES, add_up
from ehrseq.audit.findings import KINDS, Accepted, AuditReport, Finding, read_accepted
from ehrseq.audit.fit import Fitted, fit_findings, read_fitted
from ehrseq.audit.labels import label_rows
from ehrseq.audit.rows import RowSource, encoding_findings, is_encoded_folder, row_sources, time_findings
from ehrseq.audit.shard import TABLES, ShardWork, audit_shard, write_rows
from ehrseq.audit.statistics import LEAST_ROWS, Totals, code_findings, gap_findings, value_findings
from ehrseq.data.meds import read_parquet, read_splits
from ehrseq.data.shards import Shard, dataset_shards, latest_time, scan_shard
from ehrseq.tasks.label_sources import AuditedTask, read_audited
from ehrseq.tasks.schema import Task
from ehrseq.tasks.timeline import as_instant
from ehrseq.work.engine import Engine, get_engine

logger = logging.getLogger(__name__)

_DRAWN = 20  # rows of a task and class that are encoded again
_EXAMPLES = 30  # findings about codes for which a patient is looked up


def audit_dataset(
    dataset: str | Path,
    labels: str | Path,
    *,
    model: str | Path | None = None,
    rows: str | Path | None = None,
    tasks: Sequence[str | Path | Task] = (),
    accept: Sequence[str | Path | Accepted] = (),
    bound: float = 0.9,
    per_class: int = 10_000,
    end_of_data: datetime | date | str | None = None,
    work: str | Path | None = None,
    engine: Engine | None = None,
) -> AuditReport:
    """Look for leaks in a prepared dataset and its labels, and in what a model was given.

    Args:
        dataset: Folder that `ehrseq prepare` or `write_dataset` wrote.
        labels: The dataset again (its `labels/`), a folder of labels, or a label table.
        model: Checkpoint whose tokenizer (or feature extractor) is audited too; default: the one of `rows`.
        rows: Folder that `ehrseq tokenize` wrote, or tables of rows (`EhrTokenizer.encode_table` with labels).
        tasks: Definitions of tasks that do not come with the package: files or tasks.
        accept: Keys `kind[:task[:item]]`, YAML files of such, or `Accepted`.
        bound: AUROC of a single code from which on it is listed.
        per_class: Rows of each task and class that codes are counted on.
        end_of_data: Where follow-up ended; default: as the report beside the labels says, else the last event.
        work: Folder for intermediate files (on a cluster: one that every machine sees); default: a temporary one.
        engine: Where to work, default all cores of this machine.

    Returns:
        The report; `report.open` are the findings that nobody has accepted.

    Raises:
        ValueError: No prepared dataset, no labels, no checkpoint, an unknown key, a bound outside (0.5, 1].
    """
    if not 0.5 < bound <= 1:
        raise ValueError(f"bound must lie above 0.5 and at most at 1, got {bound}.")
    if isinstance(per_class, bool) or not isinstance(per_class, int) or per_class < LEAST_ROWS:
        raise ValueError(f"per_class must be a whole number from {LEAST_ROWS} on, got {per_class!r}.")
    accepted = [
        *(entry for entry in accept if isinstance(entry, Accepted)),
        *read_accepted(entry for entry in accept if not isinstance(entry, Accepted)),
    ]
    shards = dataset_shards(dataset)
    audited = read_audited(labels, tasks)
    if model is None and rows is not None and is_encoded_folder(Path(rows)):
        model = Path(rows) / "tokenizer"
    fitted = None if model is None else read_fitted(model)
    encoded = [] if rows is None else row_sources(rows, {task.name: task.labels for task in audited})
    given_end = as_instant(end_of_data)
    with tempfile.TemporaryDirectory(dir=None if work is None else str(work), prefix="ehrseq-audit-") as folder:
        audit = _Audit(Path(dataset), shards, audited, fitted, Path(folder), given_end)
        report = AuditReport(str(dataset))
        audit.look(report, per_class, bound, engine or get_engine())
        if fitted is not None:
            audit.look_at_fit(report, str(model))
        audit.look_at_rows(report, model, encoded)
    report.accept(accepted)
    return report


class _Audit:
    """One audit under way.

    Args:
        dataset: Its folder.
        shards: Its files.
        tasks: Labels.
        fitted: What the model's tokenizer says of its fit.
        folder: For intermediate files.
        end_of_data: Given by the user.
    """

    def __init__(
        self,
        dataset: Path,
        shards: list[Shard],
        tasks: list[AuditedTask],
        fitted: Fitted | None,
        folder: Path,
        end_of_data: datetime | None,
    ) -> None:
        self.dataset, self.shards, self.tasks, self.fitted, self.folder = dataset, shards, tasks, fitted, folder
        self.names = tuple(task.name for task in tasks)
        self.ids = _source_ids(dataset)
        last = end_of_data or (latest_time(shards) if any(task.end_of_data is None for task in tasks) else None)
        self.definitions = tuple(
            (number, task.definition, end)
            for number, task in enumerate(tasks)
            if task.definition is not None and (end := end_of_data or task.end_of_data or last) is not None
        )
        self.rows = pl.DataFrame()
        self.subjects = pl.DataFrame()

    def look(self, report: AuditReport, per_class: int, bound: float, engine: Engine) -> None:
        """Whatever events, labels and splits tell."""
        self.rows = label_rows(self.tasks, per_class)
        file = self.folder / "rows.parquet"
        write_rows(self.rows, file)
        rules = None if self.fitted is None else self.fitted.code_map
        kinds = None if self.fitted is None else self.fitted.input_kinds
        work = [
            ShardWork(shard, str(file), str(self.folder / f"part-{k}"), self.names, self.definitions, rules, kinds)
            for k, shard in enumerate(self.shards)
        ]
        parts = [Path(part) for part in engine.map(audit_shard, work, desc="Auditing")]
        results = [json.loads((part / "result.json").read_text(encoding="utf-8")) for part in parts]
        self.subjects = pl.concat(
            pl.read_parquet(part / "subjects.parquet").with_columns(pl.lit(result["split"]).alias("split"))
            for part, result in zip(parts, results, strict=True)
            if (part / "subjects.parquet").is_file()
        )
        self._say_what_is_there(report, sum(result["matched"] for result in results))
        report.findings += self._split_findings()
        report.findings += self._outcome_findings([one for result in results for one in result["found"]])
        tables = {
            name: add_up(pl.read_parquet(part / f"{name}.parquet") for part in having)
            for name in TABLES
            if (having := [part for part in parts if (part / f"{name}.parquet").is_file()])
        }
        if tables:
            report.findings += self._code_findings(tables, bound)

    def look_at_fit(self, report: AuditReport, model: str) -> None:
        """On whom the tokenizer was fitted."""
        if self.fitted is None:
            return
        splits = {
            str(name): group["subject_id"].to_list()
            for (name,), group in self.subjects.partition_by("split", as_dict=True).items()
        }
        found = list(fit_findings(self.fitted, splits, model))
        report.findings += found
        if not found:
            report.checks[self.fitted.kind] = f"fitted on {self.fitted.subjects:,} patients, all of pretrain and train"

    def look_at_rows(self, report: AuditReport, model: str | Path | None, encoded: list[RowSource]) -> None:
        """Encoded rows, given ones or those that the model's tokenizer makes."""
        tokenizer = None
        if model is not None and self.fitted is not None and self.fitted.kind == "tokenizer":
            from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

            tokenizer = EhrTokenizer.from_pretrained(str(model))
        if encoded:
            found = list(time_findings(encoded, self.subjects.select("subject_id", "first").unique("subject_id")))
            report.findings += self._outcome_findings(found)
            count = sum(batch.height for source in encoded for batch in source.batches())
            report.checks["encoded rows"] = f"{count:,}, the times of all held against their prediction"
        if tokenizer is None:
            if not encoded:
                report.checks["encoded rows"] = "not looked at; give --rows, or --model to encode some"
            return
        drawn = self.rows.filter(
            "counted",
            pl.struct("subject_id", "prediction_time").hash(seed=2).rank("ordinal").over("task", "label") <= _DRAWN,
        )
        for finding in encoding_findings(tokenizer, self.shards, drawn, self.names, encoded):
            subject, at, what = finding.example.split("\t")
            example = f"patient {self._id(int(subject))} at {at}: {what}"
            report.findings.append(Finding(**{**vars(finding), "example": example}))
        known = [name for name in self.names if name in tokenizer.tasks]
        count = drawn.filter(pl.col("task").is_in([self.names.index(name) for name in known])).height
        report.checks["rows encoded again"] = f"{count:,}, from events cut at their prediction time" + (
            ""
            if len(known) == len(self.names)
            else f"; the tokenizer does not know {sorted(set(self.names) - set(known))}"
        )

    # -- what the files say together ---------------------------------------------------------------------------------

    def _say_what_is_there(self, report: AuditReport, matched: int) -> None:
        sizes = self.subjects.group_by("split").agg(pl.col("subject_id").n_unique()).sort("split")
        report.checks["patients"] = ", ".join(f"{name} {count:,}" for name, count in sizes.iter_rows())
        for number, task in enumerate(self.tasks):
            own = self.rows.filter(pl.col("task") == number)
            positives = int(own["label"].sum())
            notes = [f"{own.height:,} labels, {positives:,} positive"]
            repeated = own.height - own.select("subject_id", "prediction_time").n_unique()
            if repeated:
                notes.append(f"{repeated:,} of a moment that has a label already")
            if min(positives, own.height - positives) < LEAST_ROWS:
                notes.append(f"too few of a class to judge codes ({LEAST_ROWS} needed)")
            if task.definition is None:
                notes.append(f"definition unknown, so labels are not recomputed: {task.unknown}")
            report.checks[task.name] = "; ".join(notes)
        if matched < self.rows.height:
            report.checks["labels of patients who are not in the dataset"] = f"{self.rows.height - matched:,}"

    def _split_findings(self) -> Iterator[Finding]:
        placed = self.subjects.select("subject_id", "split").unique()
        sources = {"data": placed}
        listed = read_splits(self.dataset)
        if listed is not None:
            sources["metadata"] = listed.unique()
            sources["data and metadata"] = pl.concat([placed, listed]).unique()
        seen: set[int] = set()
        for where, table in sources.items():
            several = (
                table.group_by("subject_id")
                .agg(pl.col("split").unique().sort(), pl.col("split").n_unique().alias("n"))
                .filter(pl.col("n") > 1)
                .filter(~pl.col("subject_id").is_in(list(seen)))
                .sort("subject_id")
            )
            if several.is_empty():
                continue
            seen |= set(several["subject_id"].to_list())
            subject, splits, _ = several.row(0)
            yield Finding(
                "shared_patients",
                "",
                where,
                several.height,
                f"{several.height:,} patient(s) stand in more than one split ({where}).",
                f"patient {self._id(subject)} is in {', '.join(splits)}",
            )
        copies = (
            self.subjects.drop_nulls("digest")
            .unique(["subject_id", "split"])
            .group_by("digest", "rows")
            .agg(
                pl.col("subject_id").sort(),
                pl.col("split").n_unique().alias("n"),
                pl.col("split").sort_by("subject_id"),
            )
            .filter((pl.col("n") > 1) & (pl.col("subject_id").list.n_unique() > 1))
            .sort(pl.col("subject_id").list.first())
        )
        if not copies.is_empty():
            row = copies.row(0, named=True)
            both = [
                f"{self._id(subject)} ({split})" for subject, split in zip(row["subject_id"], row["split"], strict=True)
            ]
            yield Finding(
                "copied_patients",
                "",
                "",
                copies.height,
                f"{copies.height:,} histories are held by patients of several splits: the same {row['rows']:,} events "
                "at the same distances.",
                f"patients {' and '.join(both[:2])}",
            )

    def _outcome_findings(self, found: list[dict[str, Any]]) -> Iterator[Finding]:
        merged: dict[tuple[str, str, str], dict[str, Any]] = {}
        for one in found:
            key = (one["kind"], one["task"], one["item"])
            if key in merged:
                merged[key]["count"] += one["count"]
                merged[key]["positives"] += one["positives"]
            else:
                merged[key] = dict(one)
        for (kind, task, item), one in merged.items():
            whole = self.rows.filter(pl.col("task") == self.names.index(task)).height if task in self.names else 0
            of = f" of {whole:,}" if whole and kind != "future_event_in_row" else ""
            positives = f", {one['positives']:,} of them positive" if kind != "future_event_in_row" else ""
            yield Finding(
                kind,
                task,
                item,
                one["count"],
                f"{one['count']:,}{of} rows{positives}: {KINDS[kind]} ({item}).",
                f"patient {self._id(one['subject_id'])} at {one['prediction_time']}: {one['text']}",
            )

    def _code_findings(self, tables: dict[str, pl.DataFrame], bound: float) -> Iterator[Finding]:
        totals = {}
        for number, name in enumerate(self.names):
            own = self.rows.filter(pl.col("task") == number)
            counted, ahead = own.filter("counted"), own.filter("ahead")
            totals[number] = Totals(
                name,
                int(counted["label"].sum()),
                counted.height - int(counted["label"].sum()),
                int(ahead["label"].sum()),
                ahead.height - int(ahead["label"].sum()),
            )
        found = [
            *code_findings(tables["codes"], totals, bound),
            *value_findings(tables["values"], totals, bound),
            *gap_findings(tables["ahead"], totals),
        ]
        for number, finding in enumerate(found):
            example = self._code_example(finding) if number < _EXAMPLES else ""
            yield Finding(**{**vars(finding), "example": example})

    def _code_example(self, finding: Finding) -> str:
        """A positive row that the finding speaks of (a negative one where the code speaks for that)."""
        value = finding.numbers.get("auroc", 1.0) > 0.5 or finding.item in MOMENT_FEATURES
        code = finding.numbers["codes"][0] if "codes" in finding.numbers else finding.item
        rows = self.rows.filter(
            (pl.col("task") == self.names.index(finding.task)) & (pl.col("label") == value) & pl.col("counted")
        )
        after = "codes" in finding.numbers
        for shard in self.shards:
            if code in MOMENT_FEATURES:
                row = rows.row(0, named=True)
                return f"patient {self._id(row['subject_id'])} at {row['prediction_time']}, label {str(value).lower()}"
            exact = pl.col("code") == code
            # A text result is counted as CODE//text.
            text = pl.concat_str("code", pl.lit("//"), "text_value").eq(code).fill_null(False)
            held = scan_shard(shard).filter(exact | text).select("subject_id", "time").collect()
            pairs = held.join(rows, on="subject_id")
            if after:
                apart = (pl.col("time") - pl.col("prediction_time")).dt.total_seconds()
                pairs = pairs.filter(apart == finding.numbers["seconds"])
            else:
                pairs = pairs.filter(pl.col("time").is_null() | (pl.col("time") <= pl.col("prediction_time")))
            if not pairs.is_empty():
                row = pairs.sort("time", "subject_id", descending=[True, False]).row(0, named=True)
                when = "without a time" if row["time"] is None else f"at {row['time']}"
                return (
                    f"patient {self._id(row['subject_id'])} at {row['prediction_time']}, label {str(value).lower()}: "
                    f"{code} {when}"
                )
        return ""

    def _id(self, subject: int) -> str:
        """A patient's id as the user gave it."""
        return self.ids.get(subject, str(subject))


def _source_ids(dataset: Path) -> dict[int, str]:
    """subject_id -> the source's own id, where the source's ids are no numbers."""
    file = dataset / "metadata" / "subject_ids.parquet"
    if not file.is_file():
        return {}
    table = read_parquet(file)
    return dict(zip(table["subject_id"].to_list(), table["source_id"].to_list(), strict=True))
