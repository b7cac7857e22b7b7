r"""Values of the next two hours on PhysioNet-2012: HyMaTE beside the last value and the mean, and its intervals.

Pretraining learns on stays of one set, stops and fits its intervals on others of that set (`tuning_share` of the
recipe), and is asked about the stays of the other set, one time each. What a folder has finished is not done again.

    python -m benchmarks.tables.stay_forecasts --learn set-a.tar.gz --report set-b.tar.gz --output runs/values \
        --recipe hymate_quick --set pretrain.epochs=10 --set model.forecast_from_last_value=true
"""

import argparse
import sys
from pathlib import Path

import torch

import ehrseq  # noqa: F401  registers the classes with the Auto classes
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets, variable_units
from ehrseq.forecasting.stay_values import load_stay_forecaster
from ehrseq.forecasting.value_evaluation import evaluate_stays
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.training import TripletRecipe, hold_out_stays, pretrain, read_recipe


def main() -> None:
    """Pretrain unless that is done, then print the table of each alpha."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", type=Path, required=True, help="set to learn on, its Outcomes file beside it")
    parser.add_argument("--report", type=Path, required=True, help="set to report on")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--recipe", default="hymate_quick", help="name or YAML file; its pretrain stage is run")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1], help="shares that may lie outside")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = read_recipe(options.recipe, options.changes)
    if not isinstance(recipe, TripletRecipe):
        raise SystemExit(f"--recipe got {options.recipe}, of the family {recipe.family}; expected one of hymate.")
    learnt = load_physionet2012(options.learn)
    table = build_triplets(learnt.events, PHYSIONET2012, learnt.labels)
    train, tuning = hold_out_stays(table, recipe.tuning_share)
    extractor = HyMaTEFeatureExtractor.fit(train)
    folder = options.output / "forecast"
    units = variable_units(learnt.events, PHYSIONET2012)
    reached = pretrain(recipe, extractor, train, tuning, folder, units=units, seed=options.seed)
    print(
        f"{len(train)} training stays, {len(tuning)} tuning stays; {reached['epochs']} epochs, "
        f"{reached['seconds']:.0f} s; MSE of the tuning stays {reached['forecast_mse']:.3f}, of the last value "
        f"{reached['last_value_mse']:.3f}, of the mean {reached['mean_mse']:.3f}"
    )
    reported = load_physionet2012(options.report)
    stays = build_triplets(reported.events, PHYSIONET2012)
    for alpha in options.alphas:
        report = evaluate_stays(load_stay_forecaster(folder, alpha=alpha), stays, seed=options.seed)
        print(f"\n{report.to_markdown()}", end="")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
