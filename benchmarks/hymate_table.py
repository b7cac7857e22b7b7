r"""In-hospital death on PhysioNet-2012, train on one set and report on the other: HyMaTE beside what it must beat.

Every cell, one (direction, row, seed), is a folder with `scores.parquet` and `result.json`, written once and kept: a
run that was stopped goes on with what is missing, and several processes may work on rows or seeds of one folder side by
side. A row is `boosting` or `logistic` (on summary statistics), or a recipe: `hymate_paper` is
examples/recipes/hymate_paper.yaml, anything else the path of a YAML file. What is tuned or stopped early is so on
stays of the training set; the reported set is read when a cell's model is done.

    python benchmarks/hymate_table.py --set_a set-a.tar.gz --set_b set-b.tar.gz --output runs/hymate \
        --rows boosting logistic hymate_paper --seeds 5 --threads 1
    python benchmarks/hymate_table.py --output runs/hymate --report          # the table of what is there
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from harness import write_json, write_parquet
from transformers import AutoModelForSequenceClassification

import ehrseq  # noqa: F401  registers the classes with the Auto classes
from ehrseq.baselines import BoostedSummaries, LogisticSummaries
from ehrseq.data.physionet2012 import load_physionet2012
from ehrseq.data.physionet2012_codes import TASK_CONFIG
from ehrseq.data.triplets import PHYSIONET2012, TripletTable, build_triplets
from ehrseq.evaluation import Interval, auroc, average_precision, bootstrap_interval
from ehrseq.evaluation.metrics import Ranking
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.triplet_training import TripletRecipe, finetune, hold_out_stays, pretrain, score_stays

BASELINES: dict[str, Any] = {"boosting": BoostedSummaries, "logistic": LogisticSummaries}
DIRECTIONS = ("b-a", "a-b")
RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


class Stays:
    """The sets, read when a cell first asks for one."""

    def __init__(self, paths: dict[str, Path | None]) -> None:
        self._paths = paths
        self._tables: dict[str, TripletTable] = {}

    def __getitem__(self, name: str) -> TripletTable:
        if name not in self._tables:
            path = self._paths[name]
            if path is None:
                raise SystemExit(f"set {name} is needed for what is not there yet: give --set_{name} PATH.")
            stays = load_physionet2012(path)
            table = build_triplets(stays.events, PHYSIONET2012, stays.labels)
            if table.labels is None:
                raise SystemExit(f"set {name} has no outcomes: put its Outcomes file beside it.")
            self._tables[name] = table
        return self._tables[name]


def run_cell(stays: Stays, direction: str, row: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one cell, score the other set, write `scores.parquet` and, last, `result.json`, which is returned."""
    source, target = direction.split("-")
    result: dict[str, Any] = {"direction": direction, "row": row, "seed": seed}
    if row in BASELINES:
        baseline = BASELINES[row](seed=seed).fit(stays[source])
        result |= {"tried": baseline.tried, "chosen": baseline.chosen}
        scores = baseline.predict_proba(stays[target])[:, 1]
    else:
        recipe = TripletRecipe.read(recipe_file(row))
        train, tuning = hold_out_stays(stays[source])
        extractor = HyMaTEFeatureExtractor.fit(train)
        pretrained = None
        if recipe.pretrain is not None:
            pretrained = folder / "forecast"
            result["pretrain"] = pretrain(recipe, extractor, train, tuning, pretrained, seed=seed)
        checkpoint = folder / "outcome"
        options: dict[str, Any] = {"pretrained": pretrained, "task": TASK_CONFIG, "seed": seed}
        result["finetune"] = finetune(recipe, extractor, train, tuning, checkpoint, **options)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
        scores = score_stays(model, extractor, stays[target], max_length=recipe.max_length)
    labels: Any = stays[target].labels
    table = pl.DataFrame({"subject_id": stays[target].subject_ids, "label": labels, "score": scores})
    write_parquet(table.sort("subject_id"), folder / "scores.parquet")
    result |= {"auroc": auroc(labels, scores), "auprc": average_precision(labels, scores)}
    write_json(result, result_file(folder))
    return result


