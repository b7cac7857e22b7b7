"""The hospital's calendar: on which day an instant of a visit falls there.

Times are UTC, or the hospital's own clock where a source has no zone. A static row `TIMEZONE//<zone>` names the zone of
a patient's hospital, and with a visit_id that of one visit; the zone is an offset (`-07:00`) or an IANA name
(`America/Denver`). Without such a row the clock of the times is the hospital's.
"""

from __future__ import annotations

import polars as pl

from ehrseq.data.instants import check_zone, walls_to_utc, zone_of
from ehrseq.tokenization.ehr_codes import TIMEZONE


class Zones:
    """Zones of visits and patients.

    Args:
        rows: subject_id, code, visit_id of the rows that name a zone.
        given: Zone of the whole hospital, which wins over the rows; None: there is none.
        default: Zone of patients without a row; None: their times are the hospital's clock.

    Raises:
        ValueError: A zone that is neither an offset nor a name of the IANA database.
    """

    def __init__(self, rows: pl.DataFrame, given: str | None = None, default: str | None = None) -> None:
        self._given, self._default = given, default
        named = rows.select("subject_id", "visit_id", pl.col("code").str.strip_prefix(TIMEZONE).alias("zone")).sort(
            "subject_id", "visit_id", "zone", nulls_last=False
        )
        of_visit = pl.col("visit_id").is_not_null()
        self._of_visit = named.filter(of_visit).unique(["subject_id", "visit_id"], keep="first", maintain_order=True)
        self._of_patient = (
            named.filter(~of_visit).unique("subject_id", keep="first", maintain_order=True).drop("visit_id")
        )
        names = [given] if given is not None else [*named["zone"].to_list(), default]
        self._names = sorted({name for name in names if name is not None})
        for name in self._names:
            check_zone(name)

    def days(self, table: pl.DataFrame, *columns: str) -> pl.DataFrame:
        """Adds `<column>_day` for each column of instants: its day at the hospital.

        Args:
            table: subject_id and, where rows of visits shall count, visit_id.
            columns: Columns of instants (Datetime("us")).
        """
        if not self._names:
            return table.with_columns(pl.col(name).dt.date().alias(f"{name}_day") for name in columns)
        zoned = self._with_zone(table)
        return zoned.with_columns(self._day(name).alias(f"{name}_day") for name in columns).drop("zone")

    def instants(self, table: pl.DataFrame, *columns: str) -> pl.DataFrame:
        """The columns, which hold wall-clock times of the patients' hospital, as UTC."""
        if not self._names:
            return table
        zoned = self._with_zone(table)
        return zoned.with_columns(self._utc(name).alias(name) for name in columns).drop("zone")

    def _with_zone(self, table: pl.DataFrame) -> pl.DataFrame:
        if self._given is not None:
            return table.with_columns(pl.lit(self._given).alias("zone"))
        of_patient = self._of_patient.rename({"zone": "of_patient"})
        table = table.join(of_patient, on="subject_id", how="left", maintain_order="left")
        if "visit_id" in table.columns:
            table = table.join(self._of_visit, on=["subject_id", "visit_id"], how="left", maintain_order="left")
        else:
            table = table.with_columns(pl.lit(None, pl.String).alias("zone"))
        zone = pl.coalesce("zone", "of_patient", pl.lit(self._default, pl.String))
        return table.with_columns(zone.alias("zone")).drop("of_patient")

    def _day(self, name: str) -> pl.Expr:
        instant = pl.col(name)
        local = instant.dt.date()
        for zone in self._names:
            offset = zone_of(zone).utcoffset(None)  # None of a name
            moved = (
                instant + offset
                if offset is not None
                else instant.dt.replace_time_zone("UTC").dt.convert_time_zone(zone).dt.replace_time_zone(None)
            )
            local = pl.when(pl.col("zone") == zone).then(moved.dt.date()).otherwise(local)
        return local

    def _utc(self, name: str) -> pl.Expr:
        utc = pl.col(name)
        for zone in self._names:
            utc = pl.when(pl.col("zone") == zone).then(walls_to_utc(pl.col(name), zone)).otherwise(utc)
        return utc
