"""The whole audit: every file of a dataset once, in blocks, then what only all of them together tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import polars as pl

from ehrseq.audit.codes import MOMENT_FEATURES, add_up
from ehrseq.audit.findings import KINDS, Accepted, AuditReport, Finding, read_accepted
from ehrseq.audit.fit import Fitted, fit_findings, read_fitted
from ehrseq.audit.labels import audit_rows
from ehrseq.audit.outcomes import RowFinding, merged
from ehrseq.audit.rows import RowSource, encoding_findings, is_encoded_folder, row_sources, time_findings
from ehrseq.audit.shard import AuditPart
from ehrseq.audit.statistics import LEAST_ROWS, Totals, code_findings, gap_findings, value_findings
from ehrseq.data.meds import read_parquet, read_splits
from ehrseq.data.metadata import read_settings
from ehrseq.data.shards import Shard, dataset_shards, latest_time, scan_shard
from ehrseq.tasks.label_sources import AuditedTask, read_audited
from ehrseq.tasks.schema import Task
from ehrseq.tasks.timeline import as_instant
from ehrseq.work.engine import Engine
from ehrseq.work.files import write_whole
from ehrseq.work.parts import kept_parts, run_parts, table_digest

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
        work: Folder for intermediate files (on a cluster: one that every machine sees), from which a run that was
            stopped goes on; default: a temporary one.
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
    audit = _Audit(Path(dataset), shards, audited, fitted, as_instant(end_of_data))
    report = AuditReport(str(dataset))
    audit.look(report, per_class, bound, None if work is None else Path(work), engine)
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
        end_of_data: Given by the user.
    """

    def __init__(
        self,
        dataset: Path,
        shards: list[Shard],
        tasks: list[AuditedTask],
        fitted: Fitted | None,
        end_of_data: datetime | None,
    ) -> None:
        self.dataset, self.shards, self.tasks, self.fitted = dataset, shards, tasks, fitted
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

    def look(self, report: AuditReport, per_class: int, bound: float, work: Path | None, engine: Engine | None) -> None:
        """Whatever events, labels and splits tell."""
        self.rows = audit_rows(self.tasks, per_class)
        said = read_settings(self.dataset)
        read_as = said.rules if self.fitted is None or self.fitted.code_map is None else self.fitted.code_map
        rules = said.rules or read_as
        kinds = None if self.fitted is None else self.fitted.input_kinds
        settings = [str(self.dataset.resolve()), table_digest(self.rows), self.names, self.definitions]
        with kept_parts(
            None if work is None else work / ".audit", [*settings, read_as, kinds, rules, said.timezone]
        ) as folder:
            file = folder / "rows.parquet"
            # In row groups that a range of subjects picks from.
            write_whole(file, lambda path: self.rows.write_parquet(path, row_group_size=100_000))
            parts = [
                AuditPart(
                    shard, str(folder), str(file), self.names, self.definitions, read_as, kinds, rules, said.timezone
                )
                for shard in self.shards
            ]
            reports = list(run_parts(parts, desc="Auditing", folder=folder, engine=engine))
            files: dict[str, list[Path]] = {}
            for part, counts in zip(parts, reports, strict=True):
                for name in counts["tables"]:
                    files.setdefault(name, []).append(part.beside(f".{name}.parquet"))
            tables = {name: [pl.read_parquet(file) for file in several] for name, several in files.items()}
        if "subjects" not in tables:
            raise ValueError(f"{self.dataset} holds no events, so that there is nothing to audit; prepare some.")
        self.subjects = pl.concat(tables.pop("subjects"))
        self._say_what_is_there(report, sum(counts["matched"] for counts in reports))
        report.findings += self._split_findings()
        report.findings += self._row_findings(finding for counts in reports for finding in counts["findings"])
        if tables:
            report.findings += self._code_findings({name: add_up(blocks) for name, blocks in tables.items()}, bound)

    def look_at_fit(self, report: AuditReport, model: str) -> None:
        """On whom the tokenizer was fitted."""
        if self.fitted is None:
            return
        splits = {
            str(name): group["subject_id"].to_list()
            for (name,), group in self.subjects.partition_by("split", as_dict=True).items()
        }
        findings = list(fit_findings(self.fitted, splits, model))
        report.findings += findings
        if not findings:
            report.checks[self.fitted.kind] = f"fitted on {self.fitted.subjects:,} patients, all of pretrain and train"

    def look_at_rows(self, report: AuditReport, model: str | Path | None, encoded: list[RowSource]) -> None:
        """Encoded rows: the user's, or those that the model's tokenizer makes."""
        tokenizer = None
        if model is not None and self.fitted is not None and self.fitted.kind == "tokenizer":
            from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

            tokenizer = EhrTokenizer.from_pretrained(str(model))
        if encoded:
            first = self.subjects.select("subject_id", "first").unique("subject_id")
            report.findings += self._row_findings(time_findings(encoded, first))
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
            report.findings.append(replace(finding, example=example))
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
            rows = self.rows.filter(pl.col("task") == number)
            positives = int(rows["label"].sum())
            notes = [f"{rows.height:,} labels, {positives:,} positive"]
            repeated = rows.height - rows.select("subject_id", "prediction_time").n_unique()
            if repeated:
                notes.append(f"{repeated:,} of a moment that has a label already")
            if min(positives, rows.height - positives) < LEAST_ROWS:
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

    def _row_findings(self, findings: Iterable[RowFinding]) -> Iterator[Finding]:
        for one in merged(findings):
            kind, task, item = one["kind"], one["task"], one["item"]
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
            rows = self.rows.filter(pl.col("task") == number)
            counted, ahead = rows.filter("counted"), rows.filter("ahead")
            totals[number] = Totals(
                name,
                int(counted["label"].sum()),
                counted.height - int(counted["label"].sum()),
                int(ahead["label"].sum()),
                ahead.height - int(ahead["label"].sum()),
            )
        findings = [
            *code_findings(tables["codes"], totals, bound),
            *value_findings(tables["values"], totals, bound),
            *gap_findings(tables["ahead"], totals),
        ]
        for number, finding in enumerate(findings):
            example = self._code_example(finding) if number < _EXAMPLES else ""
            yield replace(finding, example=example)

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
