r"""The model card of a finished cell of hymate_table.py, filled from what the cell measured.

    python -m benchmarks.tables.hymate_card --cell runs/hymate/a-b/hymate_additive/seed0 \
        --repo_id me/hymate-physionet2012 --card hub_cards/hymate_physionet2012.md

The card's results are of the one checkpoint, on the set that had no part in its training.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.data.physionet2012.codes import TASK_CONFIG
from ehrseq.evaluation import evaluate_tasks
from ehrseq.hub.cards import DataDescription, EhrModelCard
from ehrseq.work.files import write_text

DATA = DataDescription(
    "PhysioNet/Computing in Cardiology Challenge 2012",
    description="Adult ICU stays of the MIMIC-II database: the first 48 hours of 36 time series, age, sex, height, "
    "weight and type of intensive care unit.",
    url="https://physionet.org/content/challenge-2012/1.0.0/",
    license="Open Data Commons Attribution License v1.0",
)
LIMITS = (
    "Stays of 2001 to 2008 in one hospital: prevalence and practice are others today, so recalibrate before any use.",
    "It scores 48 hours after the admission to intensive care, and no other time.",
)


def card_of(cell: Path, repo_id: str) -> str:
    """The card's text.

    Args:
        cell: Folder with `result.json`, `scores.parquet` and the checkpoint `outcome`.
        repo_id: `owner/name` on the Hub.

    Raises:
        SystemExit: A cell that is not done, or one of a baseline.
    """
    for name in ("result.json", "scores.parquet", "outcome"):
        if not (cell / name).exists():
            raise SystemExit(f"{cell} has no {name}: it is no finished cell of a recipe of hymate_table.py.")
    result = json.loads((cell / "result.json").read_text())
    source, target = result["direction"].split("-")
    scores = pl.read_parquet(cell / "scores.parquet")
    name = TASK_CONFIG["name"]
    task_ids = [0] * scores.height
    finetuned = result["finetune"]
    training: dict[str, Any] = {
        "recipe": result["row"],
        "seed": result["seed"],
        "stays": finetuned["settings"]["stays"],
        "stays to tune on": finetuned["settings"]["tuning_stays"],
        "epochs of the outcome": finetuned["epochs"],
        "minutes of the outcome": round(finetuned["seconds"] / 60, 1),
    }
    if "pretrain" in result:
        stage = result["pretrain"]
        training |= {
            "epochs of forecasting": stage["epochs"],
            "minutes of forecasting": round(stage["seconds"] / 60, 1),
            "forecast MSE on the stays to tune on": round(stage["forecast_mse"], 3),
            "the same of the last value": round(stage["last_value_mse"], 3),
        }
    card = EhrModelCard(
        repo_id.split("/")[-1],
        data=DATA,
        results=evaluate_tasks(scores["label"], scores["score"], task_ids, scores["subject_id"], [name]),
        evaluated_on=f"Trained on set {source} of the challenge, scored the {scores.height:,} stays of set {target}.",
        training=training,
        limits=LIMITS,
        license="apache-2.0",
    )
    return card.render(cell / "outcome", repo_id)


def main() -> None:
    """Write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", type=Path, required=True, help="folder of a finished cell: DIRECTION/ROW/seedN")
    parser.add_argument("--repo_id", required=True, help="owner/name on the Hub")
    parser.add_argument("--card", type=Path, required=True, help="file of the card")
    options = parser.parse_args()
    text = card_of(options.cell, options.repo_id)
    write_text(options.card, text)


if __name__ == "__main__":
    main()
