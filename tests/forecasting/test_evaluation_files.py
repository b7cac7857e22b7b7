"""`ehrseq evaluate-forecast`: one model and its records, end to end, and what is refused."""

import json
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch

from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.forecasting.evaluation import evaluate_forecast
from ehrseq.forecasting.evaluation_files import (
    ForecastQuestions,
    evaluate_forecast_files,
    evaluate_forecaster,
    read_records,
)
from ehrseq.forecasting.evaluation_page import forecast_evaluation_page
from ehrseq.forecasting.prediction_points import visit_ends
from ehrseq.forecasting.prompts import load_forecaster
from ehrseq.modeling.ehr_time_head import DEFAULT_TIME_EDGES
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.training.trainer import model_config
from tests.in_process import run_ehrseq

QUICK = ForecastQuestions(horizon_days=3, num=2, num_resamples=20, max_predictions=30, max_patients=40)


@pytest.fixture(scope="module")
def cohort():
    return simulate(70, seed=5, progress=False)


@pytest.fixture(scope="module")
def folders(cohort, tmp_path_factory):
    """A dataset with splits, and an untrained checkpoint with a time head."""
    folder = tmp_path_factory.mktemp("forecasts")
    write_dataset(cohort.events(), folder / "dataset", dataset_name="x")
    tokenizer = EhrTokenizer.train(cohort.events(), tasks=[])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 64}
    config = model_config(tokenizer, tasks=[], time_edges=list(DEFAULT_TIME_EDGES), **sizes)
    EhrMambaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def reported(folders):
    out = folders / "out"
    arguments = ("--horizon", "60d", "--n", 2, "--resamples", 20, "--outcome", "labs=LAB//*", "--outcome", "died=death")
    finished = run_ehrseq(
        "evaluate-forecast", "--model", folders / "model", "--data", folders / "dataset", "--out", out, *arguments
    )
    assert finished.returncode == 0, finished.stderr
    return out, finished


def test_the_command_writes_a_report_its_page_and_its_numbers(reported):
    out, finished = reported
    report = (out / "report.md").read_text()
    assert report in finished.stdout
    heads = [line for line in report.splitlines() if line.startswith("#")]
    assert heads[:4] == ["# Forecasts", "## Next events", "### First occurrences", "### Repeats"]
    for title in ("## Times", "### Days until the next visit", "### Hours between events of a visit", "## Incidence",
                  "## Trajectories", "### Marginals", "### Rates by age"):  # fmt: skip
        assert title in heads
    told = json.loads((out / "results.json").read_text())
    assert [each["outcome"] for each in told["incidence"] if each["part"] == "all"] == ["labs", "died"]
    assert told["incidence"][0]["grid_days"] == [1.0, 7.0, 14.0, 30.0, 60.0]
    assert told["plausibility"]["trajectories"] == 2 * told["plausibility"]["predictions"]
    assert "train" in report.split("Frequencies from")[1][:60]  # counting forecasts learn from training patients
    table = pl.read_csv(out / "results.csv")
    assert set(table["section"]) == {"next events", "times", "incidence", "trajectories"}
    row = table.filter(name="all", part="first occurrences", measure="NLL")
    assert row["value"][0] == pytest.approx(told["next_events"]["first"]["all"]["nll"])
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page


def test_the_same_again_is_the_same(folders, cohort):
    """Batches of the next events, and a second run, change nothing."""
    forecaster = load_forecaster(folders / "model")
    records = read_records(cohort.events(), None, cohort.end_of_data)
    pages = []
    for batch_size in (3, 16):
        asked = ForecastQuestions(**{**vars(QUICK), "batch_size": batch_size, "max_patients": 12, "max_predictions": 8})
        found = evaluate_forecaster(forecaster, records, asked, name="m", progress=False)
        pages.append(forecast_evaluation_page(found))
    assert pages[0] == pages[1]


def test_a_table_of_events_has_no_training_patients(folders, cohort, tmp_path):
    asked = ForecastQuestions(num=0, max_patients=20, num_resamples=0)
    report = evaluate_forecast_files(
        folders / "model",
        cohort.events(),
        out=tmp_path,
        questions=asked,
        progress=False,
        end_of_data=cohort.end_of_data,
    )
    assert "the evaluated records themselves, which favours" in report
    assert "20 of 70 were drawn by chance" in report
    assert "## Trajectories" not in report
    assert json.loads((tmp_path / "results.json").read_text())["plausibility"] is None


def test_times_and_labels_are_asked_where_they_are_given(folders, cohort, tmp_path):
    events = cohort.events()
    dead = events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", prediction_time="time")
    alive = (
        visit_ends(load_forecaster(folders / "model").tokenizer.encode_histories(events))
        .unique("subject_id", keep="first", maintain_order=True)
        .head(5)
    )
    early = alive.head(1).with_columns(prediction_time=pl.lit(datetime(1900, 1, 1)).cast(pl.Datetime("us")))
    other = alive.head(1).with_columns(subject_id=pl.lit(10**6, pl.Int64))
    late = alive.head(2).with_columns(
        prediction_time=pl.lit(cohort.end_of_data + timedelta(days=1)).cast(pl.Datetime("us"))
    )
    times = pl.concat([alive, dead.with_columns(pl.col("prediction_time").cast(pl.Datetime("us"))), early, other, late])
    here = events.filter(pl.col("subject_id").is_in([*alive["subject_id"], *dead["subject_id"]]))
    for given in ({"prediction_times": times}, {"labels": {"task": times}}):
        asked = ForecastQuestions(horizon_days=1, num=1, num_resamples=0, **given)
        report = evaluate_forecast_files(
            folders / "model", here, out=tmp_path, questions=asked, progress=False, end_of_data=cohort.end_of_data
        )
        left_out = report.split("### Left out")[1]
        assert "| prediction times of other patients | 1 |" in left_out
        assert "| prediction times behind the end of the data | 2 |" in left_out
        assert f"| prediction times: the patient died at or before the prediction time | {dead.height} |" in left_out
        assert "no timed event that the model reads is known at the prediction time | 1 |" in left_out


