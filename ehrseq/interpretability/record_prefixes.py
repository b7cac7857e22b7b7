"""Prefix deltas: how the log-odds of the risk move with every event of the record.

    delta_k = F_k - F_(k-1)

F_k is the log-odds that the model gives for the same record as far as event k, asked at that event's time, and F_0 that
of the record without timed events (its static facts and the birth): the sum is F - F_0 exactly. Of EhrMamba all F_k
come of one pass (`ehrmamba_branches.py`); of the other families each is a row of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ehrseq.interpretability.explanation import Attribution, Explanation, Places
from ehrseq.tokenization.ehr_rows import NO_TIME
from ehrseq.tokenization.ehr_sequence import EPOCH

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ehrseq.interpretability.questions import Question
    from ehrseq.modeling.risk_tasks import RiskScoresMixin
    from ehrseq.tokenization.ehr_prefixes import RowPrefixes

RECORD_BASELINE = "the record without timed events: static facts and birth alone"
STAY_BASELINE = "the stay's first triplet and its static values"


def prefix_deltas(question: Question, by: str = "event") -> Explanation:
    """The change of the log-odds with each event, visit, day or hour.

    A delta is what the model made of an event given what came before it, not what the risk would be without it: the
    same laboratory value says less the second time. A row of the table is an event that takes part, those without a
    token of their own too (a visit's start and end), or a group of them; where the question is asked later than the
    last event, a last row of kind "time" is the time that passes. Stays of triplets have none for their first triplet,
    which is part of the baseline, since the model reads no stay without one.

    A row that is cut to the model's context begins at the same token in every prefix: what lies before is not seen.

    Args:
        question: What is explained.
        by: "event"; "visit", "day" or "hour", whose last events alone are asked.

    Raises:
        ValueError: Another `by`, or "visit" of stays.
    """
    settings = {"by": by}
    name = STAY_BASELINE if "input_ids" not in question.inputs else RECORD_BASELINE
    prefixes = question.prefixes.by(by)
    if not question.has_answer:
        return Explanation.of(question, None, method="prefix_deltas", baseline_name=name, settings=settings)
    log_odds = prefix_log_odds(question, prefixes)
    return Explanation.of(
        question,
        Attribution(np.diff(log_odds), float(log_odds[-1]), float(log_odds[0])),
        method="prefix_deltas",
        baseline_name=name,
        settings=settings,
        places=_places(prefixes, by),
        score_after=1 / (1 + np.exp(-log_odds[1:])),
    )


def prefix_log_odds(question: Question, prefixes: RowPrefixes) -> NDArray[np.float64]:
    """Log-odds after each prefix, [k]."""
    model = cast("RiskScoresMixin", question.checkpoint.model)
    device = next(iter(question.inputs.values())).device
    ends, tail_lengths = (torch.from_numpy(array).to(device) for array in (prefixes.ends, prefixes.tail_lengths))
    tails = {name: torch.from_numpy(tail).to(device) for name, tail in prefixes.tails.items()}
    logits = model.prefix_logits(question.inputs, ends, tails, tail_lengths)
    array: NDArray[np.float64] = question.log_odds_of(logits).double().cpu().numpy()
    return array


def _places(prefixes: RowPrefixes, by: str) -> Places:
    """What each delta belongs to: all prefixes but the baseline."""
    passage = prefixes.is_passage[1:]
    times = prefixes.times[1:] if prefixes.dated else np.full(len(prefixes) - 1, NO_TIME)
    kinds = ["time" if passes else by for passes in passage.tolist()]
    if by == "event":
        times = np.where(passage, times, NO_TIME)  # an event has its own
        return Places(prefixes.tokens[1:], prefixes.sources[1:], prefixes.visits[1:], times, kinds)
    names = []
    for passes, visit, time in zip(passage.tolist(), prefixes.visits[1:].tolist(), times.tolist(), strict=True):
        moment = np.datetime64(EPOCH, "us") + np.timedelta64(time, "us")
        unit = {"day": "D", "hour": "h"}.get(by, "us")
        span = f"visit {visit}" if by == "visit" else str(moment.astype(f"datetime64[{unit}]"))
        names.append("time since the last event" if passes else span)
    nothing = np.full(len(names), -1)
    visits = np.where(passage, 0, prefixes.visits[1:]) if by == "visit" else np.zeros(len(names), np.int64)
    return Places(nothing, nothing, visits, times, kinds, names)
