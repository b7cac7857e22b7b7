"""Scores of drugs from a model: of a straight line through its vectors, or of the futures that it draws.

The line works for every model of the package. It is one logistic regression a drug, all fitted at once, with an L2
penalty that the tuning visits choose. The futures are those of a pretrained EhrMamba: trajectories of the visit that
has just begun, up to its end; a drug's score is the estimated probability that it is given before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from ehrseq.forecasting.medications import MedicationQuestions
from ehrseq.modeling.ehr_trajectories import ForecastPrompt, OutcomeTokens, TrajectoryRequest
from ehrseq.tokenization.ehr_outcomes import death_ids
from ehrseq.tokenization.ehr_vocabulary import TYPE_MEDICATION, VE

if TYPE_CHECKING:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

LINE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths of the L2 penalty (C), on standardised columns, as scikit-learn counts them."""
_DEFAULT = 1e-2
_HORIZON_DAYS = 366.0


def line_scores(
    questions: MedicationQuestions, vectors: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.float64], float]:
    """Probabilities of a logistic regression a drug.

    Args:
        questions: The visits; fitted on those that are learnt from, penalty chosen on those of "tuning".
        vectors: `[n, d]`, NaN rows where a question has none.

    Returns:
        `[n, c]` probabilities (NaN where there is no vector), and the penalty C.

    Raises:
        ValueError: Vectors of another number of questions, or none of a training visit.
    """
    if len(vectors) != len(questions.given):
        raise ValueError(f"vectors got {len(vectors)} rows; expected one for each of {len(questions.given)} questions.")
    has = np.isfinite(vectors).all(1)
    train = questions.learnt
    train, tuning = train[has[train]], questions.rows("tuning")
    tuning = tuning[has[tuning]]
    if not len(train):
        raise ValueError("no training visit has a vector; the line cannot be fitted.")
    mean, spread = vectors[train].mean(0), vectors[train].std(0)
    scaled = torch.from_numpy(((vectors - mean) / np.where(spread > 0, spread, 1.0)).astype(np.float64))
    given = torch.from_numpy(questions.given.astype(np.float64))
    weights, best = None, None
    lowest, chosen = np.inf, _DEFAULT
    for penalty in LINE_PENALTIES if len(tuning) else (_DEFAULT,):
        weights = _fit_lines(scaled[train], given[train], penalty, weights)
        loss = _loss(scaled[tuning] @ weights[1:] + weights[0], given[tuning]) if len(tuning) else 0.0
        if loss >= lowest:
            break  # the loss falls, then rises with ever weaker penalties
        best, lowest, chosen = weights, loss, penalty
    if best is None:
        raise ValueError("the regressions give no finite probabilities; are the vectors finite?")
    scores = torch.sigmoid(scaled @ best[1:] + best[0]).numpy()
    scores[~has] = np.nan
    return scores, chosen


def _fit_lines(x: Tensor, y: Tensor, penalty: float, start: Tensor | None) -> Tensor:
    """Weights [1 + d, c] of all regressions: the sum of losses over visits + |w|^2 / (2 C), as scikit-learn's.

    Args:
        x: Standardised vectors, [n, d].
        y: What was given, [n, c].
        penalty: C.
        start: Weights of a stronger penalty to begin with; None: no slope, the shares as they are.
    """
    if start is None:
        share = y.mean(0).clamp(0.5 / len(y), 1 - 0.5 / len(y))
        start = torch.zeros(1 + x.shape[1], y.shape[1], dtype=torch.float64)
        start[0] = torch.log(share / (1 - share))
    weights = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe")
    scale = 1 / y.numel()

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[1:] + weights[0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        whole = scale * (loss + (weights[1:] ** 2).sum() / (2 * penalty))
        torch.autograd.backward(whole)
        return whole

    optimizer.step(closure)
    return weights.detach()


def _loss(logits: Tensor, truth: Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, truth))


