"""What a config holds of a checkpoint's forecasts: read back as it was written, refused where it is damaged."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from ehrseq import HyMaTEConfig
from ehrseq.modeling.hymate_intervals import ForecastCalibration

NAN = float("nan")


def content() -> dict[str, Any]:
    """Two windows, three variables: the third was never learnt, and few stays measure the second for the first time."""
    return {
        "variables": ["HR", "Lactate", "Never"],
        "horizons": [120.0, 360.0],
        "first_minute": 720.0,
        "learnt": [[50, 20, 0], [60, 21, 0]],
        "counts": {"new": [[9, 3, 0], [9, 4, 0]], "measured": [[40, 15, 0], [41, 15, 0]]},
        "half_widths": {
            "0.1": {"new": [[9.5, None, None]] * 2, "measured": [[8.0, 1.5, None], [8.5, 2.0, None]]},
            "0.5": {"new": [[4.0, 2.0, None]] * 2, "measured": [[3.0, 0.5, None], [3.5, 1.0, None]]},
        },
        "units": {"HR": "bpm"},
    }


def config(calibration: Any) -> HyMaTEConfig:
    return HyMaTEConfig(num_variables=3, num_static=0, num_horizons=2, forecast_calibration=calibration)


def test_a_config_keeps_it_through_a_file(tmp_path):
    config(content()).save_pretrained(tmp_path)
    again = HyMaTEConfig.from_pretrained(tmp_path).read_calibration()
    assert again.to_dict() == content()
    assert again.alphas == [0.1, 0.5]
    widths = again.at(0.1)
    np.testing.assert_array_equal(widths[0], [[9.5, NAN, NAN], [9.5, NAN, NAN]])
    np.testing.assert_array_equal(widths[1], [[8.0, 1.5, NAN], [8.5, 2.0, NAN]])
    json.dumps(again.to_dict())


def test_a_config_without_it_has_none():
    assert HyMaTEConfig().read_calibration() is None
    assert "forecast_calibration" in HyMaTEConfig().to_dict()


def test_an_alpha_that_nothing_was_fitted_for_is_refused():
    with pytest.raises(ValueError, match=r"alpha got 0.05; .* fitted for \[0.1, 0.5\]"):
        ForecastCalibration.from_dict(content(), 2, 3).at(0.05)


BAD: dict[str, tuple[list[Any], Any, str]] = {
    "variables": (["variables"], ["HR"], "variables got 1 names, expected 3"),
    "a variable twice": (["variables"], ["HR", "HR", "K"], "expected 3 different ones"),
    "horizons": (["horizons"], [120.0], r"horizons got \[120.0\], expected 2"),
    "descending horizons": (["horizons"], [120.0, 60.0], "expected 2 ascending"),
    "no first minute": (["first_minute"], None, "TypeError"),
    "first minute NaN": (["first_minute"], NAN, "first_minute got nan"),
    "counts of another size": (["counts", "new"], [[9, 3, 0]], r"got int64 \[1, 3\], expected numbers \[2, 3\]"),
    "ragged": (["learnt"], [[1, 2, 3], [1, 2]], "ValueError"),
    "counts that are none": (["learnt"], [["a", "b", "c"]] * 2, "ValueError"),
    "a negative count": (["learnt"], [[-1, 2, 3]] * 2, "negative"),
    "a half count": (["learnt"], [[1.5, 2.0, 3.0]] * 2, "ValueError got float64"),
    "a negative width": (["half_widths", "0.1", "new"], [[-1.0, None, None]] * 2, "negative or infinite"),
    "an infinite width": (["half_widths", "0.1", "new"], [[float("inf"), 1.0, None]] * 2, "negative or infinite"),
    "a group is absent": (["half_widths", "0.1"], {"new": [[1.0] * 3] * 2}, "KeyError"),
    "a share that is none": (["half_widths"], {"1.5": content()["half_widths"]["0.1"]}, "expected shares between 0"),
    "an alpha that is no number": (["half_widths"], {"x": content()["half_widths"]["0.1"]}, "ValueError"),
    "a unit of nothing": (["units"], {"K": "mmol/L"}, r"units are of \['K'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_damaged_is_refused_when_the_config_is_loaded(case, tmp_path):
    path, value, message = BAD[case]
    broken = copy.deepcopy(content())
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(Exception, match=message):  # the strict config wraps a ValueError of its own
        config(broken)


@pytest.mark.parametrize("given", [[], "x", {"variables": ["HR"]}])
def test_what_is_no_calibration_is_refused(given):
    with pytest.raises(Exception, match="forecast_calibration"):
        config(given)


def test_another_size_of_the_model_is_refused():
    with pytest.raises(ValueError, match="num_variables=4"):
        HyMaTEConfig(num_variables=4, num_horizons=2, forecast_calibration=content())
