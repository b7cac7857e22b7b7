r"""In-hospital death on PhysioNet-2012, train on one set and report on the other: HyMaTE beside what it must beat.

Every cell, one (direction, row, seed), is a folder with `scores.parquet` and `result.json`, written once and kept: a
run that was stopped goes on with what is missing, and several processes may work on rows or seeds of one folder side by
side. A row is `boosting`, `logistic` (both on summary statistics) or `gru`, or a recipe: a name (`ehrseq train --list`)
or the path of a YAML file. The direction `folds` is five-fold cross-validation on both sets, a fold for a seed. What is
tuned or stopped early is so on stays of the training set or folds; what is reported is read when a cell's model is
done.

    python -m benchmarks.tables.hymate_table --set_a set-a.tar.gz --set_b set-b.tar.gz --output runs/hymate \
        --rows boosting logistic hymate_paper --seeds 5 --threads 1
    python -m benchmarks.tables.hymate_table --output runs/hymate --report          # the table of what is there
    python -m benchmarks.tables.hymate_table --output runs/hymate --report --against hymate_paper   # differences to it
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from sklearn.model_selection import StratifiedGroupKFold
from transformers import AutoModelForSequenceClassification

import ehrseq  # noqa: F401  registers the classes with the Auto classes
from benchmarks.harness import write_json, write_parquet
from ehrseq.baselines import BoostedSummaries, HourlyGRU, LogisticSummaries
from ehrseq.batches.scoring import score_stays
from ehrseq.data.physionet2012.codes import TASK_CONFIG
from ehrseq.data.physionet2012.reader import Physionet2012, load_physionet2012
from ehrseq.encode.triplets import PHYSIONET2012, TripletTable, build_triplets
from ehrseq.evaluation import Interval, auroc, average_precision, bootstrap_interval
from ehrseq.evaluation.metrics import Ranking
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.training import TripletRecipe, finetune, hold_out_stays, pretrain

BASELINES: dict[str, Any] = {"boosting": BoostedSummaries, "logistic": LogisticSummaries, "gru": HourlyGRU}
DIRECTIONS = ("b-a", "a-b")
FOLDS = "folds"
NUM_FOLDS = 5
TITLES = {FOLDS: "Five-fold cross-validation on sets a and b, tuned inside the training folds:"}


class Stays:
    """The sets, read when a cell first asks for one; "ab" is both together."""

    def __init__(self, paths: dict[str, Path | None]) -> None:
        self._paths = paths
        self._tables: dict[str, TripletTable] = {}

    def __getitem__(self, name: str) -> TripletTable:
        if name not in self._tables:
            sets = [self._read(letter) for letter in name]
            events = pl.concat([stays.events for stays in sets]).sort("subject_id", "time", maintain_order=True)
            table = build_triplets(events, PHYSIONET2012, pl.concat([stays.labels for stays in sets]))
            if table.labels is None or any(stays.labels.is_empty() for stays in sets):
                raise SystemExit(f"set {name} has no outcomes: put its Outcomes file beside it.")
            self._tables[name] = table
        return self._tables[name]

    def _read(self, name: str) -> Physionet2012:
        path = self._paths[name]
        if path is None:
            raise SystemExit(f"set {name} is needed for what is not there yet: give --set_{name} PATH.")
        return load_physionet2012(path)

    def divide(self, direction: str, seed: int) -> tuple[TripletTable, Callable[[], TripletTable]]:
        """The stays to learn from, and how to get at the reported ones once a model is done."""
        if direction != FOLDS:
            source, target = direction.split("-")
            return self[source], lambda: self[target]
        both = self["ab"]
        splitter = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=0)
        inside, outside = list(splitter.split(both.labels, both.labels, both.subject_ids))[seed]
        return both.subset(inside), lambda: both.subset(outside)


def run_cell(stays: Stays, direction: str, row: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one cell, score the other set, write `scores.parquet` and, last, `result.json`, which is returned."""
    source, reported = stays.divide(direction, seed)
    result: dict[str, Any] = {"direction": direction, "row": row, "seed": seed}
    if row in BASELINES:
        baseline = BASELINES[row](seed=seed).fit(source)
        result |= {"tried": baseline.tried, "chosen": baseline.chosen}
        target = reported()
        scores = baseline.predict_proba(target)[:, 1]
    else:
        recipe = TripletRecipe.read(row)
        train, tuning = hold_out_stays(source, recipe.tuning_share)
        extractor = HyMaTEFeatureExtractor.fit(train)
        pretrained = None
        if recipe.pretrain is not None:
            pretrained = folder / "forecast"
            result["pretrain"] = pretrain(recipe, extractor, train, tuning, pretrained, seed=seed)
        checkpoint = folder / "outcome"
        options: dict[str, Any] = {"pretrained": pretrained, "task": TASK_CONFIG, "seed": seed}
        result["finetune"] = finetune(recipe, extractor, train, tuning, checkpoint, **options)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
        target = reported()
        scores = score_stays(model, extractor, target, max_length=recipe.max_length)
    labels: Any = target.labels
    table = pl.DataFrame({"subject_id": target.subject_ids, "label": labels, "score": scores})
    write_parquet(table.sort("subject_id"), folder / "scores.parquet")
    result |= {"auroc": auroc(labels, scores), "auprc": average_precision(labels, scores)}
    write_json(result, result_file(folder))
    return result