def trajectory_scores(
    model: Any,
    tokenizer: EhrTokenizer,
    questions: MedicationQuestions,
    records: pl.DataFrame,
    *,
    num: int = 32,
    estimator: str = "scope",
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """Estimated probabilities that drugs are given before the visit ends.

    Args:
        model: `EhrMambaForCausalLM`.
        tokenizer: Its tokenizer.
        questions: The visits.
        records: `question_records` of them: each ends where the visit has begun.
        num: Trajectories a visit.
        estimator: "monte_carlo" or "scope" (sharper for rare drugs, see `PatientTrajectories.incidence`).
        seed: Of the trajectories.
        rows: Questions that are asked; None = all.

    Returns:
        `[n, c]`; NaN where a question was not asked, has no record, or its visit is not open at the record's end. A
        drug that the vocabulary lacks, or holds only as its parent, scores 0.

    Raises:
        ValueError: An estimator that needs a pool for each drug, or no drug that the vocabulary holds.
    """
    if estimator not in ("monte_carlo", "scope"):
        raise ValueError(f"estimator got {estimator!r}; expected monte_carlo or scope: reach draws anew for each drug.")
    outcomes, drug_of = drug_outcomes(tokenizer, questions.codes)
    if not outcomes:
        raise ValueError("the vocabulary holds none of the drugs; was the tokenizer fitted on this dataset?")
    token_ids = tokenizer.vocabulary.token_ids
    request = TrajectoryRequest(
        horizon_days=_HORIZON_DAYS,
        num=num,
        seed=seed,
        outcomes=outcomes,
        estimator=estimator,  # type: ignore[arg-type]
        death_ids=death_ids(tokenizer.vocabulary),
        until_ids=(token_ids[VE],),
        stop_at_outcomes=False,
    )
    wanted = np.arange(len(questions.given)) if rows is None else np.asarray(rows, np.int64)
    asked: list[int] = []
    scores = np.full(questions.given.shape, np.nan)
    here = records.filter(pl.col("subject_id").is_in(wanted.tolist()))
    if here.is_empty():
        return scores
    drawn = model.trajectories(_prompts(tokenizer, here, model.config.max_position_embeddings, asked), request)
    for number, trajectories in enumerate(drawn):
        row = asked[number]
        scores[row] = 0.0
        scores[row, drug_of] = trajectories.incidence[:, :, -1].mean(0)
    return scores


def drug_outcomes(tokenizer: EhrTokenizer, codes: Sequence[str]) -> tuple[tuple[OutcomeTokens, ...], list[int]]:
    """The tokens of each drug that the vocabulary holds, its doses' bins among them, and which drug each is."""
    vocabulary = tokenizer.vocabulary
    types = np.asarray(tokenizer.token_types)
    tokens: dict[str, list[int]] = {code: [] for code in codes}
    for code in codes:
        ids = {token for token, how in [vocabulary.code_id(code)] if how == "exact"}
        for unit in vocabulary.value_bins.get(code, {}):
            bins = vocabulary.bins(code, unit)
            ids |= {token for token in (bins.ids if bins is not None else []) if token is not None}
        tokens[code] = sorted(token for token in ids if types[token] == TYPE_MEDICATION)
    held = [number for number, code in enumerate(codes) if tokens[code]]
    return tuple(OutcomeTokens(codes[number], np.asarray(tokens[codes[number]], np.int64)) for number in held), held


def _prompts(
    tokenizer: EhrTokenizer, records: pl.DataFrame, max_length: int, asked: list[int]
) -> Iterator[ForecastPrompt]:
    """The records as prompts; `asked` collects their questions. Visits that are not open at the end are left out."""
    histories = tokenizer.encode_histories(records)
    plan = histories.plan_histories(max_length)
    for row in _open_rows(histories):
        asked.append(int(histories.subject_ids[row]))
        inputs = {name: torch.from_numpy(channel)[None] for name, channel in histories.row(plan, row).items()}
        yield ForecastPrompt(inputs, 0.0, int(histories.subject_ids[row]))


def _open_rows(histories: Any) -> Iterable[int]:
    for row in range(len(histories)):
        stop = int(histories.row_offsets[row + 1])
        if stop > int(histories.row_offsets[row]) and bool(histories.row_open[stop - 1]):
            yield row
