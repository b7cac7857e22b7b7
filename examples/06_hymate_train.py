"""HyMaTE on ICU stays: forecasting, then in-hospital death, and the scores of other stays beside boosting's.

    ehrseq simulate-stays runs/train -n 2000 --seed 1     # or the files of the PhysioNet challenge 2012:
    ehrseq simulate-stays runs/test -n 2000 --seed 2      # --train set-b.tar.gz --test set-a.tar.gz
    python examples/06_hymate_train.py --train runs/train --test runs/test --output_dir runs/hymate \
        --recipe hymate_paper --seeds 5

Nothing of the test stays is read before the models are done. Every stage of every seed is kept: run the same command
again to go on where it stopped. Without --test it ends with the checkpoints, which `ehrseq predict` reads. To learn
from all that is labelled, a folder with both sets' archives and outcomes is one --train:

    python examples/06_hymate_train.py --train challenge2012 --output_dir runs/hymate --recipe RECIPE
    ehrseq predict --model runs/hymate/seed0/outcome --data unseen_stays --out predictions.parquet
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

# First: it registers the classes, and torch's threads then sleep while they wait.
import ehrseq  # noqa: F401  # isort: skip

import numpy as np
import polars as pl
import torch
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from ehrseq.baselines import BoostedSummaries
from ehrseq.batches.scoring import score_stays
from ehrseq.data.physionet2012.codes import TASK_CONFIG
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.evaluation import evaluate_tasks, metrics_table
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.training import TripletRecipe, finetune, hold_out_stays, pretrain


@dataclass
class Arguments:
    """Options."""

    train: str = field(metadata={"help": "Stays to learn from: the challenge's archive or folder."})
    output_dir: str = field(metadata={"help": "Folder of checkpoints and scores."})
    test: str | None = field(default=None, metadata={"help": "Stays to report on; none: train only."})
    recipe: str = field(default="hymate_paper", metadata={"help": "Name (`ehrseq train --list`) or YAML file."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds."})
    boosting: bool = field(default=True, metadata={"help": "Gradient boosting on summary statistics beside it."})
    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 = all."})


def main() -> None:
    """Train every seed, then score the test stays."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe, folder = TripletRecipe.read(arguments.recipe), Path(arguments.output_dir)
    stays = load_physionet2012(arguments.train)
    print(stays.report)
    table = build_triplets(stays.events, PHYSIONET2012, stays.labels)
    train, tuning = hold_out_stays(table, recipe.tuning_share)
    extractor = HyMaTEFeatureExtractor.fit(train)
    checkpoints = []
    for seed in range(arguments.seeds):
        pretrained = None
        if recipe.pretrain is not None:
            pretrained = folder / f"seed{seed}" / "forecast"
            reached = pretrain(recipe, extractor, train, tuning, pretrained, seed=seed)
            print(
                f"seed {seed}: forecast MSE {reached['forecast_mse']:.3f}, last value {reached['last_value_mse']:.3f}"
            )
        checkpoints.append(folder / f"seed{seed}" / "outcome")
        options = {"pretrained": pretrained, "task": TASK_CONFIG, "seed": seed}
        reached = finetune(recipe, extractor, train, tuning, checkpoints[-1], **options)
        print(f"seed {seed}: tuning AUROC {reached['auroc']:.3f}, AUPRC {reached['auprc']:.3f}")

    if arguments.test is None:
        print("\n".join(f"{checkpoint} is ready for `ehrseq predict --model`." for checkpoint in checkpoints))
        return
    other = load_physionet2012(arguments.test)
    test = build_triplets(other.events, PHYSIONET2012, other.labels)
    scores = {}
    for seed, checkpoint in enumerate(checkpoints):
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
        scores[f"seed {seed}"] = score_stays(model, extractor, test, max_length=recipe.max_length)
    scores["mean of seeds"] = np.mean(list(scores.values()), axis=0)
    if arguments.boosting:
        scores["boosting"] = BoostedSummaries().fit(table).predict_proba(test)[:, 1]
    pl.DataFrame({"subject_id": test.subject_ids, "label": test.labels, **scores}).write_csv(folder / "scores.csv")
    columns = np.repeat(np.arange(len(scores)), len(test))  # every way of scoring is a row of the table
    labels, subjects = (np.tile(values, len(scores)) for values in (test.labels, test.subject_ids))
    print(metrics_table(evaluate_tasks(labels, np.concatenate(list(scores.values())), columns, subjects, list(scores))))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
