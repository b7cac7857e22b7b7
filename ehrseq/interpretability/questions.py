"""One question to a checkpoint, ready to be explained: the row of a patient, a task and a time, and where it comes
from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ehrseq.hub.checkpoints import Checkpoint
from ehrseq.tokenization.ehr_sequence import Event, patient_of_table

if TYPE_CHECKING:
    from ehrseq.batches.scoring import RiskModel
    from ehrseq.modeling.risk_tasks import RiskScoresMixin
    from ehrseq.tokenization.ehr_prefixes import RowPrefixes, SourcedRows
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


@dataclass(frozen=True)
class Question:
    """One patient, one task, one time: one row of the model.

    Attributes:
        checkpoint: The model, in evaluation mode, and its encoder.
        subject_id: The patient's.
        events: The patient's events, in the order given.
        task: Entry of `config.tasks`.
        task_id: Its index there.
        prediction_time: What the row was cut at (microseconds); None where nothing has a time.
        inputs: Channels [1, l] on the model's device, as `forward` takes them; of a stay `static_values` [1, D] too.
        event_of: [l] position in `events` of what made each token (triplet); -1: none did (a task's token, a mark of a
            visit, an interval).
        visit_of: [l] order of each token's visit in the row; 0 = none.
        seen: [events] whether an event is known at that time, takes part and lies in the row's context.
        notes: What was left out or is to be read with care, counted.
        reason: Why the task does not apply (`ehr_anchors.REASONS_AGAINST`), None where it does.
        rows: What the row was cut from.
    """

    checkpoint: Checkpoint
    subject_id: str | int | None
    events: tuple[Event, ...]
    task: Mapping[str, Any]
    task_id: int
    prediction_time: int | None
    inputs: dict[str, Tensor]
    event_of: NDArray[np.int64]
    visit_of: NDArray[np.int64]
    seen: NDArray[np.bool_]
    notes: Counter[str] = field(default_factory=Counter)
    reason: str | None = None
    rows: SourcedRows | None = field(default=None, repr=False)

    @property
    def has_answer(self) -> bool:
        """Whether there is a score to explain: no reason leaves nothing to foretell."""
        unanswerable = getattr(self.checkpoint.encoder, "unanswerable_reasons", ())
        return self.reason is None or self.reason not in unanswerable

    @property
    def prefixes(self) -> RowPrefixes:
        """The steps by which the row came to be."""
        if self.rows is None:
            raise ValueError("this question does not know what its row was cut from; make it by read_question.")
        return self.rows.prefixes(0)

    def log_odds(self, inputs: Mapping[str, Tensor] | None = None, **embeds: Any) -> Tensor:
        """Log-odds of the risk, as the pipeline's score has them.

        Args:
            inputs: Rows in the place of the question's own, any number of them (packed ones too).
            embeds: Further arguments of `forward`, such as `inputs_embeds`.

        Returns:
            [b], or [b, S] for packed rows, at least float32, with gradients where they are on.

        Raises:
            ValueError: The model has another number of classes than two.
        """
        model = self.checkpoint.model
        logits = model(**{**(self.inputs if inputs is None else inputs), **embeds}).logits
        return self.log_odds_of(logits)

    def log_odds_of(self, logits: Tensor) -> Tensor:
        """The same of logits [..., 2] that the model has given."""
        task_ids = torch.full(logits.shape[:-1], self.task_id, dtype=torch.int64, device=logits.device)
        return cast("RiskScoresMixin", self.checkpoint.model).log_odds(logits, task_ids)


def read_question(
    checkpoint: Checkpoint | tuple[Any, Any],
    patient: Any,
    task: str,
    prediction_time: Any = None,
    max_length: int | None = None,
) -> Question:
    """The question that the pipeline asks about a patient.

    Args:
        checkpoint: `load_checkpoint(...)`, or a model and its encoder.
        patient: `{"subject_id", "events": [...], "prediction_time"?}`, a table of one subject, or (models of stays) a
            stay of triplets.
        task: Name of a task of the model.
        prediction_time: Nothing later is read; default: the patient's own, else the last event's.
        max_length: Context length, the model's by default.

    Raises:
        ValueError: An unknown task, a patient that the encoder refuses, a model with another number of classes than
            two.
    """
    checkpoint = Checkpoint(*checkpoint)
    model, encoder = checkpoint
    names = [entry["name"] for entry in model.config.tasks or []]
    if task not in names:
        raise ValueError(f"Unknown task {task!r}: this model was trained for {names}.")
    num_labels = getattr(model.config, "num_labels", 2)
    if num_labels != 2:
        raise ValueError(
            f"this model has {num_labels} classes; what is explained is the risk of class 1 of two (config.num_labels)."
        )
    model.eval()
    patient = patient_of_table(patient)
    context = model.config.max_position_embeddings if max_length is None else max_length
    rows = cast("SourcedRows", encoder.sourced_rows(patient, [task], prediction_time, context))
    task_id = names.index(task)
    entry = (model.config.tasks or [])[task_id]
    reason = None
    if hasattr(encoder, "reasons_against"):
        reason = cast("EhrTokenizer", encoder).reasons_against(patient, [entry], prediction_time)[0]
    channels = rows.row(0)
    event_of = rows.event_of(0)
    return Question(
        checkpoint=checkpoint,
        subject_id=patient.get("subject_id") if isinstance(patient, Mapping) else None,
        events=tuple(rows.events),
        task=entry,
        task_id=task_id,
        prediction_time=rows.prediction_time,
        inputs={name: _as_input(channel, model) for name, channel in channels.items()},
        event_of=event_of,
        visit_of=np.asarray(channels.get("visit_orders", np.zeros(len(event_of), np.int64))),
        seen=rows.known(0),
        notes=Counter(rows.notes),
        reason=reason,
        rows=rows,
    )


def _as_input(channel: Any, model: RiskModel) -> Tensor:
    """[1, l]; numbers as wide as the model computes with."""
    tensor = torch.as_tensor(channel, device=model.device)[None]
    wide = getattr(model, "dtype", torch.float32) == torch.float64
    return tensor.double() if wide and tensor.is_floating_point() else tensor
