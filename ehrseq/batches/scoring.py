"""From a trained model and rows to risks: the one loop behind evaluations, predictions and benchmarks.

    rows = prompted_dataset(tokenizer, events, labels, max_length)
    risks = score_rows(model, tokenizer, rows)              # EhrMamba and the event baselines
    risks = score_stays(model, extractor, table)            # HyMaTE

Both build rows and call `score`, which any other model with `risk_scores` can be given to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ehrseq.batches.collation import DataCollatorForPrompts
from ehrseq.work.progress import progress_bar

if TYPE_CHECKING:
    from ehrseq.encode.rows import PromptedDataset
    from ehrseq.encode.triplets import TripletTable
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

_BATCHES_WITHOUT_BAR = 20  # scored in a moment


class RiskConfig(Protocol):
    """What scoring reads of a model's configuration.

    Attributes:
        model_type: Name of its family.
        tasks: One entry a task: its name, and what the model's card says of it.
        max_position_embeddings: Longest row that the model was trained on; None = any.
    """

    model_type: str
    tasks: list[dict[str, Any]] | None
    max_position_embeddings: int | None


class RiskOutput(Protocol):
    """What a risk model returns."""

    @property
    def logits(self) -> Tensor:
        """Scores of the two classes, [b, 2]."""


@runtime_checkable
class RiskModel(Protocol):
    """A classifier whose class 1 is the positive outcome (`ehrseq.modeling.risk_tasks.RiskScoresMixin`)."""

    @property
    def config(self) -> RiskConfig:
        """Its configuration."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    def eval(self) -> object:
        """Switch dropout off."""

    def __call__(self, **inputs: Tensor) -> RiskOutput:
        """Logits of a batch."""

    def risk_scores(self, logits: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """P(positive) of each row, [b]; `task_ids` are indices in `config.tasks`, [b]."""

    def untrained_weights(self) -> list[str]:
        """Names of weights that the loaded checkpoint lacked."""


class ScoredRows(Protocol):
    """Rows that can be scored."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[n]` length of each row; rows of about one length share a batch."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, row: int, /) -> Mapping[str, Any]:
        """Channels of a row by name."""


Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Makes a batch of rows."""


def score(
    model: RiskModel,
    rows: ScoredRows,
    collate: Collator,
    *,
    task_ids: ArrayLike | None = None,
    batch_size: int = 64,
    unit: str = "row",
    progress: bool = True,
) -> NDArray[np.float64]:
    """P(positive) of every row, in the order of the rows.

    Rows are batched by length, which saves most of the padding.

    Args:
        model: A trained classifier; it is put into evaluation mode.
        rows: Rows; their labels are not looked at.
        collate: Makes a batch of rows.
        task_ids: `[n]` index of each row's task in `config.tasks`; None for a model whose tasks share one risk.
        batch_size: Rows in one forward pass.
        unit: What a row is called in the progress bar.
        progress: Show a progress bar.

    Returns:
        `[n]` probabilities.

    Raises:
        ValueError: `batch_size` is no number of rows, or there is another number of `task_ids` than rows.
    """
    check_batch_size(batch_size)
    tasks = None if task_ids is None else torch.as_tensor(np.asarray(task_ids, np.int64))
    if tasks is not None and tasks.shape != (len(rows),):
        raise ValueError(f"task_ids got shape {list(tasks.shape)}; expected one for each of {len(rows)} rows.")
    order = np.argsort(rows.lengths, kind="stable")
    scores = np.empty(len(order), np.float64)
    hidden = not progress or len(order) < _BATCHES_WITHOUT_BAR * batch_size
    model.eval()
    with torch.inference_mode(), progress_bar(total=len(order), desc="Scoring", unit=unit, disable=hidden) as bar:
        for first in range(0, len(order), batch_size):
            members = order[first : first + batch_size]
            batch = collate([rows[int(row)] for row in members])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items() if name not in _NOT_READ}
            ids = None if tasks is None else tasks[torch.from_numpy(members)].to(model.device)
            if ids is not None:
                batch["task_ids"] = ids
            scores[members] = model.risk_scores(model(**batch).logits, ids).float().cpu().numpy()
            bar.update(len(members))
    return scores


_NOT_READ = frozenset({"labels", "task_ids", "auxiliary_targets"})
"""Columns of a batch that scoring does not hand on: the rows' `task_ids` count tasks as the tokenizer does."""


def check_batch_size(batch_size: object) -> None:
    """Refuse what is no number of rows.

    Raises:
        ValueError: See above.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size got {batch_size!r}; expected a whole number of at least 1.")


def config_task_ids(model: RiskModel, task_names: Sequence[str]) -> NDArray[np.int64]:
    """Index in `config.tasks` of each task of a tokenizer, in the tokenizer's order.

    Raises:
        ValueError: The tokenizer has a task that the model does not know.
    """
    known = [task["name"] for task in model.config.tasks or []]
    unknown = [name for name in task_names if name not in known]
    if unknown:
        raise ValueError(f"the model's config.tasks {known} lack the tokenizer's {unknown}: they belong apart.")
    return np.array([known.index(name) for name in task_names], np.int64)


def score_rows(
    model: RiskModel,
    tokenizer: EhrTokenizer,
    dataset: PromptedDataset,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> NDArray[np.float64]:
    """P(positive) of every prompted row, in the dataset's order.

    Args:
        model: A prompted classifier with `risk_scores`.
        tokenizer: Its tokenizer.
        dataset: Rows.
        batch_size: Rows in one forward pass.
        progress: Show a progress bar.

    Returns:
        `[n]` scores.

    Raises:
        ValueError: The tokenizer has a task that the model does not know, or `batch_size` is no number of rows.
    """
    check_batch_size(batch_size)
    task_ids = config_task_ids(model, tokenizer.tasks)[dataset.task_ids]
    collate = DataCollatorForPrompts(tokenizer)
    return score(model, dataset, collate, task_ids=task_ids, batch_size=batch_size, progress=progress)


def score_stays(
    model: RiskModel,
    extractor: HyMaTEFeatureExtractor,
    table: TripletTable,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> NDArray[np.float64]:
    """P(positive) of every stay, in the table's order.

    Args:
        model: A trained `HyMaTEForSequenceClassification`.
        extractor: Its feature extractor.
        table: Stays; labels are not needed.
        max_length: Triplets read of a stay at most, the most recent ones; None = all.
        batch_size: Stays in one forward pass.
        progress: Show a progress bar.

    Returns:
        `[s]` scores.

    Raises:
        ValueError: `batch_size` is no number of stays, or a stay has no triplet that the extractor knows.
    """
    from ehrseq.batches.triplet_collation import DataCollatorForTriplets
    from ehrseq.batches.triplet_rows import TripletRows

    check_batch_size(batch_size)
    rows = TripletRows(replace(table, labels=None), extractor, max_length=max_length)
    collate = DataCollatorForTriplets(extractor)
    return score(model, rows, collate, batch_size=batch_size, unit="stay", progress=progress)
