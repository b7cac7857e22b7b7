r"""What models know beyond a risk: linear probes, phenotypes and next medications, on open data and with known truth.

    simulated   patients of `ehrseq demo` (seed 0), whose true groups are known: the chronic diseases that are coded,
                and the fifth of the true risk of readmission at the last discharge
    mimic       the demo of MIMIC-IV in MEDS, 100 patients; a small model is pretrained on its training patients
    stays       PhysioNet-2012, set a to learn on, set b to test on; HyMaTE is pretrained on set a

Beside each model stand the same model with random weights, and vectors that say which of the frequent codes a record
holds (of stays: the mean of each variable): what a model has learnt is what it adds to these.

    python -m benchmarks.tables.beyond_classification simulated --output runs/beyond
    python -m benchmarks.tables.beyond_classification mimic --data MEDS_FOLDER --output runs/beyond
    python -m benchmarks.tables.beyond_classification stays --data PHYSIONET2012_FOLDER --output runs/beyond

--quick takes few of everything: does it run?
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import ehrseq  # noqa: F401  registers the classes with the Auto classes
from benchmarks.harness import machine, write_json, write_parquet
from ehrseq.benchmark.medications import recommend_medications
from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.physionet2012.codes import ICU_TYPES
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.data.shards import dataset_shards
from ehrseq.data.simulate.codes import CHRONIC
from ehrseq.data.simulate.cohort import Simulation, simulate, simulated_name
from ehrseq.data.sources import load_events
from ehrseq.data.splits import assign_splits
from ehrseq.encode.triplets import PHYSIONET2012, TripletTable, build_triplets, hold_out_stays
from ehrseq.forecasting.medications import MedicationReport
from ehrseq.hub.checkpoints import load_backbone, save_checkpoint
from ehrseq.hub.families import STARTER, STARTER_FORECAST
from ehrseq.representations.cluster_codes import codes_of_vectors
from ehrseq.representations.clustering import ClusterSettings
from ehrseq.representations.embedding_files import Embeddings, read_embeddings, with_vectors
from ehrseq.representations.embeddings import embed_dataset
from ehrseq.representations.phenotype_report import PhenotypeReport
from ehrseq.representations.phenotypes import find_phenotypes
from ehrseq.representations.probe import ProbeReport, probe_tasks
from ehrseq.tasks import label_events
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.work.engine import get_engine
from ehrseq.work.files import write_whole

ONE = get_engine(num_workers=1)
CODES, RANDOM = "codes of the record", "random weights"
PROBED = ("readmission_30d", "mortality_30d", "hypertension")
FREQUENT_CODES = 300
MOST_LABELS = 1500  # of a task and split
MIMIC_SPLITS = {"pretrain": 0.5, "train": 0.15, "tuning": 0.1, "held_out": 0.25}
PARTS = ("probes", "phenotypes", "medications")
TRUTHS = {"chronic": "chronic diseases coded", "risk": "fifth of the true readmission risk"}


def random_twin(checkpoint: Path, folder: Path) -> Path:
    """The same model with weights that were never trained."""
    if not folder.is_dir():
        backbone = load_backbone(checkpoint)
        torch.manual_seed(0)
        model = type(backbone.model)(backbone.model.config)
        save_checkpoint(folder, model, backbone.encoder)
    return folder


def code_vectors(vectors: Embeddings, data: Path, split_of: pl.DataFrame, file: Path) -> Path:
    """Which frequent codes of training patients each record holds, 0 or 1, as a file of vectors."""
    pairs = pl.concat([*codes_of_vectors(vectors.table, dataset_shards(data))])
    train = vectors.table.with_row_index("row").join(split_of.filter(pl.col("split") == "train"), on="subject_id")[
        "row"
    ]
    frequent = (
        pairs.filter(pl.col("row").is_in(train.cast(pl.Int64).implode()))["code"]
        .value_counts()
        .sort("count", "code", descending=[True, False])["code"]
        .head(FREQUENT_CODES)
    )
    place = pl.DataFrame({"code": frequent, "column": np.arange(len(frequent))})
    held = pairs.join(place, on="code")
    matrix = np.zeros((len(vectors), len(frequent)), np.float32)
    matrix[held["row"].to_numpy(), held["column"].to_numpy()] = 1
    write_parquet(with_vectors(vectors.table, matrix), file)
    return file


def few_labels(labels: Mapping[str, pl.DataFrame], split_of: pl.DataFrame, most: int) -> dict[str, pl.DataFrame]:
    """At most so many labels of each task and split, drawn at random."""
    drawn = {}
    for task, table in labels.items():
        rows = table.join(split_of, on="subject_id").filter(pl.col("split").is_in(["train", "tuning", "held_out"]))
        parts = [part.sort(LABEL_KEYS).sample(min(most, part.height), seed=0) for part in rows.partition_by("split")]
        drawn[task] = pl.concat(parts).select(*LABEL_KEYS, "boolean_value").sort(LABEL_KEYS)
    return drawn


# -- simulated patients ------------------------------------------------------------------------------------------------


def simulated(options: argparse.Namespace) -> dict[str, Any]:
    """Probes, phenotypes against known groups, medications."""
    cohort = simulate(options.patients, 0, progress=False)
    data = options.output / "simulated" / "dataset"
    if not data.is_dir():
        write_whole(data, lambda path: write_dataset(cohort.events(), path, dataset_name=simulated_name(0)))
    events, split_of = EventDataset(data).events(), EventDataset(data).splits
    found = label_events(events, PROBED, end_of_data=cohort.end_of_data).labels
    labels = few_labels(found, split_of, options.labels)
    folder = options.output / "simulated"
    models = {"EhrMamba, pretrained": STARTER_FORECAST, "EhrMamba, finetuned": STARTER}
    models[RANDOM] = random_twin(STARTER_FORECAST, folder / "random")
    files = {name: folder / f"{name}.parquet" for name in models}
    for name, checkpoint in models.items():
        if not files[name].is_file():
            embed_dataset(checkpoint, data, files[name], labels=labels, engine=ONE)
    files[CODES] = folder / f"{CODES}.parquet"
    if not files[CODES].is_file():
        code_vectors(read_embeddings(files[RANDOM]), data, split_of, files[CODES])
    probes, phenotypes, medications = None, {}, None
    if "probes" in options.parts:
        probes = probe_tasks(files, data, labels=labels, sizes=options.sizes, num_resamples=options.resamples)
        print(probes.to_markdown(), flush=True)
    if "phenotypes" in options.parts:
        last = labels["readmission_30d"].group_by("subject_id").agg(pl.col("prediction_time").max()).sort("subject_id")
        truths = known_groups(cohort, events, last)
        for name, file in files.items():
            every = read_embeddings(file)
            rows = every.table.with_row_index("row").join(last, on=list(LABEL_KEYS))["row"].to_numpy()
            chosen = folder / "last.parquet"
            write_parquet(with_vectors(every.table[rows], every.vectors[rows]), chosen)
            for truth, table in truths.items():
                out = folder / "phenotypes" / f"{name}-{truth}"
                report = find_phenotypes(chosen, data, out, settings=options.clusters, truth=table)
                phenotypes[f"{name} | {TRUTHS[truth]}"] = report
        print("\n".join(phenotype_lines(phenotypes)), flush=True)
    if "medications" in options.parts:
        medications = recommended(options, data, models, STARTER_FORECAST, folder, ("train",))
    return result(probes, phenotypes, medications)


def recommended(
    options: argparse.Namespace,
    data: Path,
    models: Mapping[str, Path],
    pretrained: Path,
    folder: Path,
    learn_from: Sequence[str],
) -> MedicationReport:
    """Next medications of a dataset's held-out visits."""
    start = time.perf_counter()
    report = recommend_medications(
        data,
        models,
        pretrained=pretrained,
        learn_from=learn_from,
        num=options.num,
        most_questions=options.questions,
        num_resamples=options.resamples,
        out=folder / "medications",
        engine=ONE,
    )
    print(report.to_markdown(), f"{time.perf_counter() - start:.0f} s\n", flush=True)
    return report


