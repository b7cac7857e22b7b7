"""`ehrseq evaluate-forecast`: a model and records in; a report, its page and its numbers out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.batches.collation import DataCollatorForNextToken
from ehrseq.data.dataset import EventDataset
from ehrseq.data.metadata import written_by_us
from ehrseq.data.schema import validate_events
from ehrseq.data.shards import dataset_shards, latest_time, read_blocks
from ehrseq.data.sources import load_events
from ehrseq.data.splits import uniform_of
from ehrseq.forecasting.evaluation import code_groups, evaluate_forecast
from ehrseq.forecasting.evaluation_page import forecast_evaluation_page
from ehrseq.forecasting.forecast_evaluation import ForecastEvaluation
from ehrseq.forecasting.incidence_calibration import (
    IncidenceCalibration,
    calibrate_incidence,
    observed_causes,
)
from ehrseq.forecasting.plausibility import PlausibilityReport, compare_futures
from ehrseq.forecasting.prediction_points import visit_ends
from ehrseq.forecasting.prompts import has_time_head, load_forecaster, records_at
from ehrseq.forecasting.recorded_futures import RecordedFuture, recorded_futures
from ehrseq.forecasting.stay_values import foretells_values
from ehrseq.forecasting.value_evaluation import evaluate_stay_forecasts
from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS
from ehrseq.modeling.ehr_trajectories import OutcomeTokens, PatientTrajectories, TrajectoryRequest
from ehrseq.modeling.outcome_estimates import check_outcomes, estimate_outcomes
from ehrseq.modeling.record_forecasts import to_prompt
from ehrseq.tasks.moments import LabelSource, checked_times, read_labelled_times
from ehrseq.tokenization.ehr_forecast_prompts import REASONS_AGAINST_FORECAST
from ehrseq.tokenization.ehr_forecast_questions import DEFAULT_OUTCOMES
from ehrseq.tokenization.ehr_outcomes import death_ids, read_outcomes
from ehrseq.tokenization.ehr_vocabulary import REG
from ehrseq.version import __version__
from ehrseq.work.files import write_json, write_text, write_whole
from ehrseq.work.progress import progress_bar

if TYPE_CHECKING:
    from ehrseq.pipelines.ehr_forecast import EhrForecastPipeline
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

logger = logging.getLogger(__name__)

EVALUATED_SPLITS = ("held_out",)
TRAINING_SPLITS = ("pretrain", "train")
DAYS_TOLD = (1.0, 7.0, 14.0, 30.0, 60.0, 90.0, 180.0, 365.0)


@dataclass(frozen=True)
class ForecastQuestions:
    """What is asked of a model.

    Attributes:
        horizon_days: How far trajectories go.
        num: Trajectories of a prompt; 0 = next events and times alone.
        estimator: How incidences are estimated. "reach" draws no whole trajectories: their plausibility is then left
            out.
        outcomes: Name -> what stands for it, as `ehrseq forecast` takes it; None = death and any admission, where the
            vocabulary has them.
        prediction_times: Table or file of subject_id, prediction_time.
        labels: Labels whose times are the prediction times, all tasks together. None, as `prediction_times`: the ends
            of visits.
        max_predictions: Most prediction times, drawn by chance.
        max_patients: Most patients whose next events are asked, drawn by chance.
        context: Tokens of a row of the next events; None = what the model was trained with.
        batch_size: Rows in one forward pass of the next events.
        num_resamples: Resamples of patients.
        seed: Of all that is drawn.
    """

    horizon_days: float = 30.0
    num: int = 20
    estimator: str = "monte_carlo"
    outcomes: Mapping[str, Any] | None = None
    prediction_times: str | Path | pl.DataFrame | None = None
    labels: LabelSource | None = None
    max_predictions: int = 1000
    max_patients: int = 2000
    context: int | None = None
    batch_size: int = 16
    num_resamples: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num", 0), ("max_predictions", 1), ("max_patients", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} got {value!r}; expected a whole number of at least {least}.")
        if not 0 < self.horizon_days < float("inf"):
            raise ValueError(f"horizon_days got {self.horizon_days!r}; expected a number of days above 0.")
        if self.prediction_times is not None and self.labels is not None:
            raise ValueError("labels and prediction times both say when to ask; give one of them.")

    @property
    def grid_days(self) -> tuple[float, ...]:
        """Days by which the incidence is told."""
        return (*(day for day in DAYS_TOLD if day < self.horizon_days), float(self.horizon_days))


@dataclass
class EvaluatedRecords:
    """The records that a model is evaluated on.

    Attributes:
        events: Of the evaluated patients.
        end_of_data: Until when they were followed.
        training: Blocks of events that the counting forecasts learn from; None where there are no training patients.
        source: Where they come from, in words.
        skipped: What was left out -> why.
    """

    events: pl.DataFrame
    end_of_data: np.datetime64
    training: Sequence[Any] | None
    source: str
    skipped: dict[str, str] = field(default_factory=dict)


def evaluate_forecast_files(
    model: str | Path,
    data: str | Path | pl.DataFrame,
    *,
    out: str | Path,
    questions: ForecastQuestions | None = None,
    splits: Sequence[str] | None = None,
    end_of_data: Any = None,
    progress: bool = True,
) -> str:
    """Evaluate the forecasts of a checkpoint on records.

    A checkpoint of HyMaTE forecasts the values of stays: of it there are report.md and results.json, with the errors of
    each variable beside the last value and the coverage of its intervals, and the questions do not matter.

    Args:
        model: Folder of a checkpoint with a forecasting head, or `owner/name` on the Hub.
        data: Prepared dataset in files, or any source that `ehrseq predict` reads, or an event table.
        out: Folder that gets report.html, report.md, results.json and results.csv.
        questions: What is asked.
        splits: Of a dataset in files: patients of these splits; None = held out.
        end_of_data: Until when records were kept (UTC); None: the last event of the data.
        progress: Show progress bars.

    Returns:
        The report as Markdown.

    Raises:
        ValueError: A model without a forecasting head, records that cannot be read, an outcome that no token stands
            for, no prediction time.
    """
    asked = questions or ForecastQuestions()
    if foretells_values(model):
        return _evaluate_stays(model, data, Path(out), splits, asked.seed)
    forecaster = load_forecaster(model)
    records = read_records(data, splits, end_of_data)
    found = evaluate_forecaster(forecaster, records, asked, name=str(model), progress=progress)
    folder = Path(out)
    write_json(folder / "results.json", found.to_dict(), indent=1)
    write_whole(folder / "results.csv", found.to_table().write_csv)
    report = found.to_markdown()
    write_text(folder / "report.md", report)
    write_text(folder / "report.html", forecast_evaluation_page(found))
    return report


def evaluate_forecaster(
    forecaster: EhrForecastPipeline,
    records: EvaluatedRecords,
    asked: ForecastQuestions,
    *,
    name: str,
    progress: bool = True,
) -> ForecastEvaluation:
    """All measures of one model; see `evaluate_forecast_files`.

    Args:
        forecaster: The model with its tokenizer, from `load_forecaster`.
        records: What it is evaluated on.
        asked: What is asked.
        name: Of the model, in words.
        progress: Show progress bars.
    """
    # 1. Next events and times.
    model, tokenizer = cast("Any", forecaster.model), cast("EhrTokenizer", forecaster.tokenizer)
    skipped = dict(records.skipped)
    context = asked.context or int(model.config.max_position_embeddings)
    histories = tokenizer.encode_histories(_some(records.events, asked.max_patients, asked.seed, skipped))
    windows: Any = histories.windows(context)
    frequencies, interval, learnt = _training_counts(tokenizer, records, windows, progress)
    events = evaluate_forecast(
        model,
        windows,
        DataCollatorForNextToken(tokenizer),
        frequencies,
        training_interval=interval,
        batch_size=asked.batch_size,
        subjects=windows.subject_ids,
        groups=code_groups(tokenizer.vocabulary, len(tokenizer)),
        num_resamples=asked.num_resamples,
        seed=asked.seed,
        progress=progress,
    )
    words = [
        f"Model: {name}. Records: {records.source}, {records.events['subject_id'].n_unique():,} patients. Frequencies "
        f"from {learnt}. Rows of {context:,} tokens.",
        f"95 % intervals by {asked.num_resamples:,} bootstrap resamples of patients (seed {asked.seed}). ehrseq "
        f"{__version__}.",
    ]
    # 2. Trajectories.
    incidence: list[IncidenceCalibration] = []
    plausibility = None
    if asked.num:
        outcomes = _outcomes(forecaster, asked, skipped)
        drawn, futures, request = _draw(forecaster, histories, records, outcomes, asked, skipped, progress)
        incidence = list(calibrations(drawn, futures, request, asked))
        if request.keep_tokens:
            plausibility = _plausibility(drawn, futures, request, tokenizer, asked, skipped)
        until = np.datetime_as_string(records.end_of_data, "m")
        words.append(
            f"{asked.num:,} trajectories of {asked.horizon_days:g} days from each of {len(futures):,} prediction times "
            f"({_times_in_words(asked)}), estimator {asked.estimator}; followed until {until}."
        )
    settings = {"model": name, "data": records.source, "horizon_days": asked.horizon_days, "num": asked.num}
    settings |= {"estimator": asked.estimator, "seed": asked.seed, "ehrseq": __version__}
    return ForecastEvaluation(events, incidence, plausibility, skipped, settings, words)


def _evaluate_stays(
    model: str | Path, data: str | Path | pl.DataFrame, out: Path, splits: Sequence[str] | None, seed: int
) -> str:
    """The report of a model of stays."""
    if isinstance(data, pl.DataFrame) or not written_by_us(Path(data)):
        raise ValueError("the forecasts of HyMaTE are evaluated on a dataset in files; run `ehrseq prepare` first.")
    if len(splits or EVALUATED_SPLITS) != 1:
        raise ValueError(f"splits got {splits}; the forecasts of HyMaTE are evaluated on the stays of one split.")
    found = evaluate_stay_forecasts(model, data, (splits or EVALUATED_SPLITS)[0], seed=seed)
    write_json(out / "results.json", found.to_dict(), indent=1)
    report = f"# Forecasts\n\n{found.to_markdown()}"
    write_text(out / "report.md", report)
    return report


# -- records -----------------------------------------------------------------------------------------------------------


def read_records(
    data: str | Path | pl.DataFrame, splits: Sequence[str] | None = None, end_of_data: Any = None
) -> EvaluatedRecords:
    """The records of a source.

    Raises:
        ValueError: No such split, splits of a source that has none, or no event.
    """
    skipped: dict[str, str] = {}
    training = None
    if isinstance(data, pl.DataFrame):
        events, source = validate_events(data), "an event table"
        last: Any = events["time"].max()
    elif written_by_us(Path(data)):
        wanted = list(splits or EVALUATED_SPLITS)
        shards = dataset_shards(data)
        evaluated = dataset_shards(data, wanted)
        events = EventDataset(data).events(wanted)
        training = [shard for shard in shards if shard.split in TRAINING_SPLITS and shard.split not in wanted]
        source, last = f"{data} ({', '.join(wanted)})", latest_time(shards or evaluated)
    else:
        if splits:
            raise ValueError(f"splits need a dataset in files; run `ehrseq prepare {data} FOLDER` first.")
        events, report = load_events(data)
        skipped |= {note: f"{count:,}" for note, count in report.notes.items()}
        source, last = str(data), events["time"].max()
    if events.is_empty() or last is None:
        raise ValueError(f"{data if not isinstance(data, pl.DataFrame) else 'the table'} holds no timed event.")
    end = np.datetime64(last if end_of_data is None else end_of_data, "us")
    return EvaluatedRecords(events, end, training or None, source, skipped)


def _some(events: pl.DataFrame, most: int, seed: int, skipped: dict[str, str]) -> pl.DataFrame:
    """At most so many patients, by chance."""
    subjects = events["subject_id"].unique().sort()
    if len(subjects) <= most:
        return events
    chosen = subjects.gather(np.argsort(uniform_of(subjects.to_numpy(), seed), kind="stable")[:most])
    skipped["patients"] = f"{most:,} of {len(subjects):,} were drawn by chance (max_patients)"
    return events.filter(pl.col("subject_id").is_in(chosen.implode()))


def _training_counts(
    tokenizer: Any, records: EvaluatedRecords, windows: Any, progress: bool
) -> tuple[NDArray[np.int64], float, str]:
    """Token counts, mean days between visits, and where they are from."""
    counts = np.zeros(len(tokenizer), np.int64)
    if records.training is None:
        for number in range(len(windows)):
            counts += np.bincount(windows[number]["input_ids"], minlength=len(counts))
        learnt = "the evaluated records themselves, which favours the counting forecasts"
    else:
        for events in progress_bar(_blocks(records.training), desc="Counting", unit="block", disable=not progress):
            histories = tokenizer.encode_histories(events)
            for ids in (histories.ids, histories.static_ids):
                counts += np.bincount(ids, minlength=len(counts))
        learnt = f"the patients of {' and '.join(dict.fromkeys(shard.split for shard in records.training))}"
    ids = tokenizer.vocabulary.token_ids
    intervals = np.array([counts[ids[name]] for name in INTERVAL_DAYS], np.float64)
    days = np.array(list(INTERVAL_DAYS.values()))
    return counts, float(intervals @ days / intervals.sum()) if intervals.sum() else 90.0, learnt


def _blocks(shards: Sequence[Any]) -> Iterator[pl.DataFrame]:
    for shard in shards:
        yield from read_blocks(shard)


# -- trajectories ------------------------------------------------------------------------------------------------------


def _outcomes(
    forecaster: EhrForecastPipeline, asked: ForecastQuestions, skipped: dict[str, str]
) -> tuple[OutcomeTokens, ...]:
    """What is looked for in the trajectories; default outcomes that the vocabulary lacks are told."""
    vocabulary, time_head = cast("EhrTokenizer", forecaster.tokenizer).vocabulary, has_time_head(forecaster)
    if asked.outcomes is not None:
        read = read_outcomes(asked.outcomes, vocabulary, time_head=time_head)
        skipped.update({f"outcome {each.name}": "; ".join(each.notes) for each in read if each.notes})
        return tuple(OutcomeTokens(each.name, each.ids, each.complement) for each in read)
    outcomes = []
    for name in DEFAULT_OUTCOMES:
        try:
            read = read_outcomes({name: name}, vocabulary, time_head=time_head)
        except ValueError as error:
            skipped[f"outcome {name}"] = str(error)
            continue
        outcomes += [OutcomeTokens(each.name, each.ids, each.complement) for each in read]
    return tuple(outcomes)


def _times_in_words(asked: ForecastQuestions) -> str:
    if asked.prediction_times is not None:
        return "as given"
    return "those of labels" if asked.labels is not None else "ends of visits"


def _prediction_times(histories: Any, asked: ForecastQuestions, skipped: dict[str, str]) -> pl.DataFrame:
    """subject_id, prediction_time of patients that are here."""
    if asked.prediction_times is not None:
        times = checked_times(asked.prediction_times)
    elif asked.labels is not None:
        times = pl.concat(list(read_labelled_times(asked.labels).values())).unique()
    else:
        times = visit_ends(histories)
    here = times.filter(pl.col("subject_id").is_in(histories.subject_ids.tolist()))
    if here.height < times.height:
        skipped["prediction times of other patients"] = f"{times.height - here.height:,}"
    return here.sort("subject_id", "prediction_time")


def _draw(
    forecaster: EhrForecastPipeline,
    histories: Any,
    records: EvaluatedRecords,
    outcomes: tuple[OutcomeTokens, ...],
    asked: ForecastQuestions,
    skipped: dict[str, str],
    progress: bool,
) -> tuple[list[PatientTrajectories], list[RecordedFuture], TrajectoryRequest]:
    """Trajectories of all prediction times, and what came."""
    times = _prediction_times(histories, asked, skipped)
    late = times.filter(pl.col("prediction_time") > pl.lit(records.end_of_data))
    if late.height:
        skipped["prediction times behind the end of the data"] = f"{late.height:,}"
        times = times.filter(pl.col("prediction_time") <= pl.lit(records.end_of_data))
    if times.height > asked.max_predictions:
        skipped["prediction times"] = f"{asked.max_predictions:,} of {times.height:,} were drawn by chance"
        chosen = np.random.default_rng(asked.seed).permutation(times.height)[: asked.max_predictions]
        times = times[np.sort(chosen)]
    vocabulary = cast("EhrTokenizer", forecaster.tokenizer).vocabulary
    read = [record for _, _, record in records_at(forecaster, records.events, times)]
    for reason in sorted({each.reason for each in read if each.reason is not None}):
        skipped[f"prediction times: {REASONS_AGAINST_FORECAST[reason]}"] = f"{sum(r.reason == reason for r in read):,}"
    kept = [k for k, each in enumerate(read) if each.reason is None]
    if not kept:
        raise ValueError(
            f"there is no prediction time to forecast from. Left out: {skipped or 'nothing'}. Give prediction times of "
            "patients who are there, alive, with a visit before them."
        )
    times, prompts = times[kept], [to_prompt(read[k]) for k in kept]
    closing = vocabulary.token_ids[REG]
    futures = recorded_futures(
        histories,
        times["subject_id"].to_numpy(),
        times["prediction_time"].to_numpy(),
        horizon_days=asked.horizon_days,
        end_of_data=records.end_of_data,
        closed=[int(prompt.inputs["input_ids"][0, -1]) == closing for prompt in prompts],
    )
    request = TrajectoryRequest(
        horizon_days=float(asked.horizon_days),
        num=asked.num,
        seed=asked.seed,
        outcomes=outcomes,
        estimator=asked.estimator,  # type: ignore[arg-type]
        grid_days=asked.grid_days,
        death_ids=death_ids(vocabulary),
        keep_tokens=asked.estimator != "reach",
    )
    if request.outcomes:
        check_outcomes(request.outcomes, replace(request, grid_days=()))
    bar = progress_bar(
        cast("Any", forecaster.model).trajectories(prompts, request),
        desc="Trajectories",
        total=len(prompts),
        disable=not progress,
    )
    return list(bar), futures, request


def calibrations(
    drawn: Sequence[PatientTrajectories],
    futures: Sequence[RecordedFuture],
    request: TrajectoryRequest,
    asked: ForecastQuestions,
) -> Iterator[IncidenceCalibration]:
    """Each outcome: all predictions, then first occurrences and repeats apart where there are both."""
    estimates = [estimate_outcomes(each, request) for each in drawn]
    death = np.array([future.first_day(request.death_ids) for future in futures])
    followed = np.array([future.followed_days for future in futures])
    subjects = np.array([future.subject_id for future in futures])
    for number, outcome in enumerate(request.outcomes):
        if outcome.complement:
            continue  # it has no incidence before the horizon
        predicted = np.array([each[number].incidence for each in estimates])
        first = np.array([future.first_day(outcome.ids) for future in futures])
        days, causes = observed_causes(first, death, followed, asked.horizon_days)
        repeated = np.array([future.has_known(outcome.ids) for future in futures], bool)
        parts = {"all": np.ones(len(futures), bool), "first occurrences": ~repeated, "repeats": repeated}
        for part, rows in parts.items():
            if rows.any() and (part == "all" or (repeated.any() and not repeated.all())):
                yield calibrate_incidence(
                    outcome.name,
                    predicted[rows],
                    days[rows],
                    causes[rows],
                    subjects[rows],
                    request.grid,
                    part=part,
                    num_resamples=asked.num_resamples,
                    seed=asked.seed,
                )


def _plausibility(
    drawn: Sequence[PatientTrajectories],
    futures: Sequence[RecordedFuture],
    request: TrajectoryRequest,
    tokenizer: Any,
    asked: ForecastQuestions,
    skipped: dict[str, str],
) -> PlausibilityReport | None:
    try:
        return compare_futures(
            drawn,
            futures,
            horizon_days=asked.horizon_days,
            types=tokenizer.token_types,
            names=tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
            death_ids=request.death_ids,
            num_resamples=asked.num_resamples,
            seed=asked.seed,
        )
    except ValueError as error:
        skipped["plausibility of trajectories"] = str(error)
        return None
