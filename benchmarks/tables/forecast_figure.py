"""The figure of forecasts: predicted and observed incidence over the days, and by predicted risk at the horizon.

    ehrseq evaluate-forecast --model CHECKPOINT --data DATASET --horizon 365d --out runs/forecasts
    python -m benchmarks.tables.forecast_figure runs/forecasts/results.json docs/img/forecast.png

A row an outcome (all predictions of it), from the numbers that the command wrote.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ehrseq.evaluation import Interval
from ehrseq.forecasting.evaluation_page import draw_incidence
from ehrseq.forecasting.incidence_calibration import IncidenceCalibration, IncidenceGroup


def read_calibrations(file: Path) -> list[IncidenceCalibration]:
    """The calibrations of all predictions that `ehrseq evaluate-forecast` wrote.

    Raises:
        SystemExit: There are none.
    """
    told = json.loads(file.read_text(encoding="utf-8"))
    found = [_read(each) for each in told.get("incidence", []) if each["part"] == "all" and each["events"]]
    if not found:
        raise SystemExit(f"{file} holds no incidence of an outcome; run `ehrseq evaluate-forecast` with trajectories.")
    return found


def _read(told: dict[str, Any]) -> IncidenceCalibration:
    def known(values: list[float | None]) -> tuple[float, ...]:
        return tuple(math.nan if value is None else value for value in values)

    def group(each: dict[str, Any]) -> IncidenceGroup:
        rest = {name: known(each[name]) for name in ("predicted", "observed", "low", "high")}
        return IncidenceGroup(rows=each["rows"], **rest)

    difference = tuple(Interval(*known([each["value"], each["low"], each["high"]])) for each in told["difference"])
    return IncidenceCalibration(
        **{
            **told,
            "grid_days": tuple(told["grid_days"]),
            "everybody": group(told["everybody"]),
            "difference": difference,
            "groups": tuple(map(group, told["groups"])),
            "worst_group": math.nan if told["worst_group"] is None else told["worst_group"],
        }
    )


def draw(found: list[IncidenceCalibration], file: Path) -> None:
    """Write the figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "svg.hashsalt": "ehrseq"}):
        canvas = Figure(figsize=(9, 2.9 * len(found)), layout="constrained")
        axes = canvas.subplots(len(found), 2, squeeze=False)
        for (left, right), each in zip(axes, found, strict=True):
            draw_incidence(left, right, each)
            for axis in (left, right):
                axis.spines[["top", "right"]].set_visible(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(file, dpi=140, metadata={"Software": None} if file.suffix == ".png" else {"Date": None})


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of `ehrseq evaluate-forecast`")
    parser.add_argument("figure", type=Path, help="file to write, .png or .svg")
    options = parser.parse_args()
    if not options.results.is_file():
        raise SystemExit(f"{options.results} is not there; run `ehrseq evaluate-forecast` first.")
    draw(read_calibrations(options.results), options.figure)
    print(f"Written to {options.figure}")


if __name__ == "__main__":
    main()
