"""Figure 3 of the EhrMamba paper: one patient who died, what the risk is made of, the events forecast beside the real.

    python examples/07_case_study.py --data runs/data --model runs/finetune --forecaster runs/pretrain \
        --output runs/case

Writes `case.png` and `case.html`. The contributions are of the last prediction time before the death, and nothing later
is read for them. The forecast goes on to the death: at each of the last events the model knows what came before, and
says what it thinks comes next; beside it stands what did. `--method relevance` and others: `ehrseq.interpretability`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

# First: it registers the classes, and torch's threads then sleep while they wait.
import ehrseq  # noqa: F401  # isort: skip

import polars as pl
import torch
from matplotlib.transforms import blended_transform_factory
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from ehrseq.data.dataset import EventDataset
from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.interpretability import explain
from ehrseq.interpretability.page import write_page
from ehrseq.interpretability.picture import save_picture
from ehrseq.tasks import read_labels
from ehrseq.tokenization.ehr_sequence import EPOCH


@dataclass
class Arguments:
    """Options of this script."""

    data: str = field(metadata={"help": "Folder that 01_prepare_data.py wrote."})
    model: str = field(metadata={"help": "Finetuned checkpoint of 03_finetune.py."})
    forecaster: str = field(metadata={"help": "Pretrained checkpoint of 02_pretrain.py."})
    output: str = field(default="case", metadata={"help": "Folder of case.png and case.html."})
    task: str = field(default="mortality_30d", metadata={"help": "A task whose outcome is death."})
    method: list[str] = field(default_factory=lambda: ["prefix_deltas"], metadata={"help": "Methods, one or several."})
    subject: int | None = field(default=None, metadata={"help": "The patient; default: the one of the highest risk."})
    events: int = field(default=20, metadata={"help": "Last events that are forecast."})


def main() -> None:
    """Choose the patient, explain the risk, forecast the last events, draw both."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    dataset, checkpoint = EventDataset(Path(arguments.data) / "dataset"), load_checkpoint(arguments.model)
    subject, at = choose_patient(dataset, checkpoint, arguments)
    record = dataset.events().filter(pl.col("subject_id") == subject)
    patient = {"subject_id": subject, "events": record.to_dicts(), "prediction_time": at}
    names = dict(dataset.codes.select("code", "description").drop_nulls().iter_rows())
    explanations = [explain(checkpoint, patient, arguments.task, method).named(names) for method in arguments.method]
    forecast = forecast_events(arguments.forecaster, record, arguments.events)

    output = Path(arguments.output)
    tasks = checkpoint.model.config.tasks
    write_page(explanations, output / "case.html", tasks=tasks, record=record)
    panel = (0.5 + 0.2 * forecast.height, draw_forecast(forecast))
    save_picture(explanations, output / "case.png", record=record, panels=[panel])
    print(explanations[0].top(5).select("time", "code", "value", "contribution"))
    print(f"patient {subject} at {at}: risk {explanations[0].score:.1%}; {output / 'case.png'}")
    hits = forecast["rank"].le(5).sum()
    print(f"{hits} of the last {forecast.height} events were among the five most probable next ones")


def choose_patient(dataset: EventDataset, checkpoint: Any, arguments: Arguments) -> tuple[int, Any]:
    """A held-out patient who died after a prediction time, and the last such time."""
    labels = read_labels(dataset.path, [arguments.task])[arguments.task].filter(pl.col("boolean_value"))
    rows = labels.sort("prediction_time").group_by("subject_id").last().sort("subject_id")
    if arguments.subject is None:
        held_out = dataset.splits.filter(pl.col("split") == "held_out")["subject_id"]
        rows = rows.filter(pl.col("subject_id").is_in(held_out.implode()))
    else:
        rows = rows.filter(pl.col("subject_id") == arguments.subject)
    if rows.is_empty():
        raise ValueError(
            f"no held-out patient (or not {arguments.subject}) has a positive label of {arguments.task}; prepare more "
            "patients, or name one of `--subject`."
        )
    events = dataset.events().filter(pl.col("subject_id").is_in(rows["subject_id"].implode()))
    best = None
    for subject, at in rows.select("subject_id", "prediction_time").iter_rows():
        own = events.filter(pl.col("subject_id") == subject)
        patient = {"subject_id": subject, "events": own.to_dicts(), "prediction_time": at}
        score = explain(checkpoint, patient, arguments.task, "prefix_deltas", by="visit").score
        if best is None or score > best[0]:
            best = (score, subject, at)
    return best[1], best[2]


def forecast_events(forecaster: str, record: pl.DataFrame, count: int) -> pl.DataFrame:
    """The last events of a record: each with the probability that the model gave it, its rank, and the best guesses."""
    tokenizer, model = AutoTokenizer.from_pretrained(forecaster), AutoModelForCausalLM.from_pretrained(forecaster)
    rows = tokenizer.sourced_rows({"events": record.to_dicts()}, [None], None, model.config.max_position_embeddings)
    row = {name: torch.as_tensor(channel)[None] for name, channel in rows.row(0).items()}
    with torch.no_grad():
        shares = model.eval()(**row).logits[0].float().softmax(-1)  # [l, vocabulary]: of what follows each token
    ids = row["input_ids"][0].tolist()
    lines = []
    for place, source in enumerate(rows.event_of(0).tolist()):
        event = rows.events[source] if source >= 0 else None
        if place == 0 or event is None or event.time is None:
            continue
        before = shares[place - 1]
        best = before.topk(3)
        guesses = zip(tokenizer.convert_ids_to_tokens(best.indices.tolist()), best.values.tolist(), strict=True)
        lines.append(
            {
                "time": EPOCH + timedelta(microseconds=event.time),
                "token": tokenizer.convert_ids_to_tokens(ids[place]),
                "probability": float(before[ids[place]]),
                "rank": int((before > before[ids[place]]).sum()) + 1,
                "guesses": ", ".join(f"{token[:26]} {share:.0%}" for token, share in guesses),
            }
        )
    return pl.DataFrame(lines[-count:])


def draw_forecast(forecast: pl.DataFrame) -> Callable[[Any], None]:
    """What draws the table: what happened, how probable the model thought it, and what it thought of first."""

    def draw(axis: Any) -> None:
        axis.set_axis_off()
        axis.set_ylim(len(forecast), -1)
        # The whole width of the picture, where the panels above leave room for names.
        across = blended_transform_factory(axis.get_figure().transFigure, axis.transData)
        style = {"transform": across, "va": "center", "in_layout": False}
        columns = {"date": 0.02, "what happened": 0.09, "probability": 0.32, "rank": 0.40, "most probable next": 0.44}
        for name, x in columns.items():
            axis.text(x, -0.9, name, fontsize=8, fontweight="bold", **style)
        for line, row in enumerate(forecast.iter_rows(named=True)):
            cells = (f"{row['time']:%Y-%m-%d}", row["token"], f"{row['probability']:.1%}", row["rank"], row["guesses"])
            for x, cell in zip(columns.values(), cells, strict=True):
                weight = "bold" if row["rank"] <= 5 and cell is row["token"] else "normal"
                axis.text(x, line, str(cell).replace("$", r"\$"), fontsize=6.5, fontweight=weight, **style)

    return draw


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
