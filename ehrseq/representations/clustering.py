"""Groups of alike vectors: how many there are, and whether other patients would give the same ones.

    found = find_clusters(vectors, subject_ids, ClusterSettings(method="kmeans"))
    found.labels, found.table, found.stability

1. Vectors are standardised, and reduced to the principal components that keep most of their variance.
2. Each number of clusters of a range is fitted; that with the best criterion is taken: the largest mean silhouette of
   k-means, the smallest Bayesian information criterion (BIC) of a Gaussian mixture.
3. Stability: pairs of fits, each on half of the patients, divide all vectors; the adjusted Rand index says how far two
   fits agree (1 = the same groups, 0 = chance). Beside it stands the same for vectors that are drawn from one normal
   distribution with the same variances: they have no groups, and any method divides those too.

Glossary: n vectors, d their size, k clusters.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler

CRITERIA = {"kmeans": "silhouette", "gaussian_mixture": "bic"}
"""Method -> by which criterion its number of clusters is chosen."""
_SILHOUETTE_ROWS = 4000  # drawn once for all numbers: a silhouette takes the square of them
_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class ClusterSettings:
    """How clusters are found.

    Attributes:
        method: "kmeans" or "gaussian_mixture" (full covariances).
        fewest: Smallest number of clusters tried, at least 2.
        most: Largest number.
        variance: Share of the variance that the principal components keep; None = no reduction.
        max_components: So many components at most.
        resamples: Pairs of fits for the stability.
        seed: Of everything that is drawn.
    """

    method: str = "kmeans"
    fewest: int = 2
    most: int = 10
    variance: float | None = 0.9
    max_components: int = 50
    resamples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in CRITERIA:
            raise ValueError(f"method got {self.method!r}; expected one of {list(CRITERIA)}.")
        if not 2 <= self.fewest <= self.most:
            raise ValueError(f"clusters got {self.fewest} to {self.most}; expected a range that begins at 2 or later.")
        if self.variance is not None and not 0 < self.variance <= 1:
            raise ValueError(f"variance got {self.variance}; expected a share above 0 and up to 1, or None.")
        if self.max_components < 1 or self.resamples < 1 or self.seed < 0:
            raise ValueError(
                f"max_components got {self.max_components}, resamples {self.resamples}, seed {self.seed}; expected "
                "at least 1, 1 and 0."
            )


@dataclass(frozen=True)
class Stability:
    """Adjusted Rand index between pairs of fits on halves of the patients.

    Attributes:
        mean: Mean over the pairs.
        low, high: 2.5th and 97.5th percentile over the pairs.
        no_groups: Mean over pairs of fits to vectors of one normal distribution.
    """

    mean: float
    low: float
    high: float
    no_groups: float


@dataclass(frozen=True)
class Clusters:
    """What `find_clusters` found.

    Attributes:
        labels: int64 [n], cluster of each vector from 1 on, the largest first.
        silhouettes: float64 [n], of the chosen clusters; NaN of vectors that were not among those drawn for it.
        table: clusters, silhouette, bic (of a mixture), inertia (of k-means), chosen: one row a number tried.
        stability: See `Stability`.
        components: Principal components that were clustered.
        variance: Share of the variance that they keep.
        constant: Columns that never change, left out.
    """

    labels: NDArray[np.int64]
    silhouettes: NDArray[np.float64]
    table: pl.DataFrame
    stability: Stability
    components: int
    variance: float
    constant: int

    @property
    def number(self) -> int:
        """Number of clusters."""
        return int(self.labels.max())

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-ready."""
        return {
            "clusters": self.number,
            "components": self.components,
            "variance": self.variance,
            "constant_columns": self.constant,
            "tried": self.table.to_dicts(),
            "stability": asdict(self.stability),
        }


