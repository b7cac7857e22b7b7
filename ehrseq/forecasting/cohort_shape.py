"""What a synthetic cohort takes from a real one: who its patients are, when their records begin, how long they are
observed, and between which values its laboratory results lie.

All of it is counts and quantiles behind which several patients stand each (`LEAST_PATIENTS`): a combination of static
facts, or an age of those who have them, that fewer share is never drawn; of what is drawn, birth, start and length are
drawn apart from each other. So no patient's combination is copied.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ehrseq.tokenization.ehr_codes import DAY_US, HOUR_US, YEAR_US, kind_reader

LEAST_PATIENTS = 10
"""Patients (or values) that stand behind everything that is drawn from."""
AGE_BAND = 5
"""Years of a band, within which an age is drawn evenly."""
_MOST_STEPS = 100
_TAIL = 0.01
_MOST_DECIMALS = 4


@dataclass(frozen=True)
class StaticProfile:
    """A combination of static facts.

    Attributes:
        codes: Static codes, sorted.
        patients: How many have it.
        ages: (lowest age of a band in years, patients) at the start of the record; empty where nobody's birth is known.
    """

    codes: tuple[str, ...]
    patients: int
    ages: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ValueLaw:
    """Values of one (code, unit).

    Attributes:
        knots: Ascending; as many values lie between any two neighbours. The first and the last bound what is drawn.
        decimals: With how many the values are written.
    """

    knots: tuple[float, ...]
    decimals: int


@dataclass(frozen=True)
class CohortShape:
    """See the module's text.

    Attributes:
        profiles: What patients are.
        starts: Quantiles of the first instant of a record (microseconds), evenly spaced.
        hours: Records that begin in each hour of the day, 24 numbers.
        observed: Quantiles of the days that patients are observed, evenly spaced.
        end_of_data: Last instant of the dataset (microseconds).
        values: (code, unit or "") -> law of its values.
        texts: (code, text) of text results.
        codes: Every code.
        notes: What was counted while this was taken.
    """

    profiles: tuple[StaticProfile, ...]
    starts: tuple[float, ...]
    hours: tuple[int, ...]
    observed: tuple[float, ...]
    end_of_data: int
    values: Mapping[tuple[str, str], ValueLaw]
    texts: tuple[tuple[str, str], ...]
    codes: tuple[str, ...]
    notes: Mapping[str, int]

    def to_json(self) -> str:
        """As `from_json` reads it."""
        content = {name: value for name, value in vars(self).items() if name not in ("profiles", "values")}
        content["profiles"] = [vars(profile) for profile in self.profiles]
        content["values"] = [[code, unit, vars(law)] for (code, unit), law in self.values.items()]
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CohortShape:
        """What `to_json` wrote."""
        content: dict[str, Any] = json.loads(text)
        profiles = tuple(
            StaticProfile(tuple(p["codes"]), p["patients"], tuple((band, count) for band, count in p["ages"]))
            for p in content.pop("profiles")
        )
        values = {
            (code, unit): ValueLaw(tuple(law["knots"]), law["decimals"]) for code, unit, law in content.pop("values")
        }
        content["texts"] = tuple((code, value) for code, value in content["texts"])
        content |= {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        return cls(profiles=profiles, values=values, **content)


def shape_of(
    events: pl.DataFrame,
    *,
    code_map: Sequence[Sequence[str]] | None = None,
    least_patients: int = LEAST_PATIENTS,
    until_end: bool = False,
) -> CohortShape:
    """Take a cohort's shape.

    Args:
        events: Event table of the patients.
        code_map: What codes mean, as of `code_kinds`.
        least_patients: Patients that stand behind everything.
        until_end: Everybody is observed from the start of the record to the dataset's last event. Else (where each
            patient's dates were shifted, that means nothing) from the first to the last event: a death ends what could
            have been a longer observation, so the lengths are those of the reverse Kaplan-Meier estimate (Schemper and
            Smith 1996).

    Raises:
        ValueError: Fewer patients than `least_patients`, or no combination of static facts that so many share.
    """
    kind_of = kind_reader(code_map)
    kinds = pl.DataFrame({"code": events["code"].unique().sort()})
    kinds = kinds.with_columns(pl.Series("kind", [kind_of(code)[0] for code in kinds["code"].to_list()], pl.String))
    rows = events.join(kinds, on="code", how="left", maintain_order="left")
    timed = rows.filter(pl.col("time").is_not_null(), pl.col("kind") != "birth")
    micros = pl.col("time").cast(pl.Int64)
    spans = (
        timed.group_by("subject_id")
        .agg(
            micros.min().alias("first"),
            micros.max().alias("last"),
            (pl.col("kind") == "death").any().alias("dead"),
        )
        .sort("subject_id")
    )
    if spans.height < least_patients:
        raise ValueError(
            f"the dataset has {spans.height} patients with timed events to draw from; at least {least_patients} are "
            "needed, so that nobody's own record is copied. Give a larger dataset."
        )
    births = rows.filter(pl.col("kind") == "birth").group_by("subject_id").agg(micros.min().alias("birth"))
    zone = pl.col("code").str.starts_with("TIMEZONE//")
    statics = (
        rows.filter(pl.col("time").is_null(), (pl.col("kind") == "static") | zone)
        .group_by("subject_id")
        .agg(pl.col("code").unique().sort().alias("statics"))
    )
    patients = spans.join(births, on="subject_id", how="left").join(statics, on="subject_id", how="left")
    notes: Counter[str] = Counter()
    profiles = _profiles(patients.sort("subject_id"), least_patients, notes)
    first, last = spans["first"].to_numpy(), spans["last"].to_numpy()
    end_of_data = int(last.max())
    if until_end:
        observed = _even_quantiles((end_of_data - first) / DAY_US, least_patients)
    else:
        observed = _observation((last - first) / DAY_US, spans["dead"].to_numpy(), least_patients)
    hours = np.bincount((first // HOUR_US) % 24, minlength=24)
    texts = events.filter(pl.col("numeric_value").is_null(), pl.col("text_value").is_not_null())
    pairs = texts.group_by("code", "text_value").agg(pl.col("subject_id").n_unique().alias("patients"))
    pairs = pairs.filter(pl.col("patients") >= min(5, least_patients)).sort("code", "text_value")
    return CohortShape(
        profiles=profiles,
        starts=_even_quantiles(first.astype(np.float64), least_patients),
        hours=tuple(hours.tolist()),
        observed=observed,
        end_of_data=end_of_data,
        values=_value_laws(events, least_patients),
        texts=tuple(zip(pairs["code"].to_list(), pairs["text_value"].to_list(), strict=True)),
        codes=tuple(kinds["code"].to_list()),
        notes=dict(sorted(notes.items())),
    )


def _profiles(patients: pl.DataFrame, least: int, notes: Counter[str]) -> tuple[StaticProfile, ...]:
    """Combinations that enough patients share, each with the ages of those who have it."""
    ages: dict[tuple[str, ...], Counter[int]] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    known: Counter[tuple[str, ...]] = Counter()
    for first, birth, statics in patients.select("first", "birth", "statics").iter_rows():
        profile = tuple(statics or ())
        counts[profile] += 1
        bands = ages.setdefault(profile, Counter())
        if birth is not None and birth <= first:
            known[profile] += 1
            bands[int((first - birth) / YEAR_US) // AGE_BAND * AGE_BAND] += 1
    everyone: Counter[int] = sum(ages.values(), Counter())
    usual = tuple(sorted((band, count) for band, count in everyone.items() if count >= least))
    kept = []
    for profile, count in sorted(counts.items()):
        if count < least:
            notes["patients whose combination of static facts too few share: not drawn"] += count
            continue
        own = tuple(sorted((band, number) for band, number in ages[profile].items() if number >= least))
        hidden = known[profile] - sum(number for _, number in own)
        if hidden:
            notes["patients whose age too few of their combination share: ages of the others are drawn"] += hidden
        kept.append(StaticProfile(profile, count, own or (usual if known[profile] else ())))
    if not kept:
        raise ValueError(
            f"no combination of static facts is shared by {least} patients; give a larger dataset, or one with fewer "
            "static codes."
        )
    return tuple(kept)


def _even_quantiles(values: np.ndarray, least: int) -> tuple[float, ...]:
    """Quantiles at evenly spaced shares, `least` values or more between two of them, none of them a single extreme."""
    steps = max(1, min(_MOST_STEPS, len(values) // least))
    edge = min(0.25, least / (2 * len(values)))
    return tuple(float(value) for value in np.quantile(values, np.linspace(edge, 1 - edge, steps + 1)))


def _observation(days: np.ndarray, dead: np.ndarray, least: int) -> tuple[float, ...]:
    """Quantiles of how long patients are observed, by the reverse Kaplan-Meier estimate."""
    order = np.lexsort((dead, days))  # who is observed up to a day is at risk when somebody dies on it
    days, ended = days[order], ~dead[order]
    at_risk = len(days) - np.arange(len(days))
    survival = np.cumprod(1.0 - ended / at_risk)
    share = 1.0 - survival
    steps = max(1, min(_MOST_STEPS, int(ended.sum()) // least))
    edge = min(0.25, least / (2 * max(1, int(ended.sum()))))
    at = np.searchsorted(share, np.linspace(edge, 1 - edge, steps + 1) * max(share[-1], 1e-9))
    return tuple(days[np.minimum(at, len(days) - 1)].tolist())


def _value_laws(events: pl.DataFrame, least: int) -> dict[tuple[str, str], ValueLaw]:
    laws = {}
    groups = (
        events.filter(pl.col("numeric_value").is_not_null())
        .select("code", pl.col("unit").fill_null("").alias("unit"), pl.col("numeric_value").cast(pl.Float64))
        .partition_by("code", "unit", as_dict=True)
    )
    for (code, unit), group in sorted(groups.items(), key=lambda item: [str(part) for part in item[0]]):
        values = group["numeric_value"].to_numpy()
        if len(values) < least:
            continue
        steps = max(1, min(_MOST_STEPS, len(values) // least))
        tail = max(_TAIL, min(0.25, least / (2 * len(values))))
        knots = np.unique(np.quantile(values, np.linspace(tail, 1 - tail, steps + 1)))
        laws[str(code), str(unit)] = ValueLaw(tuple(knots.tolist()), _decimals(values))
    return laws


def _decimals(values: np.ndarray) -> int:
    """The least number of decimals that 99 of 100 values have."""
    single = values.astype(np.float32)
    for decimals in range(_MOST_DECIMALS):
        if (np.round(values, decimals).astype(np.float32) == single).mean() >= 0.99:
            return decimals
    return _MOST_DECIMALS


__all__ = ["AGE_BAND", "LEAST_PATIENTS", "CohortShape", "StaticProfile", "ValueLaw", "shape_of"]
