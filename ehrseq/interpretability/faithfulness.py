"""Whether an explanation says what the model does, and whether what it says is true.

    contributions = event_contributions(explanation, question)
    removal(question, contributions).comprehensiveness            # what the model loses without the top events
    completeness(explanation), sanity(question, method), stability(question, method, seeds)
    agreement(contributions, truth.carries, truth.by_event)       # on simulated patients, whose true risk is known

Comprehensiveness and sufficiency are ERASER's (DeYoung 2020, arXiv:1911.03429), as PyHealth has them: the mean, over
the shares B = 1, 5, 10, 20, 50 % of the events, of

    comprehensiveness   m(x) - m(x without the top share)         the more, the better
    sufficiency         m(x) - m(the top share alone)             the less, the better

with m of the predicted class, for which events are ranked: the largest contributions where a risk is above the
threshold, the most negative ones where it is below. Events are taken out of the record, which is read and asked again
as if they had never been recorded (`occlusion`): nothing stands in their place that a model has never seen. Marks of
visits stay. m is here the log-odds, which contributions are told in; `risk` has the same in probabilities, where the
figures of others are.

What these measures are not: a model that is asked about a record without its most telling events answers about another
patient. An explanation can be faithful to a model that is wrong: only `agreement` asks for the truth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ehrseq.evaluation import auroc
from ehrseq.hub.checkpoints import Checkpoint
from ehrseq.interpretability.counterfactuals import occlusion
from ehrseq.interpretability.explanation import Explanation, kind_finder

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of the events that are taken out, as in ERASER's and PyHealth's tables."""

FloatArray = NDArray[np.float64]
Explainer = Callable[..., Explanation]
"""A method of explanation: a question and its settings -> an explanation."""

_MARKS = ("visit_start", "visit_end")


@dataclass(frozen=True)
class Removal:
    """What a model loses with the events that an explanation names; NaN where a record cannot do without them.

    Attributes:
        comprehensiveness: Mean over the shares, log-odds of the predicted class.
        sufficiency: The same of the top events alone.
        risk_comprehensiveness: Comprehensiveness in probabilities.
        risk_sufficiency: Sufficiency in probabilities.
    """

    comprehensiveness: float
    sufficiency: float
    risk_comprehensiveness: float
    risk_sufficiency: float


@dataclass(frozen=True)
class Agreement:
    """How contributions agree with the truth of a simulated record; NaN where it has nothing to tell apart.

    Attributes:
        auroc: Probability that an event which carries the true risk has a contribution of larger size than one that
            does not.
        spearman: Rank correlation of the contributions with the change of the true risk's log-odds when each event is
            taken out.
    """

    auroc: float
    spearman: float


# -- contributions of events -----------------------------------------------------------------------------------------


def event_contributions(explanation: Explanation, question: Question) -> FloatArray:
    """Contribution of every event of the patient, [events]; 0 of those that have none.

    Raises:
        ValueError: The contributions are of groups.
    """
    table = explanation.contributions
    if table["group"].is_not_null().any() and table["event"].is_null().all():
        raise ValueError(f"{explanation.method} gave contributions of groups; explain by event to measure it.")
    values = np.zeros(len(question.events))
    of_events = table.filter(table["event"].is_not_null())
    np.add.at(values, of_events["event"].to_numpy(), of_events["contribution"].to_numpy())
    return values


def removable_events(question: Question) -> NDArray[np.int64]:
    """Positions of the events that a model reads as a token or triplet of its own, marks of visits left out."""
    read = np.unique(question.event_of[question.event_of >= 0])
    kind_of = kind_finder(question.checkpoint.encoder)
    kept = [place for place in read.tolist() if kind_of(question.events[place].code) not in _MARKS]
    return np.asarray(kept, np.int64)


# -- what the model loses ----------------------------------------------------------------------------------------------


def removal(
    question: Question, contributions: ArrayLike, *, shares: Sequence[float] = SHARES, threshold: float = 0.5
) -> Removal:
    """Comprehensiveness and sufficiency of contributions.

    Args:
        question: What was explained.
        contributions: [events], as of `event_contributions`; a tie is broken by the later event.
        shares: Of the events, each in (0, 1); at least one event is taken out.
        threshold: Risk from which on class 1 is the predicted one.

    Raises:
        ValueError: Another number of contributions than of events, one that is not finite, a share or a threshold
            outside (0, 1).
    """
    values = _checked(contributions, len(question.events))
    for name, numbers in (("shares", shares), ("threshold", [threshold])):
        if not len(numbers) or not all(0 < number < 1 for number in numbers):
            raise ValueError(f"{name} got {numbers}; expected numbers between 0 and 1, such as {list(SHARES)} or 0.5.")
    places = removable_events(question)
    if len(places) == 0 or not question.has_answer:
        return Removal(*[np.nan] * 4)
    with torch.no_grad():
        whole = float(question.log_odds()[0])
    sign = 1.0 if _risk(whole) >= threshold else -1.0
    order = _ranked(places, sign * values)
    groups: dict[str, Sequence[int]] = {}
    for share in shares:
        top = max(1, round(share * len(order)))
        groups[f"top {share}"] = order[:top].tolist()
        if top < len(order):
            groups[f"rest {share}"] = order[top:].tolist()
    table = occlusion(question, groups).contributions
    found = dict(table.select("group", "contribution").iter_rows())
    measures = []
    for kind in ("top", "rest"):
        # Where nothing stands behind the top events, nothing is lost by keeping them alone.
        names = [f"{kind} {share}" for share in shares]
        lost = [found.get(name, np.nan) if name in groups else 0.0 for name in names]
        change = np.asarray(lost, np.float64)
        risks = _risk(whole) - _risk(whole - change)
        measures.append((float(np.mean(sign * change)), float(np.mean(sign * risks))))
    (comprehensive, comprehensive_risk), (sufficient, sufficient_risk) = measures
    return Removal(comprehensive, sufficient, comprehensive_risk, sufficient_risk)