def find_clusters(
    vectors: NDArray[np.floating[Any]], subject_ids: NDArray[np.int64], settings: ClusterSettings | None = None
) -> Clusters:
    """Group vectors.

    Args:
        vectors: `[n, d]`.
        subject_ids: `[n]` patient of each: halves are drawn of patients.
        settings: How.

    Raises:
        ValueError: Too few patients for the numbers of clusters, or vectors that are all the same.
    """
    chosen_settings = settings or ClusterSettings()
    patients = len(np.unique(subject_ids))
    if patients < 4 * chosen_settings.most:
        raise ValueError(
            f"there are vectors of {patients} patients; for up to {chosen_settings.most} clusters at least "
            f"{4 * chosen_settings.most} are needed (half of them are clustered at a time): try fewer clusters."
        )
    reduced, variance, constant = _reduced(np.asarray(vectors, np.float64), chosen_settings)
    rng = np.random.default_rng(chosen_settings.seed)
    seen = np.sort(rng.permutation(len(reduced))[:_SILHOUETTE_ROWS])
    rows, best, labels = [], None, np.zeros(0, np.int64)
    for number in range(chosen_settings.fewest, chosen_settings.most + 1):
        model = _fit(reduced, number, chosen_settings, chosen_settings.seed)
        found = model.predict(reduced)
        spread = len(np.unique(found[seen])) > 1
        silhouette = float(silhouette_score(reduced[seen], found[seen])) if spread else -1.0
        row = {"clusters": number, "silhouette": silhouette, "bic": None, "inertia": None}
        if isinstance(model, GaussianMixture):
            row["bic"] = float(model.bic(reduced))
        else:
            row["inertia"] = float(model.inertia_)
        rows.append(row)
        quality = silhouette if chosen_settings.method == "kmeans" else -float(row["bic"] or 0.0)
        if best is None or quality > best:
            best, labels, number_chosen = quality, found, number
    table = pl.DataFrame(
        rows, schema={"clusters": pl.Int64, "silhouette": pl.Float64, "bic": pl.Float64, "inertia": pl.Float64}
    ).with_columns(chosen=pl.col("clusters") == number_chosen)
    largest_first, labels = _by_size(labels)
    if largest_first < 2:
        raise ValueError("all vectors fall into one cluster: there is nothing to tell apart.")
    return Clusters(
        labels,
        _silhouettes(reduced, labels, seen),
        table,
        _stability(reduced, subject_ids, number_chosen, chosen_settings),
        reduced.shape[1],
        variance,
        constant,
    )


def _reduced(vectors: NDArray[np.float64], settings: ClusterSettings) -> tuple[NDArray[np.float64], float, int]:
    """Standardised vectors, reduced; the share of the variance kept, and how many columns are constant."""
    varies = vectors.std(0) > _LEAST_VARIANCE
    if not varies.any():
        raise ValueError(f"all {len(vectors)} vectors are the same: there is nothing to tell apart.")
    scaled = StandardScaler().fit_transform(vectors[:, varies])
    constant = int((~varies).sum())
    most = min(settings.max_components, *scaled.shape)
    if settings.variance is None:
        return scaled, 1.0, constant
    analysis = PCA(n_components=most, random_state=settings.seed).fit(scaled)
    kept = np.cumsum(analysis.explained_variance_ratio_)
    count = min(most, int(np.searchsorted(kept, settings.variance - 1e-9)) + 1)
    return analysis.transform(scaled)[:, :count], float(kept[count - 1]), constant


def _fit(vectors: NDArray[np.float64], number: int, settings: ClusterSettings, seed: int) -> KMeans | GaussianMixture:
    if settings.method == "kmeans":
        return KMeans(number, n_init=10, random_state=seed).fit(vectors)
    return GaussianMixture(number, n_init=3, reg_covar=1e-4, random_state=seed).fit(vectors)


def _by_size(labels: NDArray[Any]) -> tuple[int, NDArray[np.int64]]:
    """How many clusters there are, and labels from 1 on, the largest first; equal ones in the order of their rows."""
    found, first, counts = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    rank = np.empty(len(found), np.int64)
    rank[order] = np.arange(1, len(found) + 1)
    return len(found), rank[np.searchsorted(found, labels)]


def _silhouettes(
    vectors: NDArray[np.float64], labels: NDArray[np.int64], seen: NDArray[np.int64]
) -> NDArray[np.float64]:
    from sklearn.metrics import silhouette_samples

    values = np.full(len(vectors), np.nan)
    if len(np.unique(labels[seen])) > 1:
        values[seen] = silhouette_samples(vectors[seen], labels[seen])
    return values


def _stability(
    vectors: NDArray[np.float64], subject_ids: NDArray[np.int64], number: int, settings: ClusterSettings
) -> Stability:
    rng = np.random.default_rng((settings.seed, 1))
    reference = rng.normal(size=vectors.shape) * vectors.std(0)
    agreement = _agreement(vectors, subject_ids, number, settings)
    low, high = np.quantile(agreement, (0.025, 0.975))
    chance = _agreement(reference, subject_ids, number, settings)
    return Stability(float(agreement.mean()), float(low), float(high), float(chance.mean()))


def _agreement(
    vectors: NDArray[np.float64], subject_ids: NDArray[np.int64], number: int, settings: ClusterSettings
) -> NDArray[np.float64]:
    """Adjusted Rand index of each pair: two fits, each on half of the patients, that divide all vectors."""
    patients, patient_of = np.unique(subject_ids, return_inverse=True)
    indices = []
    for pair in range(settings.resamples):
        rng = np.random.default_rng((settings.seed, 2, pair))
        divided = []
        for half in range(2):
            drawn = np.zeros(len(patients), bool)
            drawn[rng.permutation(len(patients))[: len(patients) // 2]] = True
            model = _fit(vectors[drawn[patient_of]], number, settings, settings.seed + half)
            divided.append(model.predict(vectors))
        indices.append(adjusted_rand_score(*divided))
    return np.asarray(indices)