def test_the_ends_of_visits(folders, cohort):
    tokenizer = load_forecaster(folders / "model").tokenizer
    times = visit_ends(tokenizer.encode_histories(cohort.events()))
    ends = cohort.events().filter(pl.col("code").str.starts_with("VISIT_END//")).select("subject_id", "time").unique()
    keys = {"left_on": ["subject_id", "time"], "right_on": ["subject_id", "prediction_time"]}
    assert ends.join(times, **keys, how="semi").height > 0.8 * ends.height  # the others lie within a longer visit
    assert times.height == times.unique().height
    alone = tokenizer.encode_histories(cohort.events().filter(pl.col("subject_id") == 7))
    assert visit_ends(alone).rows() == times.filter(subject_id=7).rows()


class Clock(torch.nn.Module):
    """A time head that says one hour, whatever comes: bin 2 of the edges 0, 1/48, 1/16."""

    def log_probabilities(self, hidden, following):
        return torch.log_softmax(torch.tensor([-30.0, -30.0, 0.0, -30.0]).expand(len(following), 4), -1)


def test_gaps_inside_visits_by_hand(folders):
    """Events at 0, 0, 1 hour | 2 hours: the head says half an hour to an hour and a half, uniformly."""
    forecaster = load_forecaster(folders / "model")
    model, tokenizer = forecaster.model, forecaster.tokenizer
    model.time_head, model.config.time_edges = Clock(), [0.0, 1 / 48, 1 / 16]
    ids = tokenizer.vocabulary.token_ids
    labs = [token for name, token in ids.items() if name.startswith("LAB//")][:4]
    hours = np.array([0, 0, 0, 0, 1, 2, 2, 2])
    row = {
        "input_ids": np.array([ids["[CLS]"], ids["[VS]"], *labs, ids["[VE]"], ids["[REG]"]]),
        "attention_mask": np.ones(8, np.int64),
        "token_type_ids": np.array([1, 2, 5, 5, 5, 5, 3, 8]),
        "times": (hours / 24 / 7).astype(np.float32),
        "ages": np.full(8, 50, np.float32),
        "visit_orders": np.array([0, 1, 1, 1, 1, 1, 1, 1]),
        "visit_segments": np.array([0, 1, 1, 1, 1, 1, 1, 1]),
    }

    def pad(rows):
        return {name: torch.as_tensor(np.stack([each[name] for each in rows])) for name in row}

    report = evaluate_forecast(model, [row], pad, np.ones(len(tokenizer)), progress=False)
    gaps = report.event_gaps
    # From [VS] on the gaps are 0, 0, 1, 1 hours; the first one has no past to compare with.
    assert gaps.gaps == 3
    assert gaps.off == pytest.approx(
        {"model": 1 / 3, "model, median": 1 / 3, "mean so far": (0 + 1 + 2 / 3) / 3, "last": 1 / 3, "at once": 2 / 3},
        abs=1e-4,
    )
    assert gaps.at_once == pytest.approx((0, 1 / 3), abs=1e-6)
    # PITs: 0 of the gap of 0, and 1/2 twice, which is an edge of two bins.
    assert np.delete(np.cumsum(gaps.pit), 9) == pytest.approx([1 / 3] * 9 + [1.0] * 10, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": -1}, "num got -1"),
        ({"num": 1.5}, "num got 1.5"),
        ({"max_predictions": 0}, "max_predictions got 0"),
        ({"horizon_days": 0}, "horizon_days got 0"),
        ({"horizon_days": float("inf")}, "horizon_days got inf"),
        ({"prediction_times": "a", "labels": "b"}, "give one of them"),
    ],
)
def test_bad_questions_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        ForecastQuestions(**change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--horizon", "30"), "--horizon got '30'"),
        (("--horizon", "0d"), "--horizon got '0d'"),
        (("--outcome", "icu"), "--outcome got 'icu'; expected name=code"),
        (("--outcome", "x=LAB//LOINC//2823-9"), "the model has no token for 'LAB//LOINC//2823-9'"),
        (("--estimator", "guess"), "estimator got 'guess'"),
        (("--split", "nobody"), "no split"),
        (("--times", "nowhere.csv"), "no file nowhere.csv"),
        (("--model", "nowhere"), "no checkpoint folder nowhere"),
        (("--data", "nowhere"), "nowhere does not exist"),
    ],
)
def test_bad_arguments_are_told(folders, tmp_path, arguments, message):
    given = {"--model": folders / "model", "--data": folders / "dataset", "--out": tmp_path / "out"}
    rest = [each for pair in given.items() if pair[0] not in arguments for each in pair]
    finished = run_ehrseq("evaluate-forecast", *rest, *arguments, "--n", 1, "--resamples", 0)
    assert finished.returncode == 1
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_models_without_a_forecasting_head_are_told(cohort, tmp_path):
    from ehrseq.hub.families import STARTER

    with pytest.raises(ValueError, match="head"):
        evaluate_forecast_files(STARTER, cohort.events(), out=tmp_path, progress=False)
