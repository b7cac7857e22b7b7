"""Rows of multitask prompted finetuning (MPF) that share one history: every task asked at every prediction time in it.

An MPF row is a whole history that is read for a single label. One patient's labels, several tasks at each of several
prediction times, have nearly all of their history in common; here it is read once, and the prompts stand inside it:

    [CLS] statics  ...first stay...  [VE] [MOR_1M] [REA_1M] [C0]  ...second stay...  [VE] [REA_1M] [MOR_1M] [C0]

A prompt is the end of its MPF row, token by token ([VE] of a closed visit, then the task with the time and age of the
prediction), and what stands before it is what was known then: nothing of the future reaches it, since the models are
causal. On the simulator's patients a label costs 30 tokens in place of 95, and small models learn several times more
from an hour. Two things differ from an MPF row: [CLS] stands in front, where the task token would be, and a model sees
earlier prompts. Ordinary MPF rows at the end of training make it used to their form:

    Trainer(
        model=ClassifierOfPrompts(classifier),  # ehrseq.training.trainer
        train_dataset=SharedPromptDataset(histories, index, max_length=256),
        data_collator=DataCollatorForSharedPrompts(tokenizer),
        ...
    )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ehrseq.batches.packing import pack_channels, pack_lengths
from ehrseq.encode.patients import EncodedPatients, KnownIndex
from ehrseq.encode.rows import HistoryWindows, PromptedDataset
from ehrseq.modeling.risk_tasks import IGNORED_LABEL

if TYPE_CHECKING:
    from ehrseq.tokenization.ehr_histories import EncodedHistories
    from ehrseq.tokenization.ehr_plans import PromptIndex


class SharedPromptDataset(Dataset[dict[str, Any]]):
    """Histories with the prompts of all their labels, assembled when they are asked for.

    A history that exceeds `max_length` is read in several windows. Each ends at a prediction time; the labels too near
    to a cut start are those of the window before, so that every label is in one window, with enough history.

    Args:
        histories: `tokenizer.encode_histories(events)`.
        index: `histories.index_labels({task: labels})`, or a `subset` of it.
        max_length: Tokens of a window without its inner prompts: an MPF row of this context is the window's frame.
        min_history: Tokens of history that a label has at least, where its patient has as many. Below `max_length`.
        seed: Seed of the order of the tasks within each prompt.

    Each item holds the channels and `labels` `[l]`: 0 or 1 at the task tokens, -100 elsewhere.

    Raises:
        ValueError: A context without room, or `min_history` that leaves none.
    """

    def __init__(
        self,
        histories: EncodedHistories,
        index: PromptIndex,
        max_length: int,
        *,
        min_history: int | None = None,
        seed: int | tuple[int, int] = 0,
    ) -> None:
        least = round(0.4 * max_length) if min_history is None else min_history
        if not 0 <= least < max_length:
            raise ValueError(f"min_history must lie between 0 and max_length - 1 = {max_length - 1}, got {least}.")
        self.index = index
        plan = histories.plan_prompts(index, max_length)
        # 1. Labels of one patient side by side, in the order of time, tasks in random order.
        shuffled = np.random.default_rng(seed).permutation(len(index))
        order = shuffled[np.lexsort((index.prediction_time[shuffled], index.history[shuffled]))]
        # 2. Windows, from the last label backwards.
        self._labels: list[NDArray[np.int64]] = []
        for of_patient in np.split(order, np.flatnonzero(np.diff(index.history[order])) + 1) if len(order) else []:
            windows = []
            while len(of_patient):
                last = of_patient[-1]
                start = int(plan.start[last])
                near = int(np.searchsorted(index.end[of_patient], start + least)) if start > 0 else 0
                # The label that the window is made for is in it, whatever its history.
                near = min(near, int(np.searchsorted(index.prediction_time[of_patient], index.prediction_time[last])))
                windows.append(of_patient[near:])
                of_patient = of_patient[:near]
            self._labels += reversed(windows)
        # 3. Each label's MPF row, cut where its window is.
        labels = np.concatenate(self._labels) if self._labels else np.empty(0, np.int64)
        sizes = np.array([len(of_window) for of_window in self._labels], np.int64)
        frame = np.repeat(np.array([of_window[-1] for of_window in self._labels], np.int64), sizes)
        cut = {name: getattr(plan, name)[frame] for name in ("statics", "start", "vs_at", "shift")}
        first_id = np.full(len(labels), histories.vocabulary.token_ids["[CLS]"])
        self._plan = replace(plan.subset(labels), first_id=first_id, **cut)
        self._rows = HistoryWindows(histories, self._plan)
        self._first = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, window: int) -> dict[str, Any]:
        if not -len(self) <= window < len(self):
            raise IndexError(f"window {window} is outside 0..{len(self) - 1}")
        window %= len(self)
        of_window, first = self._labels[window], int(self._first[window])
        times = self.index.prediction_time[of_window]
        pieces: list[dict[str, NDArray[Any]]] = []
        labels: list[NDArray[np.int64]] = []
        read = 0
        for group in np.split(np.arange(len(of_window)), np.flatnonzero(np.diff(times)) + 1):
            # 1. The MPF row of this time: its history as far as it is new, then its end, the task token once a task.
            row = self._rows[first + int(group[0])]
            length = len(row["input_ids"])
            known = length - int(self._plan.tail[first + int(group[0])])
            places = np.concatenate([np.arange(read, length - 1), np.full(len(group), length - 1)])
            piece = {name: values[places] for name, values in row.items()}
            piece["input_ids"][-len(group) :] = self._plan.last_id[first + group]
            pieces.append(piece)
            # 2. Labels at the task tokens.
            targets = np.full(len(places), IGNORED_LABEL)
            targets[-len(group) :] = self.index.label[of_window[group]]
            labels.append(targets)
            read = known
        item: dict[str, Any] = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        item["labels"] = np.concatenate(labels)
        return item

    @property
    def num_labels(self) -> int:
        """Labels in all windows."""
        return int(self._first[-1])

    @property
    def histories_of_windows(self) -> NDArray[np.int64]:
        """`[windows]` position of each window's patient, ascending."""
        return np.array([self.index.history[of_window[-1]] for of_window in self._labels], np.int64)


