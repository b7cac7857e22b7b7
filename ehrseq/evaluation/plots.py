"""The plots of a report: how scores rank, how far they are risks, what acting on them would bring, for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from ehrseq._html import COLOURS, GUIDE, figure
from ehrseq.evaluation.calibration import CalibrationCurve, calibration_curve
from ehrseq.evaluation.decisions import AlertBurden, alerts_at, decision_curve
from ehrseq.evaluation.metrics import FloatArray
from ehrseq.evaluation.subgroups import Subgroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "roc": ("ROC", "1 - specificity", "sensitivity"),
    "recall": ("Precision and recall", "recall (sensitivity)", "precision"),
    "calibration": ("Calibration", "predicted risk", "observed share"),
    "decisions": ("Decision curve", "threshold of treatment", "net benefit per row"),
}
_GUIDE: dict[str, Any] = {"color": GUIDE, "lw": 0.9, "ls": ":"}


def risk_curves(
    labels: NDArray[np.bool_],
    scores: Mapping[str, FloatArray],
    *,
    calibration: CalibrationCurve | None = None,
    threshold: float | None = None,
    remarks: Mapping[str, str] | None = None,
) -> str:
    """ROC, precision and recall, calibration and decision curves of scores of the same rows, as inline SVG.

    Args:
        labels: `[n]` outcomes, both of them among the rows.
        scores: Title -> `[n]` probabilities; a legend names them where there are several.
        calibration: Calibration of the one score, with its intervals; None = made here, without.
        threshold: Threshold of the one score, marked in the curves.
        remarks: Name of `PANELS` -> what its title says beside the name, such as a figure with its interval.
    """
    prevalence = float(labels.mean())

    def draw(axes: Sequence[Axes]) -> None:
        roc, recall, calibrated, decisions = axes
        for colour, (title, values) in zip(COLOURS, scores.items(), strict=False):
            line: dict[str, Any] = {"color": colour, "lw": 1.4, "label": title}
            false_positives, true_positives, _ = roc_curve(labels, values)
            roc.plot(*_thin(false_positives, true_positives), **line)
            precision, sensitivity, _ = precision_recall_curve(labels, values)
            recall.plot(*_thin(sensitivity[:-1], precision[:-1]), **line)  # the last point has no threshold
            curve = calibration_curve(labels, values) if calibration is None else calibration
            calibrated.plot(curve.predicted, curve.observed, marker="o", ms=3, **line)
            if curve.low is not None and curve.high is not None:
                calibrated.vlines(curve.predicted, curve.low, curve.high, color=colour, lw=1)
            decision = decision_curve(labels, values)
            decisions.plot(decision.thresholds, decision.model, **line)
            decisions.plot(decision.thresholds, decision.treat_all, **_GUIDE, label="_")
            if threshold is not None:
                _mark(roc, recall, decisions, alerts_at(labels, values, threshold), prevalence, colour)
        roc.plot([0, 1], [0, 1], **_GUIDE)
        recall.axhline(prevalence, **_GUIDE)
        top = min(1.0, 1.05 * max(calibrated.get_xlim()[1], calibrated.get_ylim()[1]))
        calibrated.plot([0, top], [0, top], **_GUIDE)
        calibrated.set(xlim=(-0.02 * top, top), ylim=(-0.02 * top, top))
        recall.set_ylim(0, 1.03)
        right = min(1.0, 5 * prevalence)
        decisions.axhline(0, **_GUIDE)
        decisions.set(xlim=(0, right), ylim=(-0.25 * prevalence, 1.1 * prevalence))
        _name_guides(roc, recall, calibrated, decisions, prevalence, top, right)
        for axis, (name, (title, x, y)) in zip(axes, PANELS.items(), strict=True):
            remark = (remarks or {}).get(name, "")
            axis.set_title(f"{title}: {remark}" if remark else title, loc="left", fontsize=9, fontweight="bold")
            axis.set(xlabel=x, ylabel=y)
        if len(scores) > 1:
            roc.legend(frameon=False, fontsize=7, loc="lower right")

    return figure(draw, height=7.6, panels=4, columns=2, sharex=False)


def subgroup_forest(groups: Sequence[Subgroup]) -> str:
    """AUROC of each subgroup minus that of the other patients, with its interval, as inline SVG; "" without any."""
    shown = [group for group in groups if "auroc" in group.differences]
    if not shown:
        return ""

    def draw(axes: Sequence[Axes]) -> None:
        axis = axes[0]
        for place, group in enumerate(reversed(shown)):
            interval = group.differences["auroc"]
            axis.plot([interval.low, interval.high], [place, place], color=COLOURS[0], lw=1.2)
            axis.plot(interval.value, place, marker="s", ms=4, color=COLOURS[0])
        names = [f"{group.attribute}: {group.value} ({group.labels:,})" for group in reversed(shown)]
        axis.set_yticks(range(len(shown)), names)
        axis.set_ylim(-0.7, len(shown) - 0.3)
        axis.axvline(0, **_GUIDE)
        axis.set_xlabel("AUROC minus that of the other patients (labels of the subgroup in brackets)")

    return figure(draw, height=0.8 + 0.24 * len(shown))


def few_shot_curves(curves: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> str:
    """AUROC by number of training labels, a panel a task, as inline SVG.

    Args:
        curves: Task -> what is compared -> number of labels -> AUROC of each draw.
    """

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (task, of_task) in zip(axes, curves.items(), strict=True):
            for colour, (name, points) in zip(COLOURS, of_task.items(), strict=False):
                labels = sorted(points)
                values = [points[label] for label in labels]
                axis.fill_between(
                    labels, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0
                )
                axis.plot(
                    labels, [float(np.mean(v)) for v in values], color=colour, marker="o", ms=3, lw=1.4, label=name
                )
            axis.axhline(0.5, **_GUIDE)
            axis.set_xscale("log")
            axis.set_title(task, loc="left", fontsize=9, fontweight="bold")
            axis.set(xlabel="training labels", ylabel="AUROC")
        if any(len(of_task) > 1 for of_task in curves.values()):
            axes[0].legend(frameon=False, fontsize=7, loc="lower right")

    rows = -(-len(curves) // 2)
    return figure(draw, height=0.4 + 2.6 * rows, panels=len(curves), columns=2, sharex=False)


def _mark(roc: Axes, recall: Axes, decisions: Axes, alerts: AlertBurden, prevalence: float, colour: str) -> None:
    """Where the threshold stands on the curves."""
    share, right = alerts.alerts_per_1000 / 1000, alerts.positive_predictive_value
    dot: dict[str, Any] = {"marker": "D", "ms": 5, "color": colour, "ls": "", "markeredgecolor": GUIDE, "zorder": 5}
    if share > 0:
        false_positive_rate = share * (1 - right) / (1 - prevalence)
        roc.plot(false_positive_rate, alerts.sensitivity, **dot, label=f"threshold {alerts.threshold:.3g}")
        recall.plot(alerts.sensitivity, right, **dot)
        roc.legend(frameon=False, fontsize=8, loc="lower right", handles=[roc.lines[-1]])
    decisions.axvline(alerts.threshold, color=colour, lw=0.8, ls="--")


def _name_guides(
    roc: Axes, recall: Axes, calibrated: Axes, decisions: Axes, prevalence: float, top: float, right: float
) -> None:
    """Say beside each dotted line what it is."""
    text: dict[str, Any] = {"color": GUIDE, "fontsize": 8, "textcoords": "offset points"}
    roc.annotate("chance", (0.5, 0.5), (6, -9), **text)
    recall.annotate(f"prevalence {prevalence:.1%}", (0, prevalence), (0, -10), **text)
    calibrated.annotate("perfect", (0.5 * top, 0.5 * top), (-4, 5), ha="right", **text)
    decisions.annotate("treat nobody", (right, 0), (-2, -10), ha="right", **text)
    odds = 1.12 * prevalence / (1 - prevalence)  # where the dotted line is a little below 0
    decisions.annotate("treat everybody", (odds / (1 + odds), -0.12 * prevalence), (5, -3), **text)


def _thin(x: FloatArray, y: FloatArray, points: int = 400) -> tuple[FloatArray, FloatArray]:
    """At most so many points of a curve: a page with every threshold of every row would be megabytes."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), points)).astype(int))
    return x[kept], y[kept]
