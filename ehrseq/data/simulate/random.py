"""Random numbers of the simulator: a counter-based generator, so that a patient is the same whatever the cohort.

Every variate is a hash of (seed, patient, phase, name, index): no stream is consumed, hence patient k of seed s does
not depend on the number of patients, on the chunk it was simulated in, or on how many variates another part of the
process draws. The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014), applied to the patient's key plus a
mixed counter.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri

from ehrseq.data.splits import splitmix64


class PatientStreams:
    """Uniform, normal and other variates of a block of patients.

    Args:
        seed: Seed of the cohort.
        patients: int64 `[n]`, numbers of the patients.
        branch_after: int64 `[n]` or None. Where given, phases above it draw from `branch_seed`: the same past,
            another future.
        branch_seed: Seed of those futures, int64 scalar or `[n]`.
    """

    def __init__(
        self,
        seed: int,
        patients: np.ndarray,
        branch_after: np.ndarray | None = None,
        branch_seed: int | np.ndarray = 0,
    ) -> None:
        number = patients.astype(np.uint64)
        self._keys = splitmix64(splitmix64(np.full(len(patients), np.uint64(seed % 2**64))) ^ splitmix64(number))
        self._branch_after = branch_after
        if branch_after is not None:
            other = np.broadcast_to(np.asarray(branch_seed, dtype=np.uint64), number.shape)
            self._branch_keys = splitmix64(self._keys ^ splitmix64(other + np.uint64(1)))

    def uniform(self, rows: np.ndarray, phase: int, name: str, count: int | None = None) -> np.ndarray:
        """Uniforms in (0, 1).

        Args:
            rows: int64 `[r]`, positions in the block.
            phase: Number of the stage of the process.
            name: What the variate decides; two draws of one phase need two names.
            count: Variates per row; None for one.

        Returns:
            float64 `[r]`, or `[r, count]`.
        """
        keys = self._keys[rows]
        if self._branch_after is not None:
            keys = np.where(phase > self._branch_after[rows], self._branch_keys[rows], keys)
        start = (np.uint64(phase + 1) << np.uint64(48)) ^ (np.uint64(zlib.crc32(name.encode())) << np.uint64(12))
        counters = splitmix64(start + np.arange(1 if count is None else count, dtype=np.uint64))
        bits = splitmix64(keys[:, None] + counters[None, :]) if count is not None else splitmix64(keys + counters[0])
        return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, rows: np.ndarray, phase: int, name: str, count: int | None = None) -> np.ndarray:
        """Standard normals, shapes as `uniform`."""
        normal: np.ndarray = ndtri(self.uniform(rows, phase, name, count))
        return normal

    def exponential(self, rows: np.ndarray, phase: int, name: str, count: int | None = None) -> np.ndarray:
        """Exponentials of mean 1, shapes as `uniform`."""
        exponential: np.ndarray = -np.log(self.uniform(rows, phase, name, count))
        return exponential

    def happens(self, rows: np.ndarray, phase: int, name: str, probability: np.ndarray | float) -> np.ndarray:
        """Bernoulli draws, bool `[r]`; `probability` scalar or `[r]`."""
        return self.uniform(rows, phase, name) < probability

    def choice(self, rows: np.ndarray, phase: int, name: str, weights: Sequence[float]) -> np.ndarray:
        """Categorical draws, int64 `[r]`, from `weights` that sum to 1."""
        return np.searchsorted(np.cumsum(weights)[:-1], self.uniform(rows, phase, name), side="right")


def poisson_from_uniform(uniforms: np.ndarray, mean: np.ndarray, largest: int) -> np.ndarray:
    """Poisson counts by inversion, cut at `largest`.

    Args:
        uniforms: float64 `[n]`.
        mean: float64 `[n]`.
        largest: Largest count.

    Returns:
        int64 `[n]`.
    """
    counts = np.zeros(len(uniforms), dtype=np.int64)
    probability = np.exp(-mean)
    below = probability.copy()
    for k in range(1, largest + 1):
        counts += uniforms > below
        probability = probability * mean / k
        below = below + probability
    return counts
