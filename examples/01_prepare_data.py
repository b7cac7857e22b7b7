"""Records in, everything that training needs out: a MEDS dataset with splits, labels per task, a tokenizer.

python examples/01_prepare_data.py --output runs/data                      # simulated patients
python examples/01_prepare_data.py --output runs/data --source fhir_or_meds_folder

`--tasks` takes names or YAML files.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.data.sources import load_events
from ehrseq.data.splits import assign_splits
from ehrseq.tasks import label_events, load_task, write_labels
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


@dataclass
class Arguments:
    """Options of this script."""

    output: str = field(metadata={"help": "Folder to write: dataset/ and tokenizer/."})
    source: str | None = field(default=None, metadata={"help": "FHIR or MEDS folder; simulated patients when absent."})
    num_patients: int = field(default=5000, metadata={"help": "Simulated patients."})
    seed: int = field(default=0, metadata={"help": "Seed of the simulation and of the splits."})
    tasks: list[str] = field(
        default_factory=lambda: [
            *("mortality_30d", "long_stay_7d", "readmission_30d"),
            *("hypertension", "fluid_disorder", "lipid_disorder"),
        ],
        metadata={"help": "Names of tasks, or YAML files."},
    )
    min_count: int = field(default=1, metadata={"help": "A code that occurs less often falls back to its parents."})
    context: int = field(default=2048, metadata={"help": "Context length kept in the tokenizer."})


def main() -> None:
    """Read, split, label, fit the tokenizer."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    # What is wrong with the tasks or the folder is told before anything is read.
    tasks = [load_task(task) for task in arguments.tasks]
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    end_of_data, report, source_splits = None, None, None
    if arguments.source is None:
        cohort = simulate(arguments.num_patients, arguments.seed)
        events, end_of_data, name = cohort.events(), cohort.end_of_data, "ehrseq-simulated"
    else:
        events, report = load_events(arguments.source)
        source_splits, name = report.source_splits, Path(arguments.source).name
        print(report)

    splits = assign_splits(events["subject_id"].unique(), seed=arguments.seed, source_splits=source_splits)
    dataset = write_dataset(events, output / "dataset", dataset_name=name, splits=splits, report=report, overwrite=True)
    labels = label_events(events, tasks, end_of_data=end_of_data)
    write_labels(labels, dataset.path)
    for task, table in labels.labels.items():
        print(f"{task}: {table.height:,} labels, {table['boolean_value'].sum():,} positive, {labels.report[task]}")

    tokenizer = EhrTokenizer.train(
        dataset.events(["pretrain", "train"]),
        tasks=[task.to_config() for task in tasks],
        min_count=arguments.min_count,
        model_max_length=arguments.context,
    )
    tokenizer.save_pretrained(output / "tokenizer")
    print(f"{len(tokenizer):,} tokens; coverage of all events: {tokenizer.coverage(events)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
