"""Quantiles of many groups of values in one pass and bounded memory, with an error that is known.

A summary of a group is its distinct values, ascending, each with the number of values that it stands for. It is exact
until it has more than `size` of them; then it is thinned: at each of `size` equal steps of the rank one value is kept,
and the values between two kept ones are counted as the upper. The rank of any value is then told too low, by less than
`n / size` and never too high. How much too low, at worst, is kept with the summary: its error.

Errors of summaries add when these are merged, so that merging one after the other would pile them up. Summaries are
merged like the digits of a binary counter instead (the logarithmic method, as in Manku, Rajagopalan & Lindsay, SIGMOD
1998): blocks of rows two and two, pairs two and two. Over b blocks a value is thinned at most log2(b) + 2 times, hence

    error <= (log2(b) + 2) * n / size

and half of it where a quantile is asked for, because the answer aims at the middle (all of it next to the smallest
value, which has nothing below it). With a size of 4096 that is at most 0.16 % of the ranks for 10^9 values
(b = 1,700); what it really was stands in `EhrTokenizer`'s settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

EXACT_VALUES = 4096
"""Distinct values of a (code, unit) up to which its quantiles are exact, and steps of the rank beyond."""
_MAX_POINTS = 4_000_000  # values of all groups of a summary together: bounds the memory
_LEAST_SIZE = 64
_SIGN, _LOW = np.uint32(1 << 31), np.uint64((1 << 32) - 1)


@dataclass(frozen=True)
class _Summary:
    """Values of all groups.

    Attributes:
        points: Group and value, see `_points`, ascending, [points] uint64.
        weights: Values that each point stands for, [points] int64.
        errors: Of each group how much too low a rank can be told, [groups] int64.
    """

    points: np.ndarray
    weights: np.ndarray
    errors: np.ndarray


class QuantileSketches:
    """Mergeable summaries of the values of many groups.

    Args:
        size: See the module's text; None = always exact, memory for every distinct value.
    """

    def __init__(self, size: int | None = EXACT_VALUES) -> None:
        self.size = size
        self._levels: list[_Summary | None] = []

    def add(self, groups: np.ndarray, values: np.ndarray) -> None:
        """Add a block of values.

        Args:
            groups: Number of each value's group, [n], from 0 on; groups need not be known before.
            values: [n] float32, finite.
        """
        if not len(groups):
            return
        points = ordered(_points(groups, values))
        last = np.ones(len(points), bool)
        np.not_equal(points[1:], points[:-1], out=last[:-1])
        ends = np.flatnonzero(last)
        weights = np.diff(ends, prepend=-1)
        errors = np.zeros(int(points[-1] >> np.uint64(32)) + 1, np.int64)
        self._carry(self._thinned(_Summary(points[ends], weights, errors)), 0)

    def merge(self, other: QuantileSketches, groups: np.ndarray) -> None:
        """Add what another has seen.

        Args:
            other: Sketches of the same size.
            groups: Number here of each group there, [groups].
        """
        for level, summary in enumerate(other._levels):
            if summary is None:
                continue
            group_of = (summary.points >> np.uint64(32)).astype(np.int64)
            points = (groups[group_of].astype(np.uint64) << np.uint64(32)) | (summary.points & _LOW)
            order = np.argsort(points, kind="stable")
            errors = np.zeros(int(groups[: len(summary.errors)].max()) + 1, np.int64)
            errors[groups[: len(summary.errors)]] = summary.errors
            self._carry(_Summary(points[order], summary.weights[order], errors), level)

    def quantiles(self, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Quantiles of every group that has values, as `quantile(share, "lower")` of polars and numpy defines them.

        Args:
            shares: [q] in [0, 1].

        Returns:
            groups [g], ascending; values of each [g]; largest value [g] float32; quantiles [g, q] float32; errors [g]:
            the rank of a quantile is off by at most so many values.
        """
        summary = self._whole()
        if not len(summary.points):
            none = np.zeros(0, np.int64)
            return none, none, none.astype(np.float32), np.zeros((0, len(shares)), np.float32), none
        group = (summary.points >> np.uint64(32)).astype(np.int64)
        values = _values(summary.points)
        begins = np.flatnonzero(np.diff(group, prepend=-1))
        stops = np.append(begins[1:], len(group))
        through = np.cumsum(summary.weights)
        before = np.concatenate([[0], through])[begins]
        present = group[begins]
        total, error = through[stops - 1] - before, summary.errors[present]
        # The smallest point that is told to have the wanted rank, less half the error; no rank is below the first.
        wanted = np.floor((total[:, None] - 1) * np.asarray(shares, np.float64)).astype(np.int64) + 1
        aim = np.maximum(1, wanted - error[:, None] // 2)
        places = np.searchsorted(through, (aim + before[:, None]).ravel(), side="left").reshape(aim.shape)
        # Its true rank lies between the aim and the aim plus the error.
        off = np.maximum(wanted - aim, aim + error[:, None] - wanted).max(axis=1)
        return present, total, values[stops - 1], values[places], off

    def state(self) -> dict[str, np.ndarray]:
        """What `from_state` makes the same sketches of."""
        arrays: dict[str, np.ndarray] = {}
        for level, summary in enumerate(self._levels):
            if summary is not None:
                for name in ("points", "weights", "errors"):
                    arrays[f"{name}_{level}"] = getattr(summary, name)
        return arrays

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray], size: int | None = EXACT_VALUES) -> QuantileSketches:
        """The inverse of `state`."""
        sketches = cls(size)
        levels = [int(name.rpartition("_")[2]) for name in state if name.startswith("points_")]
        sketches._levels = [None] * (max(levels, default=-1) + 1)
        for level in levels:
            sketches._levels[level] = _Summary(*(state[f"{name}_{level}"] for name in ("points", "weights", "errors")))
        return sketches

    def _carry(self, summary: _Summary, level: int) -> None:
        while len(self._levels) <= level:
            self._levels.append(None)
        while (there := self._levels[level]) is not None:
            self._levels[level] = None
            summary = self._thinned(_merged(there, summary))
            level += 1
            if level == len(self._levels):
                self._levels.append(None)
        self._levels[level] = summary

    def _whole(self) -> _Summary:
        whole = _Summary(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        for summary in self._levels:
            if summary is not None:
                whole = _merged(whole, summary)
        return whole

    def _thinned(self, summary: _Summary) -> _Summary:
        """No group with more values than `size`."""
        if self.size is None or len(summary.points) <= self.size:
            return summary
        group = (summary.points >> np.uint64(32)).astype(np.int64)
        counts = np.bincount(group)
        size = self.size
        while size > _LEAST_SIZE and int(np.minimum(counts, size).sum()) > _MAX_POINTS:
            size //= 2
        if counts.max() <= size:
            return summary
        # Whole groups beyond the size are thinned: where their running sum passes a step of n / size, a point is kept.
        begins = np.flatnonzero(np.diff(group, prepend=-1))
        lengths = np.diff(np.append(begins, len(group)))
        through = np.cumsum(summary.weights)
        before = np.concatenate([[0], through])[begins]
        total = np.diff(np.append(before, through[-1]))
        rank = through - np.repeat(before, lengths)
        step = rank * size // np.repeat(total, lengths)
        kept = np.ones(len(group), bool)
        np.not_equal(step[1:], step[:-1], out=kept[1:])
        kept[begins] = step[begins] > 0
        kept |= np.repeat(lengths <= size, lengths)
        place = np.flatnonzero(kept)
        weights = np.diff(through[place], prepend=0)
        # The last of the values left out before a kept one is told to have a rank that is too low by all of them.
        errors = summary.errors.copy()
        np.maximum.at(errors, group[place], summary.errors[group[place]] + weights - summary.weights[place])
        return _Summary(summary.points[place], weights, errors)


def ordered(numbers: np.ndarray) -> np.ndarray:
    """The numbers, ascending; polars sorts three times as fast as numpy where numpy has no vector instructions."""
    return pl.Series(numbers).sort().to_numpy()


def _merged(one: _Summary, other: _Summary) -> _Summary:
    points = np.concatenate([one.points, other.points])
    order = np.argsort(points, kind="stable")
    points, weights = points[order], np.concatenate([one.weights, other.weights])[order]
    first = np.ones(len(points), bool)
    np.not_equal(points[1:], points[:-1], out=first[1:])
    begins = np.flatnonzero(first)
    errors = np.zeros(max(len(one.errors), len(other.errors)), np.int64)
    errors[: len(one.errors)] += one.errors
    errors[: len(other.errors)] += other.errors
    return _Summary(points[begins], np.add.reduceat(weights, begins) if len(begins) else weights, errors)


def _points(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Group above, value below, as numbers that sort by group, then value."""
    bits = (np.asarray(values, np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return (np.asarray(groups).astype(np.uint64) << np.uint64(32)) | ordered


def _values(points: np.ndarray) -> np.ndarray:
    ordered = (points & _LOW).astype(np.uint32)
    return np.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered).astype(np.uint32).view(np.float32)
