"""How far clusters go together with what is known of the patients: purity and mutual information, beside chance.

What is known is a set of groups for each vector (the categories of its diagnoses, a unit, an outcome), several or none
at a time. Two readings, each with its own figures:

- *first group*: each vector counts for one group only, the rarest of its own: what tells it apart most. Purity is the
  share of vectors that belong to the leading group of their cluster; normalised mutual information (NMI) is that of
  scikit-learn, normalised by the arithmetic mean of the two entropies.
- *every group*: a vector counts for all its groups. Purity is the share of vectors that have the group that is most
  frequent in their cluster; NMI is the mean over groups of the NMI between having the group and the cluster.

Purity rises with the number of clusters and with the share of the commonest group, and neither figure is 0 for clusters
that mean nothing. So the same is worked out for clusters dealt out anew: whole patients change places, as many as asked
for; `chance` is their mean, `p_value` the share (with the clusters themselves among them) that reach the figure.

Glossary: n vectors, g groups, k clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class GroupAgreement:
    """A figure of clusters against groups.

    Attributes:
        name: "purity" or "nmi".
        reading: "first group" or "every group".
        value: The figure.
        chance: Its mean over clusters dealt out anew.
        chance_high: 95th percentile of those.
        p_value: Share of them, the clusters' own among them, that reach the value.
        vectors: How many it is worked out over.
    """

    name: str
    reading: str
    value: float
    chance: float
    chance_high: float
    p_value: float
    vectors: int


def agreements(
    clusters: Ints, groups: Bools, subject_ids: Ints, *, permutations: int = 200, seed: int = 0
) -> list[GroupAgreement]:
    """Purity and NMI in both readings.

    Args:
        clusters: `[n]`, from 1 on.
        groups: `[n, g]` which groups each vector has; a column that no vector has, or every one, says nothing.
        subject_ids: `[n]`.
        permutations: How often clusters are dealt out anew.
        seed: Of the dealing.

    Returns:
        The figures; "first group" is over vectors that have a group. None where there is no group to speak of.

    Raises:
        ValueError: Shapes that do not agree, or no permutation.
    """
    if groups.ndim != 2 or len(groups) != len(clusters) or len(subject_ids) != len(clusters):
        raise ValueError(
            f"clusters, groups and subject_ids have the shapes {clusters.shape}, {groups.shape} and "
            f"{subject_ids.shape}; expected [n], [n, g] and [n]."
        )
    if permutations < 1:
        raise ValueError(f"permutations got {permutations}; expected at least 1.")
    if not groups.shape[1] or not groups.any():
        return []
    first = first_groups(groups)
    has = first >= 0
    varied = groups[:, groups.any(0) & ~groups.all(0)]
    dealt = [clusters, *_dealt_anew(clusters, subject_ids, permutations, seed)]
    figures = {
        ("purity", "first group"): [purity(each[has], first[has]) for each in dealt],
        ("nmi", "first group"): [mutual_information(each[has], first[has]) for each in dealt],
        ("purity", "every group"): [multi_purity(each, groups) for each in dealt],
    }
    if varied.shape[1]:
        figures["nmi", "every group"] = [float(group_information(each, varied).mean()) for each in dealt]
    found = []
    for (name, reading), values in figures.items():
        chance = np.asarray(values[1:])
        found.append(
            GroupAgreement(
                name,
                reading,
                values[0],
                float(chance.mean()),
                float(np.quantile(chance, 0.95)),
                float((1 + (chance >= values[0] - 1e-12).sum()) / (1 + len(chance))),
                int(has.sum()) if reading == "first group" else len(clusters),
            )
        )
    return found


def first_groups(groups: Bools) -> Ints:
    """`[n]` the rarest group of each vector; -1 where it has none."""
    order = np.argsort(groups.sum(0), kind="stable")
    ranked = groups[:, order]
    return np.where(ranked.any(1), order[ranked.argmax(1)], -1).astype(np.int64)


def contingency(clusters: Ints, groups: Ints) -> NDArray[np.float64]:
    """Counts of (cluster, group), rows and columns those that occur."""
    rows, row = np.unique(clusters, return_inverse=True)
    columns, column = np.unique(groups, return_inverse=True)
    counts = np.bincount(row * len(columns) + column, minlength=len(rows) * len(columns))
    return counts.reshape(len(rows), len(columns)).astype(np.float64)


def purity(clusters: Ints, groups: Ints) -> float:
    """Share of vectors that belong to the leading group of their cluster.

    >>> purity(np.array([1, 1, 1, 2]), np.array([0, 0, 1, 1]))
    0.75
    """
    return float(contingency(clusters, groups).max(1).sum() / len(clusters))


def mutual_information(clusters: Ints, groups: Ints) -> float:
    """NMI of two divisions of the same vectors, normalised by the mean of their entropies; 0 where both are one."""
    counts = contingency(clusters, groups)
    joint = counts / counts.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    entropy = _entropy(rows) + _entropy(columns)
    return 2 * (entropy - _entropy(joint.ravel())) / entropy if entropy > 0 else 0.0


def multi_purity(clusters: Ints, groups: Bools) -> float:
    """Share of vectors that have the group that is most frequent in their cluster."""
    return float(sum(groups[clusters == each].sum(0).max() for each in np.unique(clusters)) / len(clusters))


def group_information(clusters: Ints, groups: Bools) -> NDArray[np.float64]:
    """`[g]` NMI between having each group and the cluster."""
    found, row = np.unique(clusters, return_inverse=True)
    with_group = np.stack([groups[row == each].sum(0) for each in range(len(found))]) / len(clusters)  # [k, g]
    share = np.bincount(row) / len(clusters)
    joint = np.stack([with_group, share[:, None] - with_group])  # [2, k, g]
    marginal = joint.sum(1)  # [2, g]
    of_group = -np.sum(_x_log_x(marginal), axis=0)
    both = -np.sum(_x_log_x(joint), axis=(0, 1))
    total = _entropy(share) + of_group
    return np.asarray(2 * (total - both) / np.where(total > 0, total, 1.0))


def _dealt_anew(clusters: Ints, subject_ids: Ints, permutations: int, seed: int) -> list[Ints]:
    """Clusters laid against the vectors in another order of the patients, whose own stay together."""
    order = np.argsort(subject_ids, kind="stable")
    _, counts = np.unique(subject_ids, return_counts=True)
    blocks = np.split(clusters[order], np.cumsum(counts)[:-1])
    single = bool((counts == 1).all())
    dealt = []
    for number in range(permutations):
        rng = np.random.default_rng((seed, number))
        places = rng.permutation(len(blocks))
        laid = clusters[order][places] if single else np.concatenate([blocks[place] for place in places])
        anew = np.empty_like(clusters)
        anew[order] = laid
        dealt.append(anew)
    return dealt


def _entropy(shares: NDArray[np.float64]) -> float:
    return -float(_x_log_x(shares).sum())


def _x_log_x(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0)
