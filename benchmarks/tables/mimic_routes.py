"""The same 100 patients of MIMIC-IV's demo by two routes, FHIR and MEDS, event class by event class.

Both are prepared, patients are matched by MIMIC's subject_id, and a row of one route counts as found in the other where
that has a row of the same patient, item and instant. MIMIC on FHIR states zones (so its times become UTC), the MEDS
demo holds the hospital's wall clock: instants agree up to four or five hours.

    python -m benchmarks.tables.mimic_routes --output runs/bench/mimic_routes.json
"""

import gzip
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from benchmarks.harness import benchmark_parser, finish
from ehrseq.data import EventDataset
from ehrseq.prepare import prepare_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
FHIR = Path("mimic-iv-fhir-demo/2.1.0/fhir")
OFFSETS = (4, 5)  # hours by which Boston's wall clock is behind UTC


@dataclass(frozen=True)
class Pair:
    """A class of events by both routes.

    Attributes:
        name: The class.
        fhir, meds: Pattern of the codes, whose first group is the item (without a group: no item is compared); empty
            where the route has nothing of it. `taken:<file>` are the resources of a file at the times that they are
            about, as FHIR states them beside those of their issue.
        why: What explains the difference.
        unit: Unit that the rows of FHIR must have.
    """

    name: str
    fhir: str
    meds: str
    why: str
    unit: str | None = None


PAIRS = (
    Pair("patients (birth)", r"^MEDS_BIRTH$", r"^MEDS_BIRTH$", "FHIR states the day of birth, MEDS its year"),
    Pair("deaths", r"^MEDS_DEATH$", r"^MEDS_DEATH$", "FHIR states the day; MEDS the minute of those in hospital"),
    Pair("hospital stays, start", r"^VISIT_START//IMP", r"^HOSPITAL_ADMISSION", "equal"),
    Pair("ICU stays, start", r"^VISIT_START//ACUTE", r"^ICU_ADMISSION", "equal"),
    Pair(
        "emergency visits, start",
        r"^VISIT_START//EMER",
        r"^ED_REGISTRATION",
        "FHIR has every emergency visit (MIMIC-IV-ED); MEDS those registered before an admission",
    ),
    Pair(
        "laboratory, when issued",
        r"^LAB//MIMIC-D-LABITEMS//(\d+)",
        r"^LAB//(5\d{4})//",
        "FHIR's rows stand where the result was issued, MEDS's where the specimen was taken",
    ),
    Pair(
        "laboratory, when taken", "taken:MimicObservationLabevents", r"^LAB//(5\d{4})//", "equal but for repeated rows"
    ),
    Pair("ICU charts", "", r"^LAB//(22\d{4})//", "chart events are not in the FHIR demo"),
    Pair("microbiology", r"^LAB//MIMIC-MICRO", "", "not in the MEDS demo"),
    Pair("vital signs, emergency", r"^VITAL//LOINC", "", "MIMIC-IV-ED is not in the MEDS demo"),
    Pair("body measures, outpatient", "", r"^(?:Blood Pressure|Weight|BMI|Height)", "OMR is not in the FHIR demo"),
    Pair(
        "fluid output, when issued",
        r"^OBSERVATION//MIMIC-D-ITEMS//(\d+)",
        r"^SUBJECT_FLUID_OUTPUT//(\d+)",
        "as with the laboratory; amounts charted again at one time are one row",
        "ml",
    ),
    Pair("fluid output, when measured", "taken:MimicObservationOutputevents", r"^SUBJECT_FLUID_OUTPUT//(\d+)", "equal"),
    Pair(
        "ICU infusions, end",
        r"^MEDICATION//MIMIC-MEDICATION-ICU//(\d+)",
        r"^INFUSION_END//(\d+)",
        "equal but for repeated rows: MEDS also keeps rates, and starts as events",
    ),
    Pair(
        "administrations",
        "taken:MimicMedicationAdministration",
        r"^MEDICATION//(?!START|STOP)",
        "FHIR leaves out what was not given; MEDS names the event (flushed, not given)",
    ),
    Pair("orders and dispenses", "", r"^MEDICATION//(?:START|STOP)", "FHIR: 17,552 requests and 15,375 dispenses"),
    Pair("procedures, ICD", r"^PROCEDURE//ICD[^/]+//(.+)", r"^PROCEDURE//ICD//\d+//(.+)", "equal"),
    Pair("procedures, ICU, end", r"^PROCEDURE//MIMIC-D-ITEMS//(\d+)", r"^PROCEDURE//END//(\d+)", "equal"),
    Pair("procedures, emergency", r"^PROCEDURE//SNOMED", "", "MIMIC-IV-ED is not in the MEDS demo"),
    Pair("procedures, billed (HCPCS)", "", r"^HCPCS", "not in the FHIR demo"),
    Pair(
        "diagnoses",
        r"^DIAGNOSIS//ICD[^/]+//(.+)",
        r"^DIAGNOSIS//ICD//\d+//(.+)",
        "FHIR adds those of emergency visits",
    ),
)


