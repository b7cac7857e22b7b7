"""`ehrseq phenotypes`: groups of patients whose vectors are alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def phenotypes_command(
    embeddings: Annotated[Path, typer.Option(help="File that `ehrseq embed` wrote.")],
    data: Annotated[Path, typer.Option(help="What was embedded: a prepared dataset, FHIR or MEDS.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("phenotypes"),
    method: Annotated[
        str,
        typer.Option(help="kmeans (number by the silhouette) or gaussian_mixture (by BIC)."),
    ] = "kmeans",
    fewest: Annotated[int, typer.Option(min=2, help="Smallest number of clusters tried.")] = 2,
    most: Annotated[int, typer.Option(min=2, help="Largest number of clusters tried.")] = 10,
    variance: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the variance that the principal components keep.")
    ] = 0.9,
    resamples: Annotated[int, typer.Option(min=1, help="Pairs of fits on halves of the patients.")] = 20,
    against: Annotated[
        str, typer.Option(help="Compare with a kind of codes (diagnosis), or a pattern of codes (ICU_TYPE//*).")
    ] = "diagnosis",
    detail: Annotated[str, typer.Option(help="Groups of ICD codes: category, chapter or code.")] = "category",
    truth: Annotated[
        Path | None, typer.Option(help="Compare with known groups: Parquet or CSV with subject_id, group.")
    ] = None,
    permutations: Annotated[int, typer.Option(min=1, help="How often clusters are dealt out anew.")] = 200,
    least_patients: Annotated[
        int, typer.Option(min=1, help="What fewer patients stand behind is left out of page and tables.")
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
) -> None:
    """Group patients or visits whose vectors are alike, and tell what the groups have in common.

    Writes a page, its tables, and the cluster of each vector (which names patients: not to be passed on).
    """
    from ehrseq.representations.clustering import ClusterSettings
    from ehrseq.representations.phenotypes import find_phenotypes

    report = find_phenotypes(
        embeddings,
        data,
        out,
        settings=ClusterSettings(method, fewest, most, variance, resamples=resamples, seed=seed),
        against=against,
        detail=detail,
        truth=truth,
        permutations=permutations,
        least_patients=least_patients,
    )
    stability = report.clusters["stability"]
    typer.echo(
        f"{report.clusters['clusters']} clusters of {report.vectors:,} vectors ({report.patients:,} patients); two "
        f"halves of the patients agree to {stability['mean']:.2f} (vectors without groups {stability['no_groups']:.2f})"
    )
    for each in report.agreement:
        typer.echo(f"  {each.name}, {each.reading}: {each.value:.3f} (chance {each.chance:.3f}, p {each.p_value:.3f})")
    typer.echo(f"The page is {out / 'index.html'}")
