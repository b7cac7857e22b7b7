"""Multitask prompted finetuning (MPF): one head for every task, by the unmodified Trainer.

    python examples/03_finetune.py --data runs/data --model runs/pretrain --output_dir runs/finetune \
        --max_steps 400 --learning_rate 1e-3 --eval_strategy steps --eval_steps 100 --save_steps 100 \
        --load_best_model_at_end --metric_for_best_model auroc_mean --patience 3

Run the same command again to resume; `--packing` and `torchrun --nproc_per_node 2` as in 02.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

# First: it registers the classes, and torch's threads then sleep while they wait.
import ehrseq  # noqa: F401  # isort: skip

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ehrseq.batches.balance import balance_rows
from ehrseq.batches.packing import DataCollatorForPackedPrompts, PackableRows, evaluation_order
from ehrseq.batches.prompts import prompted_dataset
from ehrseq.data.dataset import EventDataset
from ehrseq.encode import EncodedDataset, is_encoded
from ehrseq.evaluation import ComputeTaskMetrics
from ehrseq.tasks import read_labels
from ehrseq.training.trainer import last_checkpoint, leave_process_group, use_paper_recipe


@dataclass
class Arguments:
    """Options beside Trainer's own."""

    data: str = field(
        metadata={"help": "Folder that 01_prepare_data.py wrote, or DATASET/encoded of `ehrseq tokenize`."}
    )
    model: str = field(metadata={"help": "Pretrained checkpoint."})
    positive_share: float | None = field(default=None, metadata={"help": "Balance the classes, e.g. 0.5."})
    rows: int | None = field(default=None, metadata={"help": "Rows of one epoch, all of them when absent."})
    packing: bool = field(default=False, metadata={"help": "Put several patients into a row, instead of padding."})
    patience: int = field(default=0, metadata={"help": "Evaluations without progress before stopping; 0 = never."})


def main() -> None:
    """Finetune, evaluate on the tuning patients, save the model with its tokenizer."""
    arguments, args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model)
    context, names = model.config.max_position_embeddings, [task["name"] for task in model.config.tasks]
    if is_encoded(arguments.data):
        data = EncodedDataset(arguments.data)
        labels = read_labels(data.path.parent)
        train, tuning = data.prompts(labels, context, "train"), data.prompts(labels, context, "tuning")
    else:
        dataset = EventDataset(Path(arguments.data) / "dataset")
        labels = read_labels(dataset.path)
        train = prompted_dataset(tokenizer, dataset.events("train"), labels, context)
        tuning = prompted_dataset(tokenizer, dataset.events("tuning"), labels, context)
    tuning = tuning.subset(tuning.lengths.argsort(kind="stable"))  # batches of like length: next to no padding

    draw = {"num_rows": arguments.rows, "positive_share": arguments.positive_share}
    sample = balance_rows(train.task_ids, train.labels, names, **draw)
    model.config.tasks = sample.store_in(model.config.tasks)  # the scores stay probabilities
    for task in sample.tasks:
        print(f"{task.task}: {task.sampled:,} rows, prevalence {task.prevalence:.3f} -> {task.sampled_prevalence:.3f}")

    train = train.subset(sample.rows)
    patients = tuning.subject_ids[evaluation_order(tuning.lengths, args)]
    trainer = Trainer(
        model=model,
        args=use_paper_recipe(args, len(train)),
        train_dataset=PackableRows(train) if arguments.packing else train,
        eval_dataset=tuning,
        data_collator=DataCollatorForPackedPrompts(tokenizer, context),  # pads what is not to be packed
        processing_class=tokenizer,
        compute_metrics=ComputeTaskMetrics(names, patients, log_odds_shifts=sample.log_odds_shifts),
        callbacks=[EarlyStoppingCallback(arguments.patience)] if arguments.patience else None,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.log_metrics("tuning", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    leave_process_group()
