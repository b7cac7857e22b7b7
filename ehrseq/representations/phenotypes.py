"""Phenotypes: groups of patients (or visits) whose vectors are alike, and what they have in common.

    report = find_phenotypes("vectors.parquet", "data/prepared", "phenotypes/")

Clusters are found in the vectors alone (`clustering`); how far they go with the diagnoses comes afterwards
(`agreement`), and so do the codes that each cluster has more often than the rest (`cluster_codes`). Written are a page,
its tables as CSV, and the cluster of each vector. The page and its tables hide what few patients stand behind, as those
of `ehrseq stats` do; the assignments name single patients and are nothing to pass on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.data.metadata import written_by_us
from ehrseq.data.shards import Shard, dataset_shards
from ehrseq.data.sources import read_source
from ehrseq.representations.agreement import agreements, group_information
from ehrseq.representations.cluster_codes import CodeCounts, codes_of_vectors, group_matrix, group_of, kinds_of
from ehrseq.representations.clustering import Clusters, ClusterSettings, find_clusters
from ehrseq.representations.embedding_files import Embeddings, read_embeddings
from ehrseq.representations.phenotype_page import check_phenotype_folder, phenotype_page
from ehrseq.representations.phenotype_report import PhenotypeReport
from ehrseq.tokenization.ehr_codes import EVENT_KINDS
from ehrseq.work.files import write_json, write_whole

DETAILS = ("category", "chapter", "code")
_KINDS_NOT_DESCRIBED = frozenset({"visit_start", "visit_end", "birth", "ignore"})


def find_phenotypes(
    embeddings: str | Path,
    data: str | Path | pl.DataFrame,
    out: str | Path,
    *,
    settings: ClusterSettings | None = None,
    against: str = "diagnosis",
    detail: str = "category",
    truth: str | Path | pl.DataFrame | None = None,
    permutations: int = 200,
    least_patients: int = 10,
) -> PhenotypeReport:
    """Group the vectors of a file and describe the groups.

    Args:
        embeddings: File that `ehrseq embed` wrote.
        data: What was embedded: a prepared dataset; FHIR or MEDS; or an event table.
        out: Folder to write; a page of ours that is there is replaced. Whole or not at all.
        settings: How clusters are found.
        against: What they are compared with: a kind of codes ("diagnosis"), or a pattern of codes ("ICU_TYPE//*").
        detail: Groups of ICD codes: "category", "chapter" or "code".
        truth: Known groups in place of codes: a table (or Parquet or CSV file) of subject_id, group, and
            prediction_time where a patient's group changes; several rows of a patient are several groups.
        permutations: How often clusters are dealt out anew for the figures of chance.
        least_patients: What fewer patients stand behind is left out of page and tables.

    Returns:
        What was found.

    Raises:
        ValueError: A file that is none, data of other patients, an unknown kind, a folder that holds something else, or
            what `find_clusters` refuses.
    """
    out = Path(out)
    check_phenotype_folder(out)
    if isinstance(least_patients, bool) or not isinstance(least_patients, int) or least_patients < 1:
        raise ValueError(f"least_patients must be a whole number from 1 on, got {least_patients!r}.")
    if detail not in DETAILS:
        raise ValueError(f"detail got {detail!r}; expected one of {list(DETAILS)}.")
    if against not in EVENT_KINDS and "//" not in against and "*" not in against:
        raise ValueError(
            f"against got {against!r}; expected a kind of codes ({', '.join(EVENT_KINDS)}) or a pattern of codes such "
            "as ICU_TYPE//*."
        )
    found = read_embeddings(embeddings)
    known = None if truth is None else _read_truth(truth, found)
    subject_ids = found.table["subject_id"].to_numpy()
    clusters = find_clusters(found.vectors, subject_ids, settings or ClusterSettings())

    # 1. What the records hold, block by block.
    counts = CodeCounts(found.table, clusters.labels)
    pairs = [pl.DataFrame(schema={"row": pl.Int64, "group": pl.String})]
    seen = np.zeros(len(found), bool)
    kinds: dict[str, str] = {}
    for block in _blocks(found, data):
        seen[block["row"].unique().to_numpy()] = True
        new = [code for code in block["code"].unique().to_list() if code not in kinds]
        kinds |= kinds_of(new, data if isinstance(data, str | Path) else "")
        if known is None:
            standing = {code: group_of(code, kinds[code], against, detail) for code in block["code"].unique().to_list()}
            wanted = {code: name for code, name in standing.items() if name is not None}
            of_group = block.filter(pl.col("code").is_in(list(wanted)))
            group = pl.col("code").replace_strict(wanted, return_dtype=pl.String).alias("group")
            pairs.append(of_group.select("row", group).unique())
        counts.add(block)
    if 2 * seen.sum() <= len(found):
        raise ValueError(
            f"{len(found) - int(seen.sum()):,} of the {len(found):,} vectors are of patients who are not in these "
            "data; give the data that were embedded."
        )
    groups, names = group_matrix(pl.concat(pairs), len(found)) if known is None else known

    # 2. How far clusters go with the groups, and what else they have in common.
    agreement = agreements(
        clusters.labels, groups, subject_ids, permutations=permutations, seed=(settings or ClusterSettings()).seed
    )
    codes = counts.table().filter(~pl.col("code").replace_strict(kinds).is_in(_KINDS_NOT_DESCRIBED))
    tables, hidden = _shown(
        {
            "sizes": _sizes(found, clusters),
            "numbers": clusters.table,
            "agreement": pl.DataFrame([asdict(each) for each in agreement]) if agreement else pl.DataFrame(),
            "groups": _groups(clusters, groups, names, subject_ids),
            "codes": codes.with_columns(kind=pl.col("code").replace_strict(kinds)),
        },
        least_patients,
    )
    report = PhenotypeReport(
        dict(found.about),
        len(found),
        len(np.unique(subject_ids)),
        settings or ClusterSettings(),
        clusters.to_dict(),
        "known groups" if known is not None else f"{against}, by {detail}",
        agreement,
        tables,
        hidden,
        int((~seen).sum()),
    )
    assignments = found.table.with_columns(
        cluster=pl.Series(clusters.labels), silhouette=pl.Series(clusters.silhouettes)
    )
    page = phenotype_page(report)

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "index.html").write_text(page, encoding="utf-8")
        assignments.write_parquet(folder / "assignments.parquet")
        for name, table in tables.items():
            table.write_csv(folder / f"{name}.csv")
        write_json(folder / "report.json", report.to_dict(), indent=2)

    write_whole(out, write)
    return report


def _blocks(found: Embeddings, data: str | Path | pl.DataFrame) -> Any:
    """row, code of blocks of patients, from files or from events that were read."""
    import tempfile

    if isinstance(data, str | Path) and written_by_us(Path(data)):
        yield from codes_of_vectors(found.table, dataset_shards(data))
        return
    events, _, _ = read_source(data, None, "raise", purpose="describe")
    with tempfile.TemporaryDirectory(prefix="ehrseq-") as folder:
        shard = Shard(str(Path(folder) / "events.parquet"), "all", "0")
        if events is not None:
            events.write_parquet(shard.path)
        yield from codes_of_vectors(found.table, [shard])


def _read_truth(truth: str | Path | pl.DataFrame, found: Embeddings) -> tuple[NDArray[np.bool_], list[str]]:
    """Known groups of the vectors."""
    if isinstance(truth, pl.DataFrame):
        table = truth
    else:
        path = Path(truth)
        if not path.is_file():
            raise ValueError(f"no file {path}; give a Parquet or CSV file of subject_id, group.")
        try:
            table = pl.read_csv(path, try_parse_dates=True) if path.suffix == ".csv" else pl.read_parquet(path)
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    missing = {"subject_id", "group"} - set(table.columns)
    if missing:
        raise ValueError(f"the known groups lack {sorted(missing)}; expected subject_id, group, got {table.columns}.")
    keys = ["subject_id", *(["prediction_time"] if "prediction_time" in table.columns else [])]
    rows = found.table.select(keys).with_row_index("row")
    owned = rows.join(table.select(*keys, pl.col("group").cast(pl.String)).drop_nulls(), on=keys)
    if owned.is_empty():
        raise ValueError("the known groups are of none of the patients with a vector; give those of these patients.")
    return group_matrix(owned.select(pl.col("row").cast(pl.Int64), "group"), len(found))


def _sizes(found: Embeddings, clusters: Clusters) -> pl.DataFrame:
    table = pl.DataFrame(
        {
            "cluster": clusters.labels,
            "subject_id": found.table["subject_id"],
            "silhouette": pl.Series(clusters.silhouettes).fill_nan(None),
        }
    )
    return table.group_by("cluster").agg(
        pl.len().cast(pl.Int64).alias("vectors"),
        pl.col("subject_id").n_unique().cast(pl.Int64).alias("patients"),
        pl.col("silhouette").mean(),
    ).sort("cluster")  # fmt: skip


def _groups(
    clusters: Clusters, groups: NDArray[np.bool_], names: Sequence[str], subject_ids: NDArray[np.int64]
) -> pl.DataFrame:
    """Of each group its patients and the NMI between having it and the cluster, the most telling first."""
    patients = [len(np.unique(subject_ids[column])) for column in groups.T]
    schema = {"group": pl.String, "vectors": pl.Int64, "patients": pl.Int64, "nmi": pl.Float64}
    information = group_information(clusters.labels, groups) if len(names) else np.zeros(0)
    rows = {"group": list(names), "vectors": groups.sum(0).tolist(), "patients": patients, "nmi": information}
    return pl.DataFrame(rows, schema=schema).sort("nmi", "group", descending=[True, False])


def _shown(tables: dict[str, pl.DataFrame], least_patients: int) -> tuple[dict[str, pl.DataFrame], list[str]]:
    """The tables without what too few patients stand behind, and a sentence about each thing left out."""
    if least_patients <= 1:
        return tables, []
    notes = [f"What fewer than {least_patients:,} patients stand behind is left out."]
    few = {
        "groups": pl.col("patients") < least_patients,
        "codes": pl.any_horizontal(
            pl.col("inside") < least_patients,
            pl.col("outside").is_between(1, least_patients - 1),
            (pl.col("patients") - pl.col("inside")).is_between(1, least_patients - 1),
        ),
        "sizes": pl.col("patients") < least_patients,
    }
    shown = dict(tables)
    for name, is_few in few.items():
        kept = tables[name].filter(~is_few)
        if kept.height < tables[name].height:
            what = {"groups": "groups", "codes": "pairs of a code and a cluster", "sizes": "clusters"}[name]
            notes.append(f"Left out: {tables[name].height - kept.height:,} of {tables[name].height:,} {what}.")
        shown[name] = kept
    return shown, notes
