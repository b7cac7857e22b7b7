"""Independent reading of simulated rows, for the simulator's tests: labels, features and risks from the events alone,
one patient at a time.

Nothing here runs the process: it reads MEDS rows and the published constants (channels, weights), in plain Python.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

import polars as pl

from ehrseq.data.simulate.codes import CHRONIC, MEASUREMENTS
from ehrseq.data.simulate.risk import INTERCEPTS, RISK_WEIGHTS

PREFIXES = {"hypertension": "I10", "fluid_disorder": "E87", "lipid_disorder": "E78"}
END_OF_DATA = datetime(2022, 1, 1)
DISCHARGE_CODES = ("VISIT_END//home", "VISIT_END//snf", "VISIT_END//hosp", "VISIT_END//exp")


def labels(events: pl.DataFrame, end_of_data: datetime) -> dict[str, pl.DataFrame]:
    """task -> table of subject_id, time, positive; only where the whole horizon was observed: no selection."""
    starts = events.filter(pl.col("code") == "VISIT_START//IMP").select("subject_id", "visit_id", start="time")
    ends = events.filter(pl.col("code").is_in(DISCHARGE_CODES)).select("subject_id", "visit_id", end="time")
    deaths = events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", death="time")
    stays = starts.join(ends, on=["subject_id", "visit_id"], how="left").join(deaths, on="subject_id", how="left")
    stays = stays.sort("subject_id", "start").with_columns(following=pl.col("start").shift(-1).over("subject_id"))
    alive = stays.filter(pl.col("end").is_not_null() & (pl.col("death").is_null() | (pl.col("death") > pl.col("end"))))

    def within(column: str, days: int) -> pl.Expr:
        return (pl.col(column) <= pl.col("end") + pl.duration(days=days)).fill_null(False)

    def observed(frame: pl.DataFrame, days: int) -> pl.DataFrame:
        return frame.filter(pl.col("end") + pl.duration(days=days) <= end_of_data).select(
            "subject_id", "positive", time="end"
        )

    found = {
        "mortality_30d": observed(alive.with_columns(positive=within("death", 30)), 30),
        "readmission_30d": observed(alive.with_columns(positive=within("following", 30)), 30),
    }
    day, week = pl.duration(days=1), pl.duration(days=7)
    long = stays.filter(
        (pl.col("end").is_null() | (pl.col("end") > pl.col("start") + day)) & (pl.col("start") + week <= end_of_data)
    )
    found["long_stay_7d"] = long.select(
        "subject_id", positive=(pl.col("end") > pl.col("start") + week).fill_null(True), time=pl.col("start") + day
    )
    for task, prefix in PREFIXES.items():
        coded = events.filter(pl.col("code").str.starts_with("DIAGNOSIS//ICD10CM//" + prefix)).sort(
            "subject_id", "time"
        )
        first = coded.group_by("subject_id").agg(coded=pl.col("time").first(), visit_id=pl.col("visit_id").first())
        first = first.join(starts, on=["subject_id", "visit_id"], how="left").select(
            "subject_id", "coded", admitted="start"
        )
        at_risk = alive.join(first, on="subject_id", how="left").filter(
            pl.col("coded").is_null() | (pl.col("coded") > pl.col("end"))
        )
        found[task] = observed(at_risk.with_columns(positive=within("admitted", 365)), 365)
    return found


def features(rows: list[dict[str, Any]], now: datetime) -> dict[str, float]:
    """Features of the scores from one patient's rows up to `now`, as `ehrseq.data.simulate.risk` says in words."""
    rows = [row for row in rows if row["time"] is None or row["time"] <= now]
    day = timedelta(days=1)
    by_code: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_code.setdefault(row["code"], []).append(row)

    admission = by_code["VISIT_START//IMP"][-1]["time"]
    began = admission
    for start in by_code.get("VISIT_START//EMER", []):
        stop = next((r["time"] for r in by_code.get("VISIT_END//EMER", []) if r["visit_id"] == start["visit_id"]), now)
        if start["time"] <= admission <= stop:
            began = start["time"]
    before = max(r["time"] for r in rows if r["code"].startswith("VISIT_END") and r["time"] < began)

    values: dict[str, float] = {}
    for channel in MEASUREMENTS:
        readings = []
        for sign, code in zip((-1.0, 1.0), channel.codes, strict=False):
            for row in by_code.get(code, []):
                z = sign
                if not channel.is_pair:
                    factor = next(factor for unit, factor, _ in channel.units if unit == row["unit"])
                    value = row["numeric_value"] / factor
                    value = math.log(value / channel.location) if channel.logarithmic else value - channel.location
                    z = value / channel.scale
                readings.append((row["time"], z))
        readings.sort(key=lambda reading: reading[0])
        values[channel.name] = 0.0
        if readings:
            time, z = readings[-1]
            values[channel.name] = math.tanh(1.5 * z) * 2 ** (-((now - time) / day) / 120)
        values[f"{channel.name}_mean"] = sum(z for _, z in readings) / (1 + len(readings))
        values[f"{channel.name}_measured"] = float(bool(readings) and readings[-1][0] >= began)
    for name, code, _ in CHRONIC:
        values[name] = float(f"DIAGNOSIS//ICD10CM//{code}" in by_code)
    values["gap"] = math.tanh(math.log(30 / ((began - before) / day)))
    values["utilisation"] = math.log2(
        1 + sum(2 ** (-((now - r["time"]) / day) / 120) for r in by_code["VISIT_START//IMP"])
    )
    values["age"] = ((now - by_code["MEDS_BIRTH"][0]["time"]) / day / 365.25 - 62) / 14
    values["male"] = float("GENDER//M" in by_code)
    return values


