"""Independent reading of simulated rows, for the simulator's tests: labels, features and risks from the events alone,
one patient at a time.

Nothing here runs the process: it reads MEDS rows and the published constants (channels, weights), in plain Python.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

import polars as pl

from ehrseq.data.simulate_codes import CHANNELS, CHRONIC
from ehrseq.data.simulate_risk import INTERCEPTS, WEIGHTS

PREFIXES = {"hypertension": "I10", "fluid_disorder": "E87", "lipid_disorder": "E78"}
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
    """Features of the scores from one patient's rows up to `now`, as `simulate_risk` defines them in words."""
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
    for channel in CHANNELS:
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
    """P(positive label) of one patient from the rows up to `now`."""
    seen = [row for row in rows if row["time"] is None or row["time"] <= now]
    known = features(rows, now)

    def draw(name: str) -> float:
        score = INTERCEPTS[name] + sum(weight * known[feature] for feature, weight in WEIGHTS[name].items())
        return 1 / (1 + math.exp(-score))

    if task == "long_stay_7d":
        return draw(task)
    death = draw("mortality_30d")
    if task == "mortality_30d":
        return death
    if task in PREFIXES:
        return (1 - death) * draw(task)
    none = 1.0
    discharges = sorted(row["time"] for row in seen if row["code"] in DISCHARGE_CODES)
    if len(discharges) > 1 and now - discharges[-2] < timedelta(days=365):
        for name, prefix in PREFIXES.items():
            if not any(row["code"].startswith("DIAGNOSIS//ICD10CM//" + prefix) for row in seen):
                none *= 1 - draw(name)
    return death * 0.3 + (1 - death) * draw("readmission_30d") * none