def result_file(folder: Path) -> Path:
    """What says that a cell is done."""
    return folder / "result.json"


def cells(row_folder: Path) -> list[pl.DataFrame]:
    """The scores of a row's finished seeds."""
    folders = sorted(row_folder.glob("seed*"))
    return [pl.read_parquet(folder / "scores.parquet") for folder in folders if result_file(folder).is_file()]


def report(output: Path, direction: str, against: str) -> Iterator[str]:
    """Lines of a Markdown table: the mean over seeds or folds, its interval over patients, the paired difference."""
    rows = {folder.name: cells(folder) for folder in sorted((output / direction).glob("*"))}
    rows = {row: tables for row, tables in rows.items() if tables}
    if not rows:
        yield f"{direction}: nothing is done yet."
        return
    bar = rows.get(against)
    yield TITLES.get(direction, f"Trained on set {direction[0]}, reported on set {direction[-1]}:")
    yield ""
    cell = "folds" if direction == FOLDS else "seeds"
    yield f"| row | {cell} | AUROC | AUPRC | AUROC over {against} | AUPRC over {against} |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row, tables in rows.items():
        variants = {row: tables}
        if len(tables) > 1 and direction != FOLDS:
            together = tables[0].with_columns(score=np.mean([table["score"].to_numpy() for table in tables], axis=0))
            variants[f"{row}, mean score of its seeds"] = [together]
        for name, scored in variants.items():
            values = [metric_of(scored, metric) for metric in ("auroc", "average_precision")]
            over = ["", ""]
            if bar is not None and row != against:
                over = [str(metric_of(scored, metric, bar)) for metric in ("auroc", "average_precision")]
            yield f"| {name} | {len(tables)} | {values[0]} | {values[1]} | {over[0]} | {over[1]} |"
    yield ""


def metric_of(tables: list[pl.DataFrame], metric: str, others: list[pl.DataFrame] | None = None) -> Interval:
    """Mean of a metric over cells with its interval over patients; with `others` the paired difference to theirs.

    The cells of a direction are seeds, which score the same stays, or folds, which score each its own.
    """
    drawn = pl.concat([table["subject_id"] for table in tables]).unique().sort()  # of these the bootstrap draws
    seen = pl.concat([table["subject_id"] for table in others]).unique().sort() if others else drawn
    same_stays = all(table["subject_id"].equals(tables[0]["subject_id"]) for table in tables)
    if not seen.equals(drawn) or not (same_stays or sum(map(len, tables)) == len(drawn)):
        raise SystemExit("cells of one direction hold other stays: were they made from other files?")

    def mean_of(scored: list[pl.DataFrame]) -> Callable[[Any], Any]:
        rankings = [Ranking(table["label"].to_numpy(), table["score"].to_numpy()) for table in scored]
        places = [drawn.search_sorted(table["subject_id"]).to_numpy() for table in scored]

        def value(weights: Any) -> Any:
            each = zip(rankings, places, strict=True)
            return np.mean([getattr(r, metric)(None if weights is None else weights[:, at]) for r, at in each], axis=0)

        return value

    ours, theirs = mean_of(tables), mean_of(others or [])
    return bootstrap_interval(
        lambda weights: ours(weights) - (theirs(weights) if others else 0.0), drawn.to_numpy(), num_resamples=1000
    )


def main() -> None:
    """Run the missing cells, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set_a", type=Path, help="archive or folder of set a, its Outcomes file beside it")
    parser.add_argument("--set_b", type=Path, help="the same of set b")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--rows", nargs="+", default=["boosting", "logistic", "hymate_paper"], help="what is trained")
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=[*DIRECTIONS, FOLDS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[5], help="how many, or which (two or more numbers)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--against", default="boosting", help="the row that differences are taken to")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds = range(options.seeds[0]) if len(options.seeds) == 1 else options.seeds
    stays = Stays({"a": options.set_a, "b": options.set_b})
    for seed in () if options.report else seeds:
        for direction in options.directions:
            if direction == FOLDS and seed >= NUM_FOLDS:
                continue
            for row in options.rows:
                folder = options.output / direction / Path(row).stem / f"seed{seed}"
                if result_file(folder).is_file() or (row == "logistic" and direction != FOLDS and seed):
                    continue  # done; or no chance in it
                folder.mkdir(parents=True, exist_ok=True)
                print(f"{direction} {row} seed {seed} ...", file=sys.stderr, flush=True)
                done = run_cell(stays, direction, row, seed, folder)
                print(f"  AUROC {done['auroc']:.4f}, AUPRC {done['auprc']:.4f}", file=sys.stderr, flush=True)
    for direction in options.directions:
        print("\n".join(report(options.output, direction, options.against)))


if __name__ == "__main__":
    main()