def completeness(explanation: Explanation) -> float:
    """What the contributions leave unexplained, as a share of log-odds less baseline: 0 is complete."""
    whole = explanation.log_odds - explanation.baseline
    return abs(explanation.remainder / whole) if whole else float("nan")


# -- what it hangs on --------------------------------------------------------------------------------------------------


def with_random_weights(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """The same model as if it had never been trained: every weight drawn anew, as its class begins (Adebayo 2018)."""
    model: Any = checkpoint.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(copy.deepcopy(model.config))
    return Checkpoint(fresh.to(device=model.device, dtype=model.dtype).eval(), checkpoint.encoder)


def sanity(question: Question, method: Explainer, seed: int = 0, **settings: Any) -> float:
    """Rank correlation of the sizes of a method's contributions with those of a model of random weights.

    An explanation that stays the same shows the record, not the model (Adebayo 2018, arXiv:1810.03292): the nearer to
    0, the better.
    """
    other = replace(question, checkpoint=with_random_weights(question.checkpoint, seed))
    trained, random = (np.abs(event_contributions(method(q, **settings), q)) for q in (question, other))
    places = removable_events(question)
    return rank_correlation(trained[places], random[places])


def stability(question: Question, method: Explainer, seeds: Sequence[int], **settings: Any) -> float:
    """Mean rank correlation of a method's contributions under pairs of seeds: 1 is the same whatever the seed.

    Raises:
        ValueError: Fewer than two seeds.
    """
    if len(seeds) < 2:
        raise ValueError(f"seeds got {list(seeds)}; expected at least two, which are compared.")
    places = removable_events(question)
    found = [event_contributions(method(question, seed=seed, **settings), question)[places] for seed in seeds]
    pairs = [rank_correlation(found[i], found[j]) for i in range(len(found)) for j in range(i)]
    return float(np.mean(pairs))


# -- against the truth -------------------------------------------------------------------------------------------------


def agreement(contributions: ArrayLike, carries: ArrayLike, changes: ArrayLike | None = None) -> Agreement:
    """How contributions of events agree with what a simulator knows of them.

    Args:
        contributions: [events].
        carries: Bool [events], whether each bears on the true risk.
        changes: [events], change of the true risk's log-odds when it is taken out; None where that is not known.

    Raises:
        ValueError: Lengths that differ, or contributions that are not finite.
    """
    truth = np.asarray(carries, dtype=bool)
    values = _checked(contributions, len(truth))
    both = truth.any() and not truth.all()
    area = float(auroc(truth.astype(np.int64), np.abs(values))) if both else float("nan")
    if changes is None:
        return Agreement(area, float("nan"))
    return Agreement(area, rank_correlation(values, _checked(changes, len(truth))))


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's, ties at their mean rank; NaN where one of them is constant.

    Raises:
        ValueError: Lengths that differ.
    """
    a, b = (_ranks(np.asarray(values, np.float64)) for values in (one, other))
    if a.shape != b.shape:
        raise ValueError(f"got {len(a)} and {len(b)} numbers; expected as many of each.")
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: FloatArray) -> FloatArray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: FloatArray = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _ranked(places: NDArray[np.int64], values: FloatArray) -> NDArray[np.int64]:
    """Places by their values, the largest first, of equal ones the later."""
    latest_first = places[::-1]
    order: NDArray[np.int64] = latest_first[np.argsort(-values[latest_first], kind="stable")]
    return order


def _risk(log_odds: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-np.clip(log_odds, -700, 700)))


def _checked(values: ArrayLike, count: int) -> FloatArray:
    array = np.asarray(values, np.float64)
    if array.shape != (count,) or not np.isfinite(array).all():
        wrong = int((~np.isfinite(array)).sum())
        raise ValueError(
            f"got numbers of shape {list(array.shape)}, {wrong} of them not finite; expected {count} finite ones, one "
            "for each event."
        )
    return array