def known_groups(cohort: Simulation, events: pl.DataFrame, times: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """subject_id, group: the chronic diseases coded by each time, and the fifth of the true risk."""
    names = {f"DIAGNOSIS//ICD10CM//{code}": name for name, code, _ in CHRONIC}
    coded = events.filter(pl.col("code").is_in(list(names))).join(times, on="subject_id")
    coded = coded.filter(pl.col("time") <= pl.col("prediction_time")).select("subject_id", group="code").unique()
    subjects, at = times["subject_id"].to_numpy(), times["prediction_time"].to_numpy()
    risk = cohort.true_risk("readmission_30d", subjects, at)
    fifths = np.searchsorted(np.quantile(risk, [0.2, 0.4, 0.6, 0.8]), risk)
    of_risk = pl.DataFrame({"subject_id": subjects, "group": fifths + 1}).with_columns(pl.col("group").cast(pl.String))
    return {"chronic": coded.with_columns(pl.col("group").replace_strict(names)), "risk": of_risk}


# -- MIMIC-IV demo -----------------------------------------------------------------------------------------------------


def mimic(options: argparse.Namespace) -> dict[str, Any]:
    """Phenotypes against diagnoses, and medications; a probe of 100 patients could say nothing."""
    folder = options.output / "mimic"
    data = folder / "dataset"
    if not data.is_dir():
        events, told = load_events(options.data, progress=False)
        splits = assign_splits(events["subject_id"].unique(), fractions=MIMIC_SPLITS)
        write_whole(data, lambda path: write_dataset(events, path, dataset_name="demo", splits=splits, report=told))
    events = EventDataset(data).events(["pretrain", "train"])
    checkpoint = pretrained_on(events, folder / "pretrained", options.tokens)
    models = {"EhrMamba, pretrained": checkpoint, RANDOM: random_twin(checkpoint, folder / "random")}
    phenotypes = {}
    for name, each in models.items():
        file = folder / f"{name}.parquet"
        embed_dataset(each, data, file, engine=ONE)
        for detail in ("chapter", "category"):
            out = folder / "phenotypes" / f"{name}-{detail}"
            report = find_phenotypes(file, data, out, settings=options.clusters, detail=detail)
            phenotypes[f"{name} | diagnoses, by {detail}"] = report
    print("\n".join(phenotype_lines(phenotypes)), flush=True)
    medications = recommended(options, data, models, checkpoint, folder, ("train", "pretrain"))
    return result(None, phenotypes, medications)


def pretrained_on(events: pl.DataFrame, folder: Path, tokens: int) -> Path:
    """A small EhrMamba that has read these patients, with its tokenizer."""
    from transformers import AutoModelForCausalLM

    from ehrseq.batches.packing import DataCollatorForPackedNextToken, PackableRows
    from ehrseq.training.stages import train_for_tokens
    from ehrseq.training.trainer import model_config

    tokenizer = EhrTokenizer.train(events, min_count=5)
    config = model_config(tokenizer, hidden_size=64, num_hidden_layers=1, max_position_embeddings=512)
    windows = tokenizer.encode_histories(events).windows(512)
    train_for_tokens(
        folder,
        lambda: AutoModelForCausalLM.from_config(config),
        PackableRows(windows),
        DataCollatorForPackedNextToken(tokenizer, 512),
        tokens=tokens,
        batch_size=8,
        rate=3e-3,
        seed=0,
        encoder=tokenizer,
    )
    return folder


# -- PhysioNet-2012 ----------------------------------------------------------------------------------------------------


def stays(options: argparse.Namespace) -> dict[str, Any]:
    """Probe of death in hospital, phenotypes against the kind of intensive care unit and the outcome."""
    from ehrseq.training import TripletRecipe, pretrain, read_recipe

    folder = options.output / "stays"
    sets = {name: some_stays(set_of(options.data, name), options.stays) for name in "ab"}
    tables = {name: build_triplets(each[0], PHYSIONET2012, each[1]) for name, each in sets.items()}
    train, tuning = hold_out_stays(tables["a"], 0.2)
    extractor = HyMaTEFeatureExtractor.fit(train)
    recipe = read_recipe("hymate_quick", [f"pretrain.epochs={options.epochs}"])
    if not isinstance(recipe, TripletRecipe):
        raise SystemExit("hymate_quick is no recipe of stays.")
    checkpoint = folder / "forecast"
    pretrain(recipe, extractor, train, tuning, checkpoint)
    events, labels = (pl.concat(parts) for parts in zip(*sets.values(), strict=True))
    split_of = pl.concat(
        [
            pl.DataFrame({"subject_id": rows}).with_columns(split=pl.lit(split))
            for split, rows in (
                ("train", train.subject_ids), ("tuning", tuning.subject_ids), ("held_out", tables["b"].subject_ids)
            )
        ]
    )  # fmt: skip
    models = {"HyMaTE, pretrained": checkpoint, RANDOM: random_twin(checkpoint, folder / "random")}
    files = {name: folder / f"{name}.parquet" for name in models}
    for name, each in models.items():
        if not files[name].is_file():
            embed_dataset(each, events, files[name], labels={"death": labels}, engine=ONE)
    keys = read_embeddings(files[RANDOM]).table
    files["means of the variables"] = mean_vectors(events, labels, keys, folder / "means.parquet")
    probes = probe_tasks(
        files, None, labels={"in_hospital_death": labels}, splits=split_of, sizes=options.sizes,
        num_resamples=options.resamples,
    )  # fmt: skip
    print(probes.to_markdown(), flush=True)
    phenotypes = {}
    units = icu_types(events)
    died = labels.select("subject_id", group=pl.col("boolean_value").cast(pl.String))
    for name, file in files.items():
        for truth, table in {"type of unit": units, "death in hospital": died}.items():
            out = folder / "phenotypes" / f"{name}-{truth}"
            report = find_phenotypes(file, events, out, settings=options.clusters, truth=table)
            phenotypes[f"{name} | {truth}"] = report
    print("\n".join(phenotype_lines(phenotypes)), flush=True)
    return result(probes, phenotypes, None)


def some_stays(path: Path, most: int | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and labels of a set; of so many stays at most, drawn at random."""
    whole = load_physionet2012(path)
    subjects = whole.labels["subject_id"].unique().sort()
    if most is not None and len(subjects) > most:
        subjects = subjects.sample(most, seed=0)
    these = pl.col("subject_id").is_in(subjects.implode())
    return whole.events.filter(these), whole.labels.filter(these)


def set_of(data: Path, name: str) -> Path:
    """A set of the challenge: an archive, or a folder."""
    return next(path for path in (data / f"set-{name}.tar.gz", data / f"set-{name}", data / name) if path.exists())


def mean_vectors(events: pl.DataFrame, labels: pl.DataFrame, keys: pl.DataFrame, file: Path) -> Path:
    """The mean of each variable of each stay, that of all stays where it was never measured."""
    table: TripletTable = build_triplets(events, PHYSIONET2012, labels)
    size = len(PHYSIONET2012.variables)
    sums, counts = np.zeros((2, len(table), size))
    np.add.at(sums, (table.stay_ids, table.variable_ids), table.values)
    np.add.at(counts, (table.stay_ids, table.variable_ids), 1)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    measured = np.maximum((counts > 0).sum(axis=0), 1)  # a variable that nobody has has the mean 0
    means = np.where(np.isnan(means), np.nansum(means, axis=0) / measured, means)
    whole = np.hstack([means, counts > 0, np.nan_to_num(table.static)]).astype(np.float32)
    rows = pl.DataFrame({"subject_id": table.subject_ids, "row": np.arange(len(table))})
    place = keys.join(rows, on="subject_id", how="left", maintain_order="left")["row"].to_numpy()
    write_parquet(with_vectors(keys, whole[place]), file)
    return file


def icu_types(events: pl.DataFrame) -> pl.DataFrame:
    """subject_id, group: the kind of unit of each stay."""
    rows = events.filter(pl.col("code").str.contains("//ICUType//")).select("subject_id", group="code").unique()
    names = {int(number): str(name) for number, name in ICU_TYPES.items()}
    number = pl.col("group").str.split("//").list.last().cast(pl.Int64)
    return rows.with_columns(group=number.replace_strict(names))


# -- the tables --------------------------------------------------------------------------------------------------------


def phenotype_lines(reports: Mapping[str, PhenotypeReport]) -> Iterator[str]:
    """One row for each model and known division."""
    yield "| vectors | against | clusters | silhouette | stability | no groups | purity | chance | NMI | chance | p |"
    yield "|---|---|" + "---:|" * 9
    for name, report in reports.items():
        tried = report.tables["numbers"].filter("chosen")
        stability = report.clusters["stability"]
        reading = (
            "first group" if not any(each.reading == "every group" for each in report.agreement) else "every group"
        )
        figures = {each.name: each for each in report.agreement if each.reading == reading}
        single = {each.name: each for each in report.agreement if each.reading == "first group"}
        used = figures if set(figures) >= {"purity", "nmi"} else single
        cells = [
            str(report.clusters["clusters"]), f"{tried['silhouette'].item():.3f}", f"{stability['mean']:.2f}",
            f"{stability['no_groups']:.2f}",
        ]  # fmt: skip
        if used:
            for figure in ("purity", "nmi"):
                cells += [f"{used[figure].value:.3f}", f"{used[figure].chance:.3f}"]
            cells.append(f"{used['nmi'].p_value:.3f}")
        yield f"| {' | '.join([*name.split(' | '), *cells])} |"
    yield ""


def result(
    probes: ProbeReport | None, phenotypes: Mapping[str, PhenotypeReport], medications: MedicationReport | None
) -> dict[str, Any]:
    """What is written."""
    told: dict[str, Any] = {"phenotypes": {name: each.to_dict() for name, each in phenotypes.items()}}
    if medications is not None:
        told["medications"] = medications.to_dict()
    if probes is not None:
        told["probes"] = [
            {
                "embeddings": each.name,
                "task": each.task,
                "counts": each.counts,
                "shots": [asdict(s) for s in each.shots],
            }
            | {"whole": None if each.whole is None else asdict(each.whole), "reason": each.reason}
            for each in probes.probes
        ]
    return told


SETS = {"simulated": simulated, "mimic": mimic, "stays": stays}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one set and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("--output", type=Path, required=True, help="folder of what is measured")
    parser.add_argument("--data", type=Path, help="mimic: MEDS folder; stays: folder of set-a and set-b")
    parser.add_argument("--patients", type=int, default=4000, help="simulated patients")
    parser.add_argument("--labels", type=int, default=MOST_LABELS, help="labels of a task and split, at most")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 50, 100, 500, 1000], help="few-shot sizes")
    parser.add_argument("--num", type=int, default=16, help="futures of a visit")
    parser.add_argument("--questions", type=int, default=200, help="held-out visits with drugs, at most")
    parser.add_argument("--tokens", type=int, default=400_000, help="mimic: tokens of pretraining")
    parser.add_argument("--stays", type=int, help="stays of each set, at most; by default all")
    parser.add_argument("--epochs", type=int, default=3, help="stays: epochs of pretraining")
    parser.add_argument("--most", type=int, default=8, help="clusters at most")
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap resamples of patients")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what is measured")
    parser.add_argument("--quick", action="store_true", help="few of everything: does it run?")
    options = parser.parse_args(arguments)
    if options.set != "simulated" and options.data is None:
        raise SystemExit(f"{options.set} needs --data.")
    if options.quick:
        options.patients, options.labels, options.sizes, options.num, options.questions = 400, 150, [10, 20], 2, 12
        options.tokens, options.epochs, options.most, options.resamples = 2000, 1, 3, 9
    torch.set_num_threads(options.threads)
    options.clusters = ClusterSettings(most=options.most, resamples=3 if options.quick else 20)
    start = time.perf_counter()
    found = SETS[options.set](options)
    seconds = time.perf_counter() - start
    command = f"python -m benchmarks.tables.beyond_classification {' '.join(map(str, sys.argv[1:]))}"
    write_json(
        {"set": options.set, "command": command, "seconds": seconds, **found, "machine": machine()},
        options.output / options.set / "result.json",
    )
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