def mimic_ids(source: Path) -> dict[str, int]:
    """FHIR id of a patient -> MIMIC's subject_id."""
    with gzip.open(source / "MimicPatient.ndjson.gz") as lines:
        patients = [orjson.loads(line) for line in lines]
    return {patient["id"]: int(patient["identifier"][0]["value"]) for patient in patients}


def taken(source: Path, name: str) -> pl.DataFrame:
    """subject_id, time, item of the resources of a file, at their effective time."""
    ids = mimic_ids(source)
    rows = []
    with gzip.open(source / f"{name}.ndjson.gz") as lines:
        for line in lines:
            resource = orjson.loads(line)
            when = resource.get("effectiveDateTime") or (resource.get("effectivePeriod") or {}).get("end")
            item = resource["code"]["coding"][0]["code"] if "code" in resource else ""
            rows.append((ids[resource["subject"]["reference"].rpartition("/")[2]], when, item))
    frame = pl.DataFrame(rows, schema={"subject_id": pl.Int64, "time": pl.String, "item": pl.String}, orient="row")
    time = pl.col("time").str.to_datetime(time_zone="UTC", time_unit="us").dt.replace_time_zone(None)
    return frame.with_columns(time)


def routes(data: Path, scratch: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events of both routes under MIMIC's subject_ids."""
    source = data / FHIR
    prepare_dataset(source, scratch / "fhir")
    prepare_dataset(data / "mimic-iv-demo-meds" / "0.0.1", scratch / "meds")
    ids = pl.read_parquet(scratch / "fhir" / "metadata" / "subject_ids.parquet")
    ids = ids.with_columns(pl.col("source_id").replace_strict(mimic_ids(source), return_dtype=pl.Int64).alias("mimic"))
    events = EventDataset(scratch / "fhir").events().join(ids, on="subject_id")
    fhir = events.with_columns(pl.col("mimic").alias("subject_id")).drop("mimic", "source_id")
    return fhir, EventDataset(scratch / "meds").events()


def rows_of(events: pl.DataFrame, pattern: str, unit: str | None = None) -> pl.DataFrame:
    """subject_id, time, item of a class."""
    if not pattern:
        return events.head(0).select("subject_id", "time", pl.col("code").alias("item"))
    # Polars' patterns know no look-ahead.
    negative = None
    if "(?!" in pattern:
        start, _, rest = pattern.partition("(?!")
        negative, _, end = rest.partition(")")
        negative, pattern = start + negative, start + end
    rows = events.filter(pl.col("code").str.contains(pattern))
    if negative is not None:
        rows = rows.filter(~pl.col("code").str.contains(negative))
    if unit is not None:
        rows = rows.filter(pl.col("unit") == unit)
    grouped = pattern.replace("(?:", "").count("(") > 0
    item = pl.col("code").str.extract(pattern, 1).str.replace_all(".", "", literal=True) if grouped else pl.lit("")
    return rows.select("subject_id", "time", item.alias("item"))


def found(rows: pl.DataFrame, others: pl.DataFrame, sign: int) -> int:
    """Rows that the other route has, at one of the offsets (`sign` -1: from UTC to the wall clock)."""
    if rows.is_empty() or others.is_empty():
        return 0
    rows = rows.with_row_index("row")
    hits = [
        rows.with_columns(pl.col("time") + pl.duration(hours=sign * hours)).join(
            others, on=["subject_id", "time", "item"], how="semi", nulls_equal=True
        )["row"]
        for hours in (0, *OFFSETS)
    ]
    return pl.concat(hits).n_unique()


def compare(fhir: pl.DataFrame, meds: pl.DataFrame, source: Path) -> list[dict[str, Any]]:
    """A row a class."""
    table = []
    for pair in PAIRS:
        file = pair.fhir.removeprefix("taken:")
        ours = rows_of(fhir, pair.fhir, pair.unit) if file == pair.fhir else taken(source, file)
        theirs = rows_of(meds, pair.meds)
        table.append(
            {
                "class": pair.name,
                "FHIR": ours.height,
                "MEDS": theirs.height,
                "FHIR found in MEDS": found(ours, theirs, -1),
                "MEDS found in FHIR": found(theirs, ours, 1),
                "why": pair.why,
            }
        )
    return table


def main() -> None:
    """Compare, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, help="folder of open data; default: EHRSEQ_DATA")
    options = parser.parse_args()
    data = options.data or Path(os.environ.get("EHRSEQ_DATA", REPOSITORY.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as scratch:
        fhir, meds = routes(data, Path(scratch))
    table = compare(fhir, meds, data / FHIR)
    names = list(table[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in table:
        print("| " + " | ".join(f"{value:,}" if isinstance(value, int) else value for value in row.values()) + " |")
    finish({"classes": table, "fhir_events": fhir.height, "meds_events": meds.height}, options.output, show=False)


if __name__ == "__main__":
    main()
