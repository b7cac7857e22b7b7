"""The page of cumulative incidence: what stands on it, that it needs nothing else, and what is refused."""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ehrseq.data.report import ConversionReport
from ehrseq.forecasting.datasets import FORECAST_SCHEMA, INCIDENCE_SCHEMA, ForecastTables
from ehrseq.forecasting.page import write_forecast_page
from ehrseq.forecasting.task_forecast import TaskForecast
from ehrseq.forecasting.trajectory_files import no_trajectories
from ehrseq.modeling.ehr_trajectories import OutcomeTokens
from tests.chromium import Chromium, find_chromium
from tests.pages import read_page

TIME = datetime(2150, 3, 1, 8, 30)


def tables(probabilities: dict[str, list[float | None]], notes: tuple[str, ...] = ()) -> ForecastTables:
    """Forecasts of some patients, whose incidence rises evenly over 30 days."""
    rows, points = [], []
    for name, of_patients in probabilities.items():
        for subject, probability in enumerate(of_patients):
            reason = "died_before_prediction" if probability is None else None
            error = None if probability is None else 0.02
            rows.append((subject, TIME, name, probability, error, 30.0, 32, 0.0, 30.0, reason))
            if probability is not None:
                points += [(subject, TIME, name, day, probability * day / 30, 0.02) for day in (10.0, 20.0, 30.0)]
    asked = tuple(
        TaskForecast(name, 30.0, OutcomeTokens(name, np.asarray([1])), (), (), False, "", notes)
        for name in probabilities
    )
    return ForecastTables(
        pl.DataFrame(rows, schema=FORECAST_SCHEMA, orient="row"),
        pl.DataFrame(points, schema=INCIDENCE_SCHEMA, orient="row"),
        no_trajectories(),
        asked,
        ConversionReport(),
    )


TWO: dict[str, list[float | None]] = {"death<b>": [0.1, 0.3, None, 0.2], "admission": [0.5, 0.4, None, 0.6]}


def test_the_page_stands_for_itself(tmp_path: Path) -> None:
    given = tables(TWO, ("an <approximation>",))
    given.notice = "Mind & beware"
    file = write_forecast_page(given, tmp_path / "page.html")
    source = file.read_text()
    page = read_page(source)
    text = " ".join(page.texts)
    assert "death<b>" in text
    assert "an <approximation>" in text
    assert "Mind & beware" in text
    assert "3 patients, 3 forecasts; 1 without one" in text
    assert "svg" in page.tags
    assert source == write_forecast_page(given, tmp_path / "again.html").read_text()


def test_means_and_errors_by_hand(tmp_path: Path) -> None:
    """Of 10, 20 and 30 %, each +- 2 %: mean 20 %, its error 2 % / sqrt(3)."""
    text = " ".join(read_page(write_forecast_page(tables(TWO), tmp_path / "page.html").read_text()).texts)
    assert "20.0 %" in text
    assert "1.15 %" in text
    assert "30.0 % ± 2.00 %" in text


def test_chosen_patients(tmp_path: Path) -> None:
    many = tables({"death": [number / 100 for number in range(40)]})
    text = " ".join(read_page(write_forecast_page(many, tmp_path / "a.html").read_text()).texts)
    assert "39.0 % ± 2.00 %" in text
    assert "12.0 % ± 2.00 %" not in text
    text = " ".join(read_page(write_forecast_page(many, tmp_path / "b.html", patients=[12]).read_text()).texts)
    assert "12.0 % ± 2.00 %" in text
    assert "39.0 % ± 2.00 %" not in text


@pytest.mark.parametrize(
    ("given", "more", "why"),
    [
        ({"death": [None, None]}, {}, "no forecast to show"),
        (TWO, {"patients": [99]}, "none of the patients"),
    ],
)
def test_what_is_refused(given: Any, more: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        write_forecast_page(tables(given), tmp_path / "page.html", **more)


def test_without_incidence_there_is_nothing_to_draw(tmp_path: Path) -> None:
    bare = tables(TWO)
    bare.incidence = bare.incidence.head(0)
    with pytest.raises(ValueError, match="no cumulative incidence"):
        write_forecast_page(bare, tmp_path / "page.html")


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
def test_a_browser_asks_for_nothing(tmp_path: Path) -> None:
    file = write_forecast_page(tables(TWO), tmp_path / "page.html")
    with Chromium() as browser:
        browser.open(file)
        assert browser.problems == []
        assert [address for address in browser.asked if not address.startswith("file:")] == []
