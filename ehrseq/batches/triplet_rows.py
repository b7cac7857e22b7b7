"""Rows of HyMaTE: stays for classification, and forecasting targets drawn anew in each epoch.

    extractor = HyMaTEFeatureExtractor.fit(train)
    rows = TripletRows(train, extractor, max_length=880, variable_dropout=0.2, seed=1)
    forecasts = ForecastRows(train, extractor, seed=1)                 # another time t1 in every epoch
    fixed = ForecastRows(tuning, extractor, epochs=1)                  # the same ones each time

What is random is drawn from (seed, epoch, row) alone: it depends neither on the order of the rows nor on workers, and a
resumed run draws what an uninterrupted one would. Trainer calls `set_epoch` on a single process; with several, add
`EpochOfRows()` to its callbacks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ehrseq.encode.triplets import TripletTable
from ehrseq.tokenization.feature_extraction_hymate import TRUNCATIONS, HyMaTEFeatureExtractor
from ehrseq.tokenization.triplet_stays import choose_triplets

FIRST_MINUTE = 720.0
"""Earliest end of a forecast's input (HyMaTE, section 3.3.1, as in STraTS: 12 hours)."""

HORIZON_MINUTES = 120.0
"""Length of a forecast's target window (as in STraTS: 2 hours)."""


class _Rows(Dataset[dict[str, Any]]):
    """Stays as normalised arrays; subclasses make rows of them.

    Attributes:
        table: The stays, without triplets of variables that the extractor never saw.
        dropped: Number of those.
    """

    def __init__(self, table: TripletTable, extractor: HyMaTEFeatureExtractor, seed: int) -> None:
        if table.spec != extractor.spec:
            raise ValueError(
                "the table and the feature extractor read different triplets; build the table with extractor.spec."
            )
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"seed got {seed!r}; expected an integer of at least 0.")
        self.extractor = extractor
        self.seed = int(seed)
        self.epoch = 0
        fitted = extractor.was_fitted(table.variable_ids)
        self.dropped = int((~fitted).sum())
        self.table = table if fitted.all() else _without(table, fitted)
        self.times = extractor.scale_times(self.table.minutes)
        self.values = extractor.normalise(self.table.variable_ids, self.table.values)
        self.static_values = extractor.normalise_static(self.table.static)

    def __len__(self) -> int:
        return len(self.table)

    def set_epoch(self, epoch: int) -> None:
        """Draw what is random anew."""
        self.epoch = int(epoch)

    @property
    def subject_ids(self) -> NDArray[np.int64]:
        """`[s]` subject of each row (for the bootstrap over patients)."""
        return self.table.subject_ids

    def _place(self, row: int) -> tuple[int, slice]:
        """A stay of the table, counted from 0, and where its triplets lie."""
        if not -len(self.table) <= row < len(self.table):
            raise IndexError(f"row {row} is outside 0..{len(self.table) - 1}")
        row = int(row) % len(self.table)
        return row, slice(int(self.table.offsets[row]), int(self.table.offsets[row + 1]))

    def _rng(self, row: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, row))

    def _channels(self, row: int, positions: NDArray[np.int64] | slice) -> dict[str, Any]:
        return {
            "variable_ids": self.table.variable_ids[positions],
            "times": self.times[positions],
            "values": self.values[positions],
            "static_values": self.static_values[row],
        }