class SharedEncodedPrompts(Dataset[dict[str, Any]]):
    """`SharedPromptDataset` of encoded files: only where each window lies is held, a patient is decoded when asked for.

    Args:
        patients: `EncodedDataset.patients(splits)`.
        index: `patients.index_labels({task: labels})`, or a `subset` of it.
        max_length: As of `SharedPromptDataset`.
        seed: Seed of the order of the tasks within each prompt; another order than that of a dataset in memory.
    """

    def __init__(self, patients: EncodedPatients, index: KnownIndex, max_length: int, *, seed: int = 0) -> None:
        self.patients, self.index, self.max_length, self.seed = patients, index, max_length, seed
        # 1. Rows by patient.
        self._order = np.argsort(index.history, kind="stable")
        self._subjects, first = np.unique(index.history[self._order], return_index=True)
        self._rows = np.append(first, len(index))
        # 2. Windows of each patient, counted batch by batch.
        counts = np.zeros(len(self._subjects), np.int64)
        for rows, histories, prompts in patients.prompt_parts(index):
            shared = SharedPromptDataset(histories, prompts, max_length)
            patient_of = np.zeros(len(histories.subject_ids), np.int64)
            patient_of[prompts.history] = np.searchsorted(self._subjects, index.history[rows])
            np.add.at(counts, patient_of[shared.histories_of_windows], 1)
        self._windows = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._windows[-1])

    def __getitem__(self, window: int) -> dict[str, Any]:
        if not -len(self) <= window < len(self):
            raise IndexError(f"window {window} is outside 0..{len(self) - 1}")
        window %= len(self)
        patient = int(np.searchsorted(self._windows, window, side="right")) - 1
        rows = self._order[self._rows[patient] : self._rows[patient + 1]]
        histories, index = self.patients.of_patient(self.index, rows)
        shared = SharedPromptDataset(histories, index, self.max_length, seed=(self.seed, patient))
        return shared[window - int(self._windows[patient])]

    @property
    def num_labels(self) -> int:
        """Labels in all windows."""
        return len(self.index)


def shared_prompts(
    prompts: PromptedDataset, max_length: int, seed: int = 0
) -> SharedPromptDataset | SharedEncodedPrompts:
    """Histories with the prompts of all their labels, of rows in memory or in encoded files."""
    if isinstance(prompts.histories, EncodedPatients) and isinstance(prompts.index, KnownIndex):
        return SharedEncodedPrompts(prompts.histories, prompts.index, max_length, seed=seed)
    return SharedPromptDataset(*prompts.in_memory(), max_length, seed=seed)


@dataclass
class DataCollatorForSharedPrompts:
    """Packs histories with prompts inside into as few rows as hold them.

    Args:
        tokenizer: Gives the channels (`model_input_names`).
        max_length: Tokens of a packed row; at least as many as the longest history of a batch has are always allowed.
    """

    tokenizer: Any
    max_length: int = 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into channels, `segment_ids` and `labels` (-100 = none), all `[b, L]`."""
        lengths = [len(row["input_ids"]) for row in features]
        plan = pack_lengths(lengths, max(self.max_length, *lengths))
        batch = pack_channels(features, [*self.tokenizer.model_input_names, "labels"], plan)
        batch["labels"] = batch["labels"].masked_fill(batch["segment_ids"] == 0, IGNORED_LABEL)
        return batch
