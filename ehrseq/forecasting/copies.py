"""How far synthetic patients are copies of training patients: the longest run of events, neighbours, attacks.

*Longest copied run*: the longest contiguous run of a synthetic patient's events (code and value's bin, times left out)
that stands in some training patient's record. How long such runs are by nature, held-out patients say, whom the model
has never seen: theirs with the training patients are the yardstick, and what is beyond nearly all of them is refused.

*Attacks*: what somebody who has the synthetic patients could learn of a person. Each number stands beside the same
attack where nothing can have leaked, because the person, or the released records, are held-out ones.

None of it is a proof: that these attacks fail does not say that all do, and is no differential privacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl

from ehrseq.evaluation.metrics import auroc
from ehrseq.forecasting.patient_counts import PatientCounts
from ehrseq.tokenization.ehr_histories import EncodedHistories
from ehrseq.tokenization.ehr_vocabulary import (
    TYPE_CLS,
    TYPE_INTERVAL,
    TYPE_PAD,
    TYPE_REG,
    TYPE_VE,
    TYPE_VS,
)
from ehrseq.work.files import write_whole

LEAST_RUN = 20
"""Events that a copied run may always have."""
NATURAL_SHARE = 0.99
"""Share of held-out patients whose longest shared run is taken for natural."""
_NO_EVENT = (TYPE_PAD, TYPE_CLS, TYPE_VS, TYPE_VE, TYPE_INTERVAL, TYPE_REG)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it can be divided by modulo 2**64
_NEIGHBOURS = 10
_SENSITIVE = 10


@dataclass(frozen=True)
class EventRuns:
    """Sequences of event tokens, one behind the other.

    Attributes:
        tokens: int64 [t].
        offsets: Those of patient k are offsets[k] .. offsets[k + 1], int64 [patients + 1].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, histories: EncodedHistories) -> EventRuns:
        """The events of encoded patients: no marks of visits, no intervals, no static facts."""
        kept = ~np.isin(histories.types, _NO_EVENT)
        before = np.concatenate([[0], np.cumsum(kept)])
        return cls(histories.ids[kept].astype(np.int64), before[histories.offsets].astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def write(self, file: Path) -> None:
        """As `read_runs` reads them."""

        def save(path: Path) -> None:
            with path.open("wb") as stream:
                np.savez(stream, tokens=self.tokens, offsets=self.offsets)

        write_whole(file, save)


@lru_cache(maxsize=1)
def read_runs(file: str) -> RunIndex:
    """The index of sequences that `EventRuns.write` wrote."""
    with np.load(file) as content:
        return RunIndex(EventRuns(content["tokens"], content["offsets"]))


class RunIndex:
    """Finds the longest run that sequences share with any of these.

    A run is told by a polynomial hash of 64 bits: sums of (random number of the token) x base^place, so that the hash
    of every run of a length is one subtraction. The length is searched by doubling and halving, all sequences at once:
    so few lengths are looked at, and each costs one pass over the indexed events.

    Args:
        runs: What is searched in.
    """

    def __init__(self, runs: EventRuns) -> None:
        self._runs = runs
        self._sums = _prefix_sums(runs.tokens)
        self._left = _room(runs)

    def longest(self, queries: EventRuns) -> np.ndarray:
        """Length of the longest shared run of each sequence, int64 [queries]."""
        sums, left = _prefix_sums(queries.tokens), _room(queries)
        owner = np.repeat(np.arange(len(queries)), np.diff(queries.offsets))
        low, high = np.zeros(len(queries), np.int64), np.diff(queries.offsets).astype(np.int64)  # low fits, high may
        step = 1
        while (active := (low >= step // 2) & (high >= step)).any() and step <= max(int(self._left.max(initial=0)), 1):
            fits = self._shared(step, sums, left, owner, active)
            low[fits] = step
            high[active & ~fits] = step - 1
            step *= 2
        high = np.minimum(high, max(int(self._left.max(initial=0)), 0))
        while (open_ := low < high).any():
            # Middles of the same halving for all, so that sequences share them.
            middle = low + 2 ** np.floor(np.log2(np.maximum(high - low, 1))).astype(np.int64)
            middle = np.where(open_, np.minimum(middle, high), -1)
            for length in np.unique(middle[open_]):
                asked = middle == length
                fits = self._shared(int(length), sums, left, owner, asked)
                low[fits] = length
                high[asked & ~fits] = length - 1
        return low

    def _shared(
        self, length: int, sums: np.ndarray, left: np.ndarray, owner: np.ndarray, asked: np.ndarray
    ) -> np.ndarray:
        """Which of the asked sequences have a run of this length that is indexed, bool [queries]."""
        places = np.flatnonzero((left >= length) & asked[owner])
        result = np.zeros(len(asked), bool)
        if not len(places):
            return result
        hashes = _hashes(sums, places, length)
        wanted, back = np.unique(hashes, return_inverse=True)
        seen = np.zeros(len(wanted), bool)
        own = np.flatnonzero(self._left >= length)
        for first in range(0, len(own), 1 << 20):
            indexed = _hashes(self._sums, own[first : first + (1 << 20)], length)
            at = np.minimum(np.searchsorted(wanted, indexed), len(wanted) - 1)
            seen[at[wanted[at] == indexed]] = True
        result[owner[places[seen[back]]]] = True
        return result


def allowed_run(natural: np.ndarray, asked: int | None = None) -> int:
    """The longest run that a synthetic patient may share with a training patient.

    Args:
        natural: Longest shared run of each held-out patient.
        asked: What the user says; None: the run that `NATURAL_SHARE` of the held-out patients do not exceed, at least
            `LEAST_RUN`.

    Raises:
        ValueError: What the user says is no length.
    """
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
            raise ValueError(f"max_copied got {asked!r}; expected a number of events from 1 on.")
        return asked
    usual = int(np.quantile(natural, NATURAL_SHARE, method="inverted_cdf")) if len(natural) else 0
    return max(LEAST_RUN, usual)


def _prefix_sums(tokens: np.ndarray) -> np.ndarray:
    """Sums of number(token) x base^place over the places before each, uint64 [t + 1]."""
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(29)
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(mixed * _powers(_BASE, len(tokens)), out=sums[1:])
    return sums


@lru_cache(maxsize=4)
def _powers(base: np.uint64, number: int) -> np.ndarray:
    powers = np.full(number, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


def _hashes(sums: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    """Hash of the run that begins at each place, uint64."""
    return (sums[places + length] - sums[places]) * _powers(_INVERSE, len(sums))[places]


def _room(runs: EventRuns) -> np.ndarray:
    """Events from each place to the end of its sequence, the place's own counted, int64 [t]."""
    lengths = np.diff(runs.offsets)
    return np.repeat(runs.offsets[1:], lengths) - np.arange(len(runs.tokens))


# -- neighbours and attacks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrivacyReport:
    """What was found out; each number beside that where nothing can have leaked.

    Attributes:
        nearest_training: Median distance from a synthetic patient to the nearest training patient.
        nearest_held_out: To the nearest of as many held-out patients.
        closer_to_training: Share of synthetic patients that are closer to a training patient; half is chance.
        natural_closer: The same of held-out patients, to training patients and to other held-out ones.
        distance_ratio: Median over synthetic patients of the distance to the nearest training patient, divided by that
            to the second nearest: near 0 for copies.
        natural_distance_ratio: The same of held-out patients.
        membership: AUROC of who guesses that a person was trained on, by the distance to the nearest synthetic patient;
            0.5 is chance.
        natural_membership: Where held-out patients are released in place of synthetic ones.
        attribute: Mean AUROC over sensitive codes of who guesses a training patient's code by the most similar
            synthetic patients.
        attribute_held_out: The same about held-out patients: what can be inferred without any leak.
        attribute_natural: About training patients, by as many released held-out patients.
        sensitive: The codes.
        patients: Synthetic, training and held-out patients that were compared.
    """

    nearest_training: float
    nearest_held_out: float
    closer_to_training: float
    natural_closer: float
    distance_ratio: float
    natural_distance_ratio: float
    membership: float
    natural_membership: float
    attribute: float
    attribute_held_out: float
    attribute_natural: float
    sensitive: tuple[str, ...]
    patients: tuple[int, int, int]


def attack(
    synthetic: PatientCounts, training: PatientCounts, held_out: PatientCounts, *, seed: int = 0
) -> PrivacyReport:
    """Distances and attacks.

    Args:
        synthetic: Of the synthetic patients.
        training: Of those that the model was trained on.
        held_out: Of patients that it has not seen, at least four.
        seed: Of the halves that are drawn.

    Raises:
        ValueError: Fewer than four patients of a kind.
    """
    for name, counts in (("synthetic", synthetic), ("training", training), ("held-out", held_out)):
        if len(counts) < 4:
            raise ValueError(f"an attack needs at least 4 {name} patients, got {len(counts)}.")
    random = np.random.default_rng(seed)
    columns = synthetic.shared_columns([training, held_out])
    made, trained, unseen = (counts.vectors(columns) for counts in (synthetic, training, held_out))
    # As many of each where distances are compared: among more patients somebody is nearer.
    order = random.permutation(len(unseen))
    victims, released = order[: len(order) // 2], order[len(order) // 2 :]
    members = random.permutation(len(trained))
    few = min(len(unseen), len(trained))
    to_trained, to_unseen = (
        nearest_distances(made, trained[members[:few]]),
        nearest_distances(made, unseen[order[:few]]),
    )
    half = min(len(victims), len(released), len(trained))
    by_nature = [
        nearest_distances(unseen[victims], trained[members[:half]]),
        nearest_distances(unseen[victims], unseen[released[:half]]),
    ]
    two, natural_two = nearest_distances(made, trained, 2), nearest_distances(unseen, trained, 2)
    membership = _told_apart(-nearest_distances(trained, made)[:, 0], -nearest_distances(unseen, made)[:, 0])
    shown = unseen[released]
    natural = _told_apart(-nearest_distances(trained, shown)[:, 0], -nearest_distances(unseen[victims], shown)[:, 0])
    sensitive = _sensitive_codes(training, columns)
    asked = [columns.index(code) for code in sensitive]
    as_many = made[random.permutation(len(made))[: len(shown)]]  # as many as are released by nature
    inferred = [
        _guess(trained, as_many, asked),
        _guess(unseen, as_many, asked),
        _guess(trained, shown, asked),
    ]
    return PrivacyReport(
        nearest_training=float(np.median(to_trained)),
        nearest_held_out=float(np.median(to_unseen)),
        closer_to_training=_closer(to_trained[:, 0], to_unseen[:, 0]),
        natural_closer=_closer(by_nature[0][:, 0], by_nature[1][:, 0]),
        distance_ratio=_ratio(two),
        natural_distance_ratio=_ratio(natural_two),
        membership=membership,
        natural_membership=natural,
        attribute=inferred[0],
        attribute_held_out=inferred[1],
        attribute_natural=inferred[2],
        sensitive=tuple(sensitive),
        patients=(len(synthetic), len(training), len(held_out)),
    )


def nearest_distances(vectors: np.ndarray, others: np.ndarray, number: int = 1) -> np.ndarray:
    """Euclidean distances to the nearest of others, ascending, [n, number] (infinite where there are fewer)."""
    found = np.full((len(vectors), number), np.inf)
    squares = (others.astype(np.float64) ** 2).sum(axis=1)
    for first in range(0, len(vectors), 512):
        part = vectors[first : first + 512].astype(np.float64)
        distances = (part**2).sum(axis=1)[:, None] + squares - 2.0 * part @ others.T.astype(np.float64)
        kept = np.sort(np.partition(distances, min(number, distances.shape[1]) - 1, axis=1)[:, :number], axis=1)
        found[first : first + 512, : kept.shape[1]] = np.sqrt(np.maximum(kept, 0.0))
    return np.where(found < 1e-6, 0.0, found)


def _closer(to_training: np.ndarray, to_held_out: np.ndarray) -> float:
    return float((to_training < to_held_out).mean() + 0.5 * (to_training == to_held_out).mean())


def _ratio(two: np.ndarray) -> float:
    """Median of first distance through second; 1 where both are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(two[:, 1] > 0, two[:, 0] / two[:, 1], 1.0)
    return float(np.median(ratios))


def _told_apart(members: np.ndarray, others: np.ndarray) -> float:
    labels = np.concatenate([np.ones(len(members), bool), np.zeros(len(others), bool)])
    return auroc(labels, np.concatenate([members, others]))


def _sensitive_codes(training: PatientCounts, columns: Sequence[str]) -> list[str]:
    """Diagnoses of 2 to 50 % of the training patients, the rarest ones, which a stranger would least guess."""
    shares = (training.vectors(columns) > 0).mean(axis=0)
    kinds = training.kinds
    usable = [
        (share, code)
        for share, code in zip(shares.tolist(), columns, strict=True)
        if kinds.get(code) == "diagnosis" and 0.02 <= share <= 0.5
    ]
    return [code for _, code in sorted(usable)[:_SENSITIVE]]


def _guess(victims: np.ndarray, released: np.ndarray, asked: Iterable[int]) -> float:
    """Mean AUROC of guessing each asked column from all others, by the most similar released patients."""
    areas = []
    for column in asked:
        truth = victims[:, column] > 0
        if not truth.any() or truth.all() or not len(released):
            continue
        known = np.delete(victims, column, axis=1)
        shown = np.delete(released, column, axis=1)
        near = _nearest_rows(known, shown, min(_NEIGHBOURS, len(shown)))
        areas.append(auroc(truth, (released[:, column] > 0)[near].mean(axis=1)))
    return float(np.mean(areas)) if areas else float("nan")


def _nearest_rows(vectors: np.ndarray, others: np.ndarray, number: int) -> np.ndarray:
    squares = (others.astype(np.float64) ** 2).sum(axis=1)
    rows = []
    for first in range(0, len(vectors), 512):
        distances = squares - 2.0 * vectors[first : first + 512].astype(np.float64) @ others.T.astype(np.float64)
        rows.append(np.argpartition(distances, number - 1, axis=1)[:, :number])
    return np.concatenate(rows)


def run_lengths(lengths: np.ndarray) -> dict[str, float]:
    """Median, 99th percentile and largest of some lengths, as a report tells them."""
    if not len(lengths):
        return {}
    series = pl.Series(lengths)
    return {
        "median": float(np.median(lengths)),
        "p99": float(np.quantile(lengths, NATURAL_SHARE, method="inverted_cdf")),
        "longest": float(series.max() or 0),  # type: ignore[arg-type]
    }


__all__ = [
    "LEAST_RUN",
    "NATURAL_SHARE",
    "EventRuns",
    "PrivacyReport",
    "RunIndex",
    "allowed_run",
    "attack",
    "nearest_distances",
    "read_runs",
    "run_lengths",
]
