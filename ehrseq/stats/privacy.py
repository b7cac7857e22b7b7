"""What stays of the counts where no cell may stand for fewer than so many patients."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from ehrseq.stats.counting import DatasetStatistics


def hide_few(statistics: DatasetStatistics, least_patients: int) -> tuple[DatasetStatistics, list[str]]:
    """Leave out what fewer than `least_patients` patients stand behind.

    Codes, kinds, months and periods of fewer patients are left out, periods also where the positives (or the negatives)
    come from fewer, though from someone. Lowest and highest values go, since each is one patient's; so do means of
    fewer patients. First and last times keep their year. Numbers of events come in powers of two, joined until each
    class has enough patients. Cells are hidden one by one: that none can be told from sums beside it is not promised.

    Args:
        statistics: The counts.
        least_patients: From how many patients on something is shown; 1 changes nothing.

    Returns:
        The counts that may be shown, and a sentence about each thing that was left out.
    """
    if least_patients <= 1:
        return statistics, []
    enough = pl.col("patients") >= least_patients
    years = [pl.col(name).dt.truncate("1y") for name in ("first", "last")]
    absent = [pl.lit(None, pl.Float64).alias(name) for name in ("lowest", "highest")]
    mean = pl.when(pl.col("patients_with_value") >= least_patients).then(pl.col("mean"))
    few = [
        pl.col(name).is_between(1, least_patients - 1)
        for name in ("patients", "positive_patients", "negative_patients")
    ]
    shown = replace(
        statistics,
        codes=statistics.codes.filter(enough).with_columns(*years, *absent, mean),
        kinds=statistics.kinds.filter(enough).with_columns(years),
        events_per_patient=_classes(statistics.events_per_patient, least_patients),
        calendar=statistics.calendar.filter(enough),
        prevalence=statistics.prevalence.filter(~pl.any_horizontal(few)),
    )
    notes = [
        f"Codes, kinds, months and periods of fewer than {least_patients:,} patients are left out, and so are lowest "
        "and highest values; first and last times are years. What is hidden may still follow from sums beside it."
    ]
    for name, what in (
        ("codes", "codes"),
        ("kinds", "kinds"),
        ("calendar", "months of a kind"),
        ("prevalence", "periods"),
    ):
        whole, kept = statistics.tables()[name], shown.tables()[name]
        if kept.height < whole.height:
            count = "labels" if name == "prevalence" else "rows"
            lost = int(whole[count].sum()) - int(kept[count].sum())
            notes.append(f"Left out: {whole.height - kept.height:,} of {whole.height:,} {what} ({lost:,} {count}).")
    if shown.events_per_patient.is_empty():
        notes.append("Left out: the numbers of events per patient.")
    return shown, notes


def _classes(table: pl.DataFrame, least_patients: int) -> pl.DataFrame:
    """Patients by number of rows, in classes from one power of two to below another; the last has no upper end."""
    counts: dict[int, int] = {}  # power of two -> patients
    for rows, patients in table.select("rows", "patients").iter_rows():
        counts[rows.bit_length() - 1] = counts.get(rows.bit_length() - 1, 0) + patients
    classes: list[list[int]] = []  # first power, patients
    for power in sorted(counts):
        if classes and classes[-1][1] < least_patients:
            classes[-1][1] += counts[power]
        else:
            classes.append([power, counts[power]])
    if len(classes) > 1 and classes[-1][1] < least_patients:
        last = classes.pop()
        classes[-1][1] += last[1]
    if classes and classes[0][1] < least_patients:
        classes = []
    starts = [1 << power for power, _ in classes]
    ends = [start - 1 for start in starts[1:]] + [None] * bool(starts)
    return pl.DataFrame({"rows": starts, "to": ends, "patients": [count for _, count in classes]}, schema=table.schema)