def risk(rows: list[dict[str, Any]], task: str, now: datetime) -> float:
    """P(positive label of the question asked at `now`) of one patient from the rows up to then; NaN for no answer."""
    seen = [row for row in rows if row["time"] is None or row["time"] <= now]
    admissions = sorted((row["time"], row["visit_id"]) for row in seen if row["code"] == "VISIT_START//IMP")
    if not admissions or any(row["code"] == "MEDS_DEATH" for row in seen) or now > END_OF_DATA:
        return math.nan
    admission, visit_id = admissions[-1]

    def draw(name: str, at: datetime) -> float:
        known = features(rows, at)
        score = INTERCEPTS[name] + sum(weight * known[feature] for feature, weight in RISK_WEIGHTS[name].items())
        return 1 / (1 + math.exp(-score))

    if task == "long_stay_7d":
        is_over = any(row["code"] in DISCHARGE_CODES and row["visit_id"] == visit_id for row in seen)
        lasted = now - admission
        if is_over or lasted >= timedelta(days=7):
            return math.nan
        long = draw(task, min(now, admission + timedelta(days=1)))
        # A short stay lasts 29 + 127 u^1.6 hours: the share of u that is left of those that go on for another minute.
        hours = lasted / timedelta(hours=1) + 1 / 60
        left = 1.0 if hours < 29 else 1 - min(1.0, (hours - 29) / 127) ** (1 / 1.6)
        return long / (long + (1 - long) * left)
    diagnosed = {
        name: any(row["code"].startswith("DIAGNOSIS//ICD10CM//" + prefix) for row in seen)
        for name, prefix in PREFIXES.items()
    }
    death = draw("mortality_30d", now)
    if task == "mortality_30d":
        return death
    if task in PREFIXES:
        return math.nan if diagnosed[task] else (1 - death) * draw(task, now)
    none = 1.0
    earlier = [row["time"] for row in seen if row["code"] in DISCHARGE_CODES and row["time"] < admission]
    if earlier and now - max(earlier) < timedelta(days=365):
        for name in PREFIXES:
            none *= 1.0 if diagnosed[name] else 1 - draw(name, now)
    return death * 0.3 + (1 - death) * draw("readmission_30d", now) * none
