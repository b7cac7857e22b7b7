"""What is told of phenotypes: figures and tables, without the page around them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from ehrseq.representations.agreement import GroupAgreement
from ehrseq.representations.clustering import ClusterSettings

PHENOTYPE_TABLES = ("sizes", "numbers", "agreement", "groups", "codes")


@dataclass(frozen=True)
class PhenotypeReport:
    """What `find_phenotypes` found.

    Attributes:
        about: How the vectors were made.
        vectors, patients: How many.
        settings: How clusters were found.
        clusters: The figures of the clusters.
        against: What they were compared with.
        agreement: Purity and mutual information.
        tables: sizes (cluster, vectors, patients, silhouette), numbers (clusters tried), agreement, groups (of each
            what the clusters say about it), codes (over-represented ones). Nothing of too few patients is in them.
        hidden: A sentence about each thing that was left out.
        without_record: Vectors whose patient the data do not hold.
    """

    about: dict[str, Any]
    vectors: int
    patients: int
    settings: ClusterSettings
    clusters: dict[str, Any]
    against: str
    agreement: list[GroupAgreement]
    tables: dict[str, pl.DataFrame]
    hidden: list[str] = field(default_factory=list)
    without_record: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the tables."""
        return {
            "embeddings": self.about,
            "vectors": self.vectors,
            "patients": self.patients,
            "settings": asdict(self.settings),
            "found": self.clusters,
            "against": self.against,
            "agreement": [asdict(each) for each in self.agreement],
            "hidden": self.hidden,
            "vectors_without_record": self.without_record,
        }
