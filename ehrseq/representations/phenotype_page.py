"""The page of phenotypes: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ehrseq._html import COLOURS, GUIDE, figure, html_page, note, rows_as_html
from ehrseq.representations.clustering import CRITERIA
from ehrseq.representations.phenotype_report import PHENOTYPE_TABLES, PhenotypeReport
from ehrseq.work.files import check_replaceable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CODES_SHOWN = 12
_GROUPS_SHOWN = 30
_LARGEST_RATE = 0.05


def check_phenotype_folder(folder: Path) -> None:
    """Raise ValueError where a page cannot be written: it would replace what is not a page of ours."""
    ours = {"index.html", "assignments.parquet", "report.json", *(f"{name}.csv" for name in PHENOTYPE_TABLES)}
    check_replaceable(folder, ours.__contains__, "a page of `ehrseq phenotypes`")


def phenotype_page(report: PhenotypeReport) -> str:
    """The page."""
    found, stability = report.clusters, report.clusters["stability"]
    model = Path(str(report.about.get("model", "a model"))).name
    level = "visits" if report.about.get("level") == "visit" else "patients"
    criterion = "mean silhouette" if CRITERIA[report.settings.method] == "silhouette" else "BIC"
    parts = [
        f"<h1>Phenotypes of {html.escape(model)}</h1>",
        f"<p>{report.vectors:,} vectors of {level}, {report.patients:,} patients: {found['clusters']} clusters by the "
        f"{criterion} of {report.settings.fewest} to {report.settings.most}.</p>",
    ]
    cautions = [str(report.about.get("notice") or ""), *report.hidden]
    if report.without_record:
        cautions.append(f"{report.without_record:,} vectors are of patients whose record these data do not hold.")
    cautions = [text for text in cautions if text]
    parts += [note(" ".join(cautions))] if cautions else []
    parts += [
        "<h2>How many, how stable</h2>",
        _numbers(report.tables["numbers"], report.settings.method),
        f"<p>Two fits on halves of the patients agree with an adjusted Rand index of {stability['mean']:.2f} "
        f"(95 % of pairs {stability['low']:.2f} to {stability['high']:.2f}); vectors of one normal "
        f"distribution, which have no groups, give {stability['no_groups']:.2f}.</p>",
        note(
            f"{found['components']} principal components of the standardised vectors, {found['variance']:.0%} of their "
            f"variance; {found['constant_columns']} columns never change and were left out."
        ),
        _table(report.tables["sizes"], {}),
        f"<h2>Against {html.escape(report.against)}</h2>",
        _agreement(report),
        _table(report.tables["groups"].head(_GROUPS_SHOWN), {"nmi": "{:.3f}"}),
    ]
    for (cluster,), codes in sorted(
        report.tables["codes"].partition_by("cluster", as_dict=True, maintain_order=True).items()
    ):
        parts += [f"<h2>Cluster {cluster}</h2>", _codes(codes)]
    return html_page(f"Phenotypes of {model}", parts)


def _numbers(table: pl.DataFrame, method: str) -> str:
    name = CRITERIA[method]
    chosen = table.filter("chosen")

    def draw(axes: Sequence[Axes]) -> None:
        axes[0].plot(table["clusters"].to_list(), table[name].to_list(), color=COLOURS[0], marker="o", ms=4)
        axes[0].plot(chosen["clusters"].to_list(), chosen[name].to_list(), color=COLOURS[1], marker="o", ms=7, ls="")
        axes[0].set(xlabel="clusters", ylabel="mean silhouette" if name == "silhouette" else "BIC")
        if name == "silhouette":
            axes[0].axhline(0, color=GUIDE, lw=0.9, ls=":")

    return figure(draw, height=2.4)


def _agreement(report: PhenotypeReport) -> str:
    if not report.agreement:
        return note("No vector has such a group: there is nothing to compare with.")
    table = pl.DataFrame(
        {
            "figure": [f"{each.name}, {each.reading}" for each in report.agreement],
            "value": [each.value for each in report.agreement],
            "chance": [each.chance for each in report.agreement],
            "chance, 95th percentile": [each.chance_high for each in report.agreement],
            "p": [each.p_value for each in report.agreement],
            "vectors": [each.vectors for each in report.agreement],
        }
    )
    formats = dict.fromkeys(("value", "chance", "chance, 95th percentile", "p"), "{:.3f}")
    return _table(table, formats) + note(
        "First group: each vector counts for the rarest of its groups. Every group: it counts for all of them; purity "
        "is the share that has the most frequent group of its cluster, nmi (normalised mutual information) the mean "
        "over groups. Chance: the same clusters dealt out to other patients."
    )


def _codes(codes: pl.DataFrame) -> str:
    size = codes.row(0, named=True)
    head = f"<p>{size['patients']:,} patients, {size['others']:,} others.</p>"
    listed = codes.filter((pl.col("q_value") < _LARGEST_RATE) & (pl.col("odds_ratio") > 1))
    if listed.is_empty():
        return head + note("No code is more frequent here than elsewhere beyond chance.")
    shown = listed.sort("low", "code", descending=[True, False]).head(_CODES_SHOWN)
    table = shown.select(
        "code",
        "kind",
        pl.col("share").alias("here"),
        pl.col("share_outside").alias("elsewhere"),
        pl.col("odds_ratio").alias("odds ratio"),
        pl.col("low").alias("from"),
        pl.col("high").alias("to"),
        pl.col("q_value").alias("q"),
    )
    formats = {
        "here": "{:.0%}",
        "elsewhere": "{:.0%}",
        "q": "{:.1g}",
        **dict.fromkeys(("odds ratio", "from", "to"), "{:.2f}"),
    }
    return (
        head
        + _table(table, formats)
        + note(
            f"The {shown.height} of {listed.height:,} codes more frequent here with the largest lower end; intervals "
            "hold together at 95 % over all codes and clusters, q is the false discovery rate."
        )
    )


def _table(table: pl.DataFrame, formats: dict[str, str]) -> str:
    def cell(name: str, value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool | int):
            return f"{value:,}" if not isinstance(value, bool) else ("yes" if value else "")
        return formats.get(name, "{:.3f}").format(value) if isinstance(value, float) else html.escape(str(value))

    whole = rows_as_html(table.columns, table.iter_rows(), cell)
    return f"<div class=wide>{whole}</div>" if whole else ""
