"""Scores and metrics of a finetuned checkpoint on the held-out patients, and the risk of one of them.

python examples/04_predict.py --data runs/data --model runs/finetune --output risks.parquet

The threshold of F1 comes from the tuning patients.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from transformers import HfArgumentParser, pipeline

import ehrseq  # noqa: F401  registers pipeline("ehr-risk")
from ehrseq.batches.prompts import prompted_dataset
from ehrseq.batches.scoring import score_rows
from ehrseq.data.dataset import EventDataset
from ehrseq.evaluation import choose_thresholds, evaluate_tasks, metrics_table
from ehrseq.tasks import read_labels


@dataclass
class Arguments:
    """Options of this script."""

    data: str = field(metadata={"help": "Folder that 01_prepare_data.py wrote."})
    model: str = field(metadata={"help": "Finetuned checkpoint, a folder or owner/name on the Hub."})
    output: str = field(default="risks.parquet", metadata={"help": "Parquet file of the held-out scores."})
    split: str = field(default="held_out", metadata={"help": "Split to score."})
    batch_size: int = field(default=64, metadata={"help": "Rows in one forward pass."})


def main() -> None:
    """Score a split, show its metrics, score one patient by the pipeline."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    dataset = EventDataset(Path(arguments.data) / "dataset")
    risk = pipeline("ehr-risk", model=arguments.model)
    model, tokenizer = risk.model, risk.tokenizer
    names, context = [task["name"] for task in model.config.tasks], model.config.max_position_embeddings
    labels = read_labels(dataset.path)

    # The threshold of F1 is chosen on the tuning patients.
    tuning = prompted_dataset(tokenizer, dataset.events("tuning"), labels, context)
    test = prompted_dataset(tokenizer, dataset.events(arguments.split), labels, context)
    tuning_scores = score_rows(model, tokenizer, tuning, batch_size=arguments.batch_size)
    thresholds = choose_thresholds(tuning.labels, tuning_scores, tuning.task_ids, names)
    scores = score_rows(model, tokenizer, test, batch_size=arguments.batch_size)
    results = evaluate_tasks(test.labels, scores, test.task_ids, test.subject_ids, names, thresholds=thresholds)
    print(metrics_table(results))

    table = pl.DataFrame(
        {
            "subject_id": test.subject_ids,
            "prediction_time": test.prediction_times,
            "task": [names[task_id] for task_id in test.task_ids],
            "label": test.labels,
            "score": scores,
        }
    )
    table.write_parquet(arguments.output)
    print(f"{table.height:,} scores in {arguments.output}")

    subject, at = test.subject_ids[0], test.prediction_times[0].item()
    events = dataset.events(arguments.split).filter(pl.col("subject_id") == subject).to_dicts()
    print(risk({"subject_id": int(subject), "events": events, "prediction_time": at}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
