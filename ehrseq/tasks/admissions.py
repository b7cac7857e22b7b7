"""Admissions: the stays in hospital that tasks index, merged out of encounters.

An *admission* is what inpatient encounters (classes IMP, ACUTE, NONAC) become when those that overlap, and those that
follow one another on the same day at the hospital (a transfer), are taken as one. It starts with the first of them and
ends with the last. Emergency and ICU encounters that overlap it belong to it, but never make or lengthen one.

An encounter without an end is no stay in progress by itself. It is in progress where the source says so, or where it is
the patient's last admission, nothing says that it has ended, and it is not older than `IN_PROGRESS_DAYS` at the end of
the data, or at the patient's death. Nothing inpatient of the patient may start after it (children with its visit_id
aside). Otherwise its end is unknown, and it must not swallow the rest of the patient's life: it then counts as its
start alone, and the discharge of its stay is unknown unless another encounter of the stay goes on beyond it.

Stays in intensive care (`merge_icu_stays`) are ICU encounters, those less than an hour apart taken as one: a transfer
between units. Visits as an outpatient (`merge_visits`) are encounters of every other class but emergencies, those of
one day taken as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from ehrseq.tasks.encounters import CONTINUES
from ehrseq.tasks.zones import Zones
from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES

CLOSED, IN_PROGRESS, END_UNKNOWN = "closed", "in_progress", "end_unknown"
"""Status of an admission: discharged; it goes on; it has ended or may have, nobody knows when."""

IN_PROGRESS_DAYS = 30
"""Days before the end of the data, or the patient's death, within which the last admission is taken to go on where
nothing says that it has ended: the silence after which a tokenizer lets such a visit lapse
(`ehr_visits.SILENCE_DAYS`)."""

FAR_FUTURE = datetime(9999, 12, 31)
_MERGED_CLASSES = ("EMER", "ICU")
_COLUMNS = (
    *("subject_id", "admission", "start", "start_day", "end", "status", "reach"),
    *("extent_start", "extent_end"),
)
_ICU_TRANSFER = timedelta(hours=1)
"""Time between two stays in intensive care up to which they are one."""


@dataclass(frozen=True)
class FollowUp:
    """Where the data of each patient end.

    Attributes:
        end_of_data: Last instant that the data cover.
        deaths: subject_id, death: see `ehrseq.tasks.deaths.patient_deaths`.
        zones: Tells the days at the hospital.
    """

    end_of_data: datetime
    deaths: pl.DataFrame
    zones: Zones


@dataclass(frozen=True)
class Admissions:
    """Admissions of every subject and what belongs to them.

    Attributes:
        table: One row per admission, sorted: subject_id, admission (number), start, start_day (at the hospital), end
            (null unless closed), status, reach (end, or the far future while in progress, or the last known start),
            extent_start and extent_end (start and reach, with the emergency and ICU encounters that belong to it).
        members: subject_id, visit_id, admission, start: the visit_ids of an admission's encounters.
        visits: subject_id, visit_id: every visit_id that has an encounter, admissions and others.
    """

    table: pl.DataFrame
    members: pl.DataFrame
    visits: pl.DataFrame

    def locate(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The admission of each row.

        A row belongs to the admission of its visit_id; where it has none, or one without encounter, to the admission
        whose extent contains its time; a row of another encounter belongs to none.

        Args:
            rows: subject_id, time, visit_id.

        Returns:
            The rows with `admission`, null outside admissions; order not kept.
        """
        known = rows.join(self.visits, on=["subject_id", "visit_id"], how="semi")
        loose = rows.join(self.visits, on=["subject_id", "visit_id"], how="anti")  # null visit_ids too
        # A visit_id with several admissions (it should not happen): the latest that had started, else the first.
        members = self.members.sort("start")
        by_visit = (
            known.sort("time")
            .join_asof(
                members,
                left_on="time",
                right_on="start",
                by=["subject_id", "visit_id"],
                strategy="backward",
                check_sortedness=False,
            )
            .drop("start")
        )
        first = members.group_by("subject_id", "visit_id", maintain_order=True).agg(pl.col("admission").first())
        by_visit = (
            by_visit.join(first.rename({"admission": "first"}), on=["subject_id", "visit_id"], how="left")
            .with_columns(pl.coalesce("admission", "first").alias("admission"))
            .drop("first")
        )
        by_time = self.at(loose)
        return pl.concat([by_visit, by_time.select(by_visit.columns)])

    def at(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows (subject_id, time, ...) with the `admission` whose extent contains their time, null for none."""
        stays = self.table.select("subject_id", "admission", "extent_start", "extent_end").sort("extent_start")
        return (
            rows.sort("time")
            .join_asof(
                stays,
                left_on="time",
                right_on="extent_start",
                by="subject_id",
                strategy="backward",
                check_sortedness=False,
            )
            .with_columns(pl.when(pl.col("time") <= pl.col("extent_end")).then(pl.col("admission")).alias("admission"))
            .drop("extent_start", "extent_end")
        )


def merge_admissions(encounters: pl.DataFrame, follow_up: FollowUp) -> Admissions:
    """Merge encounters into admissions.

    Args:
        encounters: subject_id, visit_id, encounter_class, start, end, open, as `ehrseq.tasks.encounters` gives them.
        follow_up: Where the data of each patient end, and the days at the hospital.
    """
    of_class = pl.col("encounter_class").is_in(list(INPATIENT_CLASSES))
    inpatient = _with_status(encounters.filter(of_class), follow_up)

    # 1. A new admission where an encounter starts on a later day than everything before it reaches.
    # 2. One row each.
    inpatient, table = _merge(inpatient, pl.col("start_day") > pl.col("previous_day"))

    # 3. Emergency and ICU encounters that overlap an admission belong to it.
    others = (
        encounters.filter(pl.col("encounter_class").is_in(_MERGED_CLASSES))
        .with_columns(pl.max_horizontal("start", pl.coalesce("end", "start")).alias("other_end"))
        .rename({"start": "other_start"})
        .sort("other_end")
        .join_asof(
            table.select("subject_id", "admission", "start", "reach").sort("start"),
            left_on="other_end",
            right_on="start",
            by="subject_id",
            strategy="backward",
            check_sortedness=False,
        )
        .filter(pl.col("reach") >= pl.col("other_start"))
    )
    extents = others.group_by("admission").agg(pl.col("other_start").min(), pl.col("other_end").max())
    table = (
        table.join(extents, on="admission", how="left")
        .with_columns(
            pl.min_horizontal("start", "other_start").alias("extent_start"),
            pl.max_horizontal("reach", "other_end").alias("extent_end"),
        )
        .select(_COLUMNS)
        .sort("subject_id", "start")
    )
    member_columns = ["subject_id", "visit_id", "admission"]
    members = (
        pl.concat([inpatient.select(member_columns), others.select(member_columns)])
        .filter(pl.col("visit_id").is_not_null())
        .unique()
        .join(table.select("admission", "start"), on="admission")
    )
    visits = encounters.select("subject_id", "visit_id").filter(pl.col("visit_id").is_not_null()).unique()
    return Admissions(table, members, visits)


def merge_icu_stays(encounters: pl.DataFrame, admissions: Admissions, follow_up: FollowUp) -> Admissions:
    """Stays in intensive care; an open one inside an admission that is over has an unknown end.

    Args:
        encounters: As of `merge_admissions`.
        admissions: The admissions.
        follow_up: As of `merge_admissions`.
    """
    units = _with_status(encounters.filter(pl.col("encounter_class") == "ICU"), follow_up)
    _, table = _merge(units, pl.col("start") > pl.col("previous_reach") + _ICU_TRANSFER)
    of = admissions.at(table.select("subject_id", pl.col("start").alias("time"), pl.col("admission").alias("stay")))
    over = of.join(
        admissions.table.select("admission", pl.col("status").alias("of")), on="admission", how="left"
    ).select(pl.col("stay").alias("admission"), "of")
    lost = (pl.col("status") == IN_PROGRESS) & (pl.col("of") != IN_PROGRESS).fill_null(False)
    table = table.join(over, on="admission", how="left").with_columns(
        pl.when(lost).then(pl.lit(END_UNKNOWN)).otherwise("status").alias("status"),
        pl.when(lost).then("start").otherwise("reach").alias("reach"),
    )
    return _alone(table)


def merge_visits(encounters: pl.DataFrame, zones: Zones) -> Admissions:
    """Visits as an outpatient; one without an end has an unknown end.

    Args:
        encounters: As of `merge_admissions`.
        zones: As of `merge_admissions`.
    """
    outside = encounters.filter(~pl.col("encounter_class").is_in([*sorted(INPATIENT_CLASSES), *_MERGED_CLASSES]))
    marked = outside.select(
        "subject_id",
        "visit_id",
        "start",
        "end",
        pl.when(pl.col("end").is_null()).then(pl.lit(END_UNKNOWN)).otherwise(pl.lit(CLOSED)).alias("status"),
        pl.max_horizontal("start", pl.coalesce("end", "start")).alias("reach"),
    )
    marked = zones.days(marked, "start", "reach")
    return _alone(_merge(marked, pl.col("start_day") > pl.col("previous_day"))[1])


def _merge(marked: pl.DataFrame, starts_new: pl.Expr) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Encounters that belong together as one stay each.

    Args:
        marked: Encounters with `status`, `reach`, `start_day` and `reach_day`.
        starts_new: Whether an encounter begins a stay of its own, told from `start`, `start_day` and the
            `previous_reach` and `previous_day` of all before it.

    Returns:
        The encounters, sorted, with the number of their `admission`, and one row each: subject_id, admission, start,
        start_day, reach, status, end.
    """
    numbered = (
        marked.sort("subject_id", "start", "reach")
        .with_columns(
            pl.col(reach).cum_max().over("subject_id").shift(1).over("subject_id").alias(f"previous_{name}")
            for reach, name in (("reach", "reach"), ("reach_day", "day"))
        )
        .with_columns((pl.col("previous_reach").is_null() | starts_new).alias("new"))
        .with_columns(pl.col("new").cum_sum().cast(pl.Int64).alias("admission"))
        .drop("previous_reach", "previous_day")
    )
    # An encounter whose end is unknown leaves the end known only inside one that goes on beyond it.
    last_closed = pl.col("end").max()
    last_unknown = pl.col("start").filter(pl.col("status") == END_UNKNOWN).max()
    table = (
        numbered.group_by("subject_id", "admission", maintain_order=True)
        .agg(
            pl.col("start").min(),
            pl.col("start_day").min(),
            pl.col("reach").max(),
            pl.when((pl.col("status") == IN_PROGRESS).any())
            .then(pl.lit(IN_PROGRESS))
            .when(last_unknown.is_null() | (last_closed > last_unknown).fill_null(False))
            .then(pl.lit(CLOSED))
            .otherwise(pl.lit(END_UNKNOWN))
            .alias("status"),
        )
        .with_columns(pl.when(pl.col("status") == CLOSED).then(pl.col("reach")).alias("end"))
    )
    return numbered, table


def _alone(table: pl.DataFrame) -> Admissions:
    """Stays that nothing else belongs to."""
    table = (
        table.with_columns(pl.col("start").alias("extent_start"), pl.col("reach").alias("extent_end"))
        .select(_COLUMNS)
        .sort("subject_id", "start")
    )
    nobody = pl.DataFrame(schema={"subject_id": pl.Int64, "visit_id": pl.String, "admission": pl.Int64})
    return Admissions(table, nobody, nobody.select("subject_id", "visit_id"))


def _with_status(inpatient: pl.DataFrame, follow_up: FollowUp) -> pl.DataFrame:
    """Adds `status`, and `reach`: the end, the far future while in progress, the start where the end is unknown; and
    the days of start and reach at the hospital.
    """
    # Latest start of the patient's *other* visits: that of all, or the second where the latest is this visit's.
    visit = pl.coalesce("visit_id", pl.lit("row ") + pl.int_range(pl.len()).cast(pl.String))
    inpatient = inpatient.with_columns(visit.alias("visit"))
    latest = (
        inpatient.group_by("subject_id", "visit")
        .agg(pl.col("start").max().alias("latest"))
        .sort("latest", descending=True)
        .group_by("subject_id", maintain_order=True)
        .agg(
            pl.col("visit").first().alias("latest_visit"),
            pl.col("latest").first(),
            pl.col("latest").slice(1, 1).first().alias("second"),
        )
    )
    other = pl.when(pl.col("visit") == pl.col("latest_visit")).then(pl.col("second")).otherwise(pl.col("latest"))
    superseded = (other > pl.col("start")).fill_null(False)
    last = pl.min_horizontal("death", pl.lit(follow_up.end_of_data, pl.Datetime("us")))
    young = pl.col("start") >= last - pl.duration(days=IN_PROGRESS_DAYS)
    goes_on = (pl.col("open") == CONTINUES).fill_null(pl.lit(value=False)) | pl.col("open").is_null() & young
    marked = (
        inpatient.join(latest, on="subject_id", how="left")
        .join(follow_up.deaths.select("subject_id", "death"), on="subject_id", how="left")
        .with_columns(
            pl.when(pl.col("end").is_not_null())
            .then(pl.lit(CLOSED))
            .when(superseded | ~goes_on)
            .then(pl.lit(END_UNKNOWN))
            .otherwise(pl.lit(IN_PROGRESS))
            .alias("status")
        )
        .with_columns(
            pl.when(pl.col("status") == IN_PROGRESS)
            .then(pl.lit(FAR_FUTURE, dtype=pl.Datetime("us")))
            .otherwise(pl.max_horizontal("start", pl.coalesce("end", "start")))
            .alias("reach")
        )
        .select("subject_id", "visit_id", "start", "end", "status", "reach")
    )
    return follow_up.zones.days(marked, "start", "reach")