def recipe_file(row: str) -> Path:
    """The YAML file of a row."""
    return RECIPES / f"{row}.yaml" if (RECIPES / f"{row}.yaml").is_file() else Path(row)


def result_file(folder: Path) -> Path:
    """What says that a cell is done."""
    return folder / "result.json"


def cells(row_folder: Path) -> list[pl.DataFrame]:
    """The scores of a row's finished seeds."""
    folders = sorted(row_folder.glob("seed*"))
    return [pl.read_parquet(folder / "scores.parquet") for folder in folders if result_file(folder).is_file()]


def report(output: Path, direction: str) -> Iterator[str]:
    """Lines of a Markdown table: the mean over seeds, its interval over patients, the paired difference to boosting."""
    rows = {folder.name: cells(folder) for folder in sorted((output / direction).glob("*"))}
    rows = {row: tables for row, tables in rows.items() if tables}
    if not rows:
        yield f"{direction}: nothing is done yet."
        return
    bar = rows.get("boosting")
    yield f"Trained on set {direction[0]}, reported on set {direction[-1]}:"
    yield ""
    yield "| row | seeds | AUROC | AUPRC | AUROC over boosting | AUPRC over boosting |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row, tables in rows.items():
        variants = {row: tables}
        if len(tables) > 1:
            together = tables[0].with_columns(score=np.mean([table["score"].to_numpy() for table in tables], axis=0))
            variants[f"{row}, mean score of its seeds"] = [together]
        for name, scored in variants.items():
            values = [metric_of(scored, metric) for metric in ("auroc", "average_precision")]
            over = ["", ""]
            if bar is not None and row != "boosting":
                over = [str(metric_of(scored, metric, bar)) for metric in ("auroc", "average_precision")]
            yield f"| {name} | {len(tables)} | {values[0]} | {values[1]} | {over[0]} | {over[1]} |"
    yield ""


def metric_of(tables: list[pl.DataFrame], metric: str, others: list[pl.DataFrame] | None = None) -> Interval:
    """Mean of a metric over seeds with its interval over patients; with `others` the paired difference to theirs."""
    subjects = tables[0]["subject_id"]
    for table in (*tables, *(others or [])):
        if not table["subject_id"].equals(subjects):
            raise SystemExit("cells of one direction hold other stays: were they made from other files?")

    ours, theirs = (
        [Ranking(table["label"].to_numpy(), table["score"].to_numpy()) for table in scored]
        for scored in (tables, others or [])
    )

    def mean_of(rankings: list[Ranking], weights: Any) -> Any:
        return np.mean([getattr(ranking, metric)(weights) for ranking in rankings], axis=0)

    def value(weights: Any) -> Any:
        return mean_of(ours, weights) - (mean_of(theirs, weights) if theirs else 0.0)

    return bootstrap_interval(value, subjects.to_numpy())


def main() -> None:
    """Run the missing cells, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set_a", type=Path, help="archive or folder of set a, its Outcomes file beside it")
    parser.add_argument("--set_b", type=Path, help="the same of set b")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--rows", nargs="+", default=["boosting", "logistic", "hymate_paper"], help="what is trained")
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5], help="how many, or which (two or more numbers)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds = range(options.seeds[0]) if len(options.seeds) == 1 else options.seeds
    stays = Stays({"a": options.set_a, "b": options.set_b})
    for seed in () if options.report else seeds:
        for direction in options.directions:
            for row in options.rows:
                folder = options.output / direction / Path(row).stem / f"seed{seed}"
                if result_file(folder).is_file() or (row == "logistic" and seed != next(iter(seeds))):
                    continue  # done; or no chance in it
                folder.mkdir(parents=True, exist_ok=True)
                print(f"{direction} {row} seed {seed} ...", file=sys.stderr, flush=True)
                done = run_cell(stays, direction, row, seed, folder)
                print(f"  AUROC {done['auroc']:.4f}, AUPRC {done['auprc']:.4f}", file=sys.stderr, flush=True)
    for direction in options.directions:
        print("\n".join(report(options.output, direction)))


if __name__ == "__main__":
    main()
