"""The random numbers of trajectories: each is a function of what it is for, not of what was drawn before it.

A uniform number is made of (seed of the call, key of the patient, number of the trajectory, pool, counter) by the
finaliser of SplitMix64 (Steele, Lea, Flood 2014). So a trajectory is the same whatever is drawn beside it, in whichever
order, in however many slots and processes, and whether or not a run was killed in between.
"""

from __future__ import annotations

import numpy as np

DRAWS_OF_A_STEP = 2
"""Counters of a step: its token, then its time."""

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_LOST_BITS = np.uint64(11)  # 53 bits are left, as many as a float64 holds


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, one to one on uint64: every bit of the result depends on every bit of the input."""
    words = (words ^ (words >> _SHIFTS[0])) * _FIRST
    words = (words ^ (words >> _SHIFTS[1])) * _SECOND
    return words ^ (words >> _SHIFTS[2])


def trajectory_keys(seed: int, prompt_key: int, numbers: np.ndarray, pool: int) -> np.ndarray:
    """What tells the random numbers of trajectories apart.

    Args:
        seed: Of the call, any int (its lowest 64 bits count, as of the next).
        prompt_key: Of the patient.
        numbers: Of the trajectories, int64 [n].
        pool: Of the trajectories that are drawn alike (see `pool_of`).

    Returns:
        uint64 [n, 2].
    """
    words = np.zeros((len(numbers), 2), dtype=np.uint64)
    words[:, 1] = np.uint64(_GOLDEN)
    shared = [np.full(len(numbers), int(part) & _WORD, dtype=np.uint64) for part in (seed, prompt_key, pool)]
    for part in (*shared, numbers.astype(np.uint64)):
        words = _mix((words ^ part[:, None]) + np.uint64(_GOLDEN))
    return words


def pool_of(ids: np.ndarray) -> int:
    """Number of the pool of trajectories that avoid these tokens: the same whatever other outcomes are asked for."""
    word = np.zeros(1, dtype=np.uint64)
    for token in ids:
        word = _mix((word ^ np.uint64(int(token) + 1)) + np.uint64(_GOLDEN))
    return int(word[0])


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [n], of 53 bits: keys uint64 [n, 2], counters int64 [n]."""
    words = _mix(keys[:, 0] + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    words = _mix(words + keys[:, 1])
    return (words >> _LOST_BITS).astype(np.float64) * 2.0**-53


__all__ = ["DRAWS_OF_A_STEP", "pool_of", "trajectory_keys", "uniforms"]