class TripletRows(_Rows):
    """One row a stay, with its label where there is one.

    Each item holds `variable_ids`, `times`, `values` `[n]`, `static_values` `[D]`, and where there are such `labels` (0
    or 1) and `auxiliary_targets` `[A]`.

    Args:
        table: The stays.
        extractor: Fitted feature extractor of the same triplets.
        max_length: Triplets of a row at most; None = all.
        truncation: "recent": the last ones stay; "random": random ones, in order.
        variable_dropout: Share of a stay's variables whose triplets are removed, for training.
        auxiliary_targets: `[s, A]` further outcomes with a number for an answer (length of stay, SOFA), NaN = unknown.
        seed: Of what is random.

    Raises:
        ValueError: The extractor reads other triplets, or an argument is out of range.
    """

    def __init__(
        self,
        table: TripletTable,
        extractor: HyMaTEFeatureExtractor,
        *,
        max_length: int | None = None,
        truncation: str = "recent",
        variable_dropout: float = 0.0,
        auxiliary_targets: ArrayLike | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(table, extractor, seed)
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation got {truncation!r}; expected one of {TRUNCATIONS}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length got {max_length}; expected at least 1 triplet, or None.")
        if not 0 <= variable_dropout < 1:
            raise ValueError(f"variable_dropout got {variable_dropout}; expected a probability from 0 to below 1.")
        self.max_length = max_length
        self.truncation = truncation
        self.variable_dropout = variable_dropout
        self.auxiliary_targets = None if auxiliary_targets is None else np.asarray(auxiliary_targets, np.float32)
        if self.auxiliary_targets is not None and (
            self.auxiliary_targets.ndim != 2 or len(self.auxiliary_targets) != len(table)
        ):
            raise ValueError(
                f"auxiliary_targets got shape {list(self.auxiliary_targets.shape)}; expected [{len(table)}, outcomes]."
            )

    def __getitem__(self, row: int) -> dict[str, Any]:
        row, place = self._place(row)
        kept: Any = place
        if self.variable_dropout or (self.max_length is not None and place.stop - place.start > self.max_length):
            rng = self._rng(row, self.epoch) if self.variable_dropout or self.truncation == "random" else None
            ids = self.table.variable_ids[place]
            kept = place.start + choose_triplets(ids, self.max_length, self.truncation, self.variable_dropout, rng)
        item = self._channels(row, kept)
        if self.table.labels is not None:
            item["labels"] = int(self.table.labels[row])
        if self.auxiliary_targets is not None:
            item["auxiliary_targets"] = self.auxiliary_targets[row]
        return item

    @property
    def labels(self) -> NDArray[np.int64]:
        """`[s]` labels.

        Raises:
            ValueError: There are none.
        """
        if self.table.labels is None:
            raise ValueError("these stays have no labels; build the table with build_triplets(events, spec, labels).")
        return self.table.labels

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[s]` triplets of each row at most (before variable dropout)."""
        return np.minimum(self.table.lengths, self.max_length or np.iinfo(np.int64).max)


class ForecastRows(_Rows):
    """Forecasting: the triplets up to a time t1 as input, the first value of each variable soon after it as target.

    t1 is drawn uniformly from the stay's observed minutes >= `first_minute` but for the last one, so that something
    follows (the final observation may be a target: STraTS' code drops it by an off-by-one). Stays without such a minute
    make no row; `skipped` counts them.

    Each item holds the channels up to t1, `labels` `[H * V]` (z-scores, horizon-major: one block of V a horizon) and
    `label_mask` `[H * V]` (1 = observed). A target may be empty (nothing within the horizon); the loss leaves it out.

    Args:
        table: The stays.
        extractor: Fitted feature extractor of the same triplets.
        horizons: Ends of the target windows in minutes after t1, ascending; the first window begins at t1, each further
            one where the one before ends. The paper has one, 120.
        first_minute: Earliest t1 in minutes after the window's start.
        max_length: Triplets of the input at most, the most recent ones.
        epochs: None: `set_epoch` draws another t1. A number n: rows are repeated n times with a fixed t1 each, for
            validation.
        seed: Of the times t1.

    Raises:
        ValueError: The extractor reads other triplets, an argument is out of range, or no stay is long enough.
    """

    def __init__(
        self,
        table: TripletTable,
        extractor: HyMaTEFeatureExtractor,
        *,
        horizons: tuple[float, ...] = (HORIZON_MINUTES,),
        first_minute: float = FIRST_MINUTE,
        max_length: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(table, extractor, seed)
        ends = tuple(float(end) for end in horizons)
        if not ends or any(b <= a for a, b in zip((0.0, *ends[:-1]), ends, strict=True)):
            raise ValueError(f"horizons got {horizons!r}; expected ascending minutes above 0.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length got {max_length}; expected at least 1 triplet, or None.")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs got {epochs}; expected at least 1, or None to draw anew in each epoch.")
        self.horizons = ends
        self.first_minute = first_minute
        self.max_length = max_length
        self.epochs = epochs
        minutes, lengths = self.table.minutes, self.table.lengths
        last = minutes[np.maximum(self.table.offsets[1:] - 1, 0)] if len(minutes) else np.zeros(len(self.table))
        may_end = (minutes >= first_minute) & (minutes < np.repeat(last, lengths))
        self.stays = np.flatnonzero(np.bincount(self.table.stay_ids[may_end], minlength=len(self.table)))
        self.skipped = len(self.table) - len(self.stays)
        if not len(self.stays):
            raise ValueError(
                f"none of {len(self.table)} stays is observed at or after minute {first_minute:g} and again later; "
                "lower first_minute."
            )

    def __len__(self) -> int:
        return len(self.stays) * (self.epochs or 1)

    def last_minute_of_input(self, row: int) -> float:
        """The time t1 of a row in this epoch, minutes."""
        row = int(row) % len(self)
        epoch = self.epoch if self.epochs is None else row // len(self.stays)
        stay = int(self.stays[row % len(self.stays)])
        minutes = self.table.minutes[self.table.offsets[stay] : self.table.offsets[stay + 1]]
        return float(self._rng(stay, epoch).choice(self._times(minutes)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}")
        row = int(row) % len(self)
        t1 = self.last_minute_of_input(row)
        stay, place = self._place(int(self.stays[row % len(self.stays)]))
        minutes = self.table.minutes[place]
        end = place.start + int(np.searchsorted(minutes, t1, side="right"))
        start = place.start if self.max_length is None else max(place.start, end - self.max_length)
        targets = self._targets(place, minutes, t1)
        observed = targets >= 0
        return {
            **self._channels(stay, slice(start, end)),
            "labels": np.where(observed, self.values[targets], np.float32(0)).ravel(),
            "label_mask": observed.astype(np.float32).ravel(),
        }

    def targets(self, row: int) -> NDArray[np.float64]:
        """What a row's forecast is compared with, as measured (not clipped), [H, V]; NaN where nothing is."""
        _, place = self._place(int(self.stays[int(row) % len(self) % len(self.stays)]))
        targets = self._targets(place, self.table.minutes[place], self.last_minute_of_input(row))
        return np.where(targets >= 0, self.table.values[targets], np.nan)

    def _targets(self, place: slice, minutes: NDArray[np.float64], t1: float) -> NDArray[np.int64]:
        """Triplet of the table that is the target, [H, V]; -1 where none is."""
        targets = np.full((len(self.horizons), self.extractor.num_variables), -1, np.int64)
        after = t1
        for number, horizon in enumerate(self.horizons):
            first, last = np.searchsorted(minutes, (after, t1 + horizon), side="right")
            found = np.arange(place.start + first, place.start + last)[::-1]
            # Backwards, the first value of a variable is written last.
            targets[number, self.table.variable_ids[found]] = found
            after = t1 + horizon
        return targets

    def possible_targets(self) -> NDArray[np.int64]:
        """Measurements of each variable that some time t1 could make a target, [H, V].

        A variable with 0 is never forecast in training, in however many epochs.
        """
        counts = np.zeros((len(self.horizons), self.extractor.num_variables), np.int64)
        for stay in self.stays.tolist():
            place = slice(int(self.table.offsets[stay]), int(self.table.offsets[stay + 1]))
            minutes, ids = self.table.minutes[place], self.table.variable_ids[place]
            times = self._times(minutes)
            for number, (after, end) in enumerate(zip((0.0, *self.horizons[:-1]), self.horizons, strict=True)):
                begun, ended = np.searchsorted(times, minutes - end), np.searchsorted(times, minutes - after)
                counts[number] += np.bincount(ids[begun < ended], minlength=counts.shape[1])
        return counts

    def _times(self, minutes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The times t1 that may be drawn in a stay, ascending."""
        array: NDArray[np.float64] = np.unique(minutes[(minutes >= self.first_minute) & (minutes < minutes[-1])])
        return array

    @property
    def subject_ids(self) -> NDArray[np.int64]:
        """`[len(self)]` subject of each row."""
        return np.tile(self.table.subject_ids[self.stays], self.epochs or 1)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[len(self)]` triplets of each row at most: those of the stay, since t1 changes by epoch."""
        lengths = np.tile(self.table.lengths[self.stays], self.epochs or 1)
        return np.minimum(lengths, self.max_length or np.iinfo(np.int64).max)


class EpochOfRows(TrainerCallback):
    """Tells the training rows the epoch, where the data loader does not (several processes)."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Set the epoch of the training dataset."""
        dataset: Any = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))


