"""The plots of the report: how the systems rank, how far their scores are risks, what acting on them would bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from ehrseq._html import COLOURS, figure
from ehrseq.benchmark.results import TaskScores
from ehrseq.benchmark.systems import SYSTEMS
from ehrseq.evaluation import Subgroup, calibration_curve, decision_curve


def task_curves(scores: TaskScores) -> str:
    """ROC, precision and recall, calibration, decision curve of every system, as inline SVG."""
    truth = scores.rows["label"].to_numpy()

    def draw(axes: Sequence[Any]) -> None:
        roc, recall, calibration, decisions = axes
        for colour, (name, by_seed) in zip(COLOURS, scores.scores.items(), strict=False):
            line: dict[str, Any] = {"color": colour, "lw": 1.2, "label": SYSTEMS[name].title}
            mean = by_seed.mean(axis=0)
            share_false, share_true, _ = roc_curve(truth, mean)
            roc.plot(*_thin(share_false, share_true), **line)
            precision, found, _ = precision_recall_curve(truth, mean)
            recall.plot(*_thin(found, precision), **line)
            curve = calibration_curve(truth, mean)
            calibration.plot(curve.predicted, curve.observed, marker="o", ms=2.5, **line)
            decision = decision_curve(truth, mean)
            decisions.plot(decision.thresholds, decision.model, **line)
        prevalence = float(truth.mean())
        roc.plot([0, 1], [0, 1], color="#9aa5b1", lw=0.8, ls=":")
        recall.axhline(prevalence, color="#9aa5b1", lw=0.8, ls=":")
        top = max(calibration.get_xlim()[1], calibration.get_ylim()[1])
        calibration.plot([0, top], [0, top], color="#9aa5b1", lw=0.8, ls=":")
        decisions.plot(decision.thresholds, decision.treat_all, color="#9aa5b1", lw=0.8, ls=":", label="treat all")
        decisions.set_xlim(0, min(1.0, 5 * prevalence))
        decisions.set_ylim(-0.25 * prevalence, 1.1 * prevalence)
        words = (
            ("ROC", "1 - specificity", "sensitivity"),
            ("Precision and recall", "recall", "precision"),
            ("Calibration", "predicted risk", "observed share"),
            ("Decision curve", "threshold", "net benefit"),
        )
        for axis, (title, x, y) in zip(axes, words, strict=True):
            axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
            axis.set_xlabel(x)
            axis.set_ylabel(y)
        roc.legend(frameon=False, fontsize=7, loc="lower right")

    return figure(draw, height=6.6, panels=4, columns=2, sharex=False)


def subgroup_forest(groups: Sequence[Subgroup]) -> str:
    """AUROC of each subgroup minus that of the other patients, with its interval, as inline SVG; "" without any."""
    shown = [group for group in groups if "auroc" in group.differences]
    if not shown:
        return ""

    def draw(axes: Sequence[Any]) -> None:
        axis = axes[0]
        for place, group in enumerate(reversed(shown)):
            interval = group.differences["auroc"]
            axis.plot([interval.low, interval.high], [place, place], color=COLOURS[0], lw=1.2)
            axis.plot(interval.value, place, marker="s", ms=4, color=COLOURS[0])
        names = [f"{group.attribute}: {group.value} ({group.labels:,})" for group in reversed(shown)]
        axis.set_yticks(range(len(shown)), names)
        axis.axvline(0, color="#9aa5b1", lw=0.8, ls=":")
        axis.set_xlabel("AUROC minus that of the other patients")

    return figure(draw, height=0.8 + 0.24 * len(shown))


def _thin(x: Any, y: Any, points: int = 400) -> tuple[Any, Any]:
    """At most so many points of a curve: a page with every threshold of every row would be megabytes."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), points)).astype(int))
    return x[kept], y[kept]
