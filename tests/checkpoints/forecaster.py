"""A small HyMaTE that forecasts: weights drawn at random, intervals fitted as after pretraining. Nothing is learnt."""

from dataclasses import dataclass
from typing import Any

import polars as pl
import torch

from ehrseq import HyMaTEConfig, HyMaTEFeatureExtractor, HyMaTEForPreTraining
from ehrseq.data.schema import EVENT_SCHEMA, validate_events
from ehrseq.encode.triplets import TripletTable, build_triplets
from ehrseq.tokenization.triplet_stays import StaticFeature, TripletSpec
from ehrseq.training import calibrate_stay_forecasts
from tests.checkpoints.stays import CODES, SEXES, make_stay

UNITS = {"lactate": "mmol/L", "heart rate": "bpm"}
NEVER = ("never", ("LAB//A//never",))
"""A variable that no stay measures."""

SPEC = TripletSpec(
    (*((code.split("//")[-1], (code,)) for code in CODES), NEVER),
    (StaticFeature("sex", "category", tuple(SEXES)),),
    window_start="first_event",
)


@dataclass(frozen=True)
class Forecaster:
    """A model, its extractor, and the stays that both were made with."""

    model: HyMaTEForPreTraining
    extractor: HyMaTEFeatureExtractor
    train: TripletTable
    tuning: TripletTable


def events_of(stays: list[dict[str, Any]]) -> pl.DataFrame:
    """The event table of some stays."""
    rows = [{"subject_id": stay["subject_id"], **event} for stay in stays for event in stay["events"]]
    return validate_events(pl.DataFrame(rows, schema_overrides=EVENT_SCHEMA))


def make_forecaster(horizons: tuple[float, ...] = (120.0,), stays: int = 300) -> Forecaster:
    """A forecaster of three variables, which knows of a fourth.

    Args:
        horizons: Ends of its windows, minutes.
        stays: Stays that it is fitted on; as many are tuning stays.
    """
    train, tuning = (
        build_triplets(events_of([make_stay(number) for number in numbers]), SPEC)
        for numbers in (range(stays), range(stays, 2 * stays))
    )
    extractor = HyMaTEFeatureExtractor.fit(train)
    torch.manual_seed(0)
    config = HyMaTEConfig(
        num_variables=extractor.num_variables,
        num_static=extractor.num_static,
        hidden_size=8,
        num_mamba_layers=1,
        num_attention_heads=2,
        num_horizons=len(horizons),
        forecast_from_last_value=True,
        max_position_embeddings=64,
    )
    model = HyMaTEForPreTraining(config).eval()
    calibrate_stay_forecasts(model, extractor, tuning, train, horizons=horizons, units=UNITS)
    return Forecaster(model, extractor, train, tuning)