def forecast_baselines(rows: ForecastRows, batch: ArrayLike | None = None) -> dict[str, float]:
    """Mean squared errors of what needs no model, on the targets of these rows: the gate of pretraining.

    Args:
        rows: Rows with fixed times (`epochs=`), or those of the current epoch.
        batch: Positions of the rows; default: all.

    Returns:
        `last_value`: carrying each variable's last z-score up to t1 forward (0, the mean, where it has none); `mean`:
        always 0; `targets`: number of observed targets. Errors are means over all observed targets of all rows.

    Raises:
        ValueError: No target is observed.
    """
    size = rows.extractor.num_variables
    errors = {"last_value": 0.0, "mean": 0.0}
    targets = 0
    for row in range(len(rows)) if batch is None else np.asarray(batch).tolist():
        item = rows[row]
        last = np.zeros(size)
        last[item["variable_ids"]] = item["values"]  # in order of time: the last one stays
        observed = item["label_mask"] > 0
        truth = item["labels"][observed].astype(np.float64)
        forecast = np.tile(last, len(rows.horizons))[observed]
        errors["last_value"] += float(((truth - forecast) ** 2).sum())
        errors["mean"] += float((truth**2).sum())
        targets += int(observed.sum())
    if not targets:
        raise ValueError("no target is observed in these rows; give more stays, or longer horizons.")
    return {**{name: error / targets for name, error in errors.items()}, "targets": float(targets)}


def _without(table: TripletTable, kept: NDArray[np.bool_]) -> TripletTable:
    """The table without some triplets; stays that lose all of theirs keep their row."""
    lengths = np.bincount(table.stay_ids[kept], minlength=len(table))
    return replace(
        table,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        minutes=table.minutes[kept],
        variable_ids=table.variable_ids[kept],
        values=table.values[kept],
    )
