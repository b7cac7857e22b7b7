"""Push a finetuned checkpoint with a model card that is filled from its evaluation, in one commit.

    python examples/05_push_to_hub.py --model runs/finetune --scores risks.parquet --repo_id me/ehrmamba-simulated

The scores are the table that 04_predict.py wrote. For real data name it and its terms, e.g. `--data_name MIMIC-IV
--data_version 3.1 --simulated false --credentialed true`: such weights are refused unless `--allow_credentialed true`.
"""

import sys
from dataclasses import dataclass, field

import polars as pl
from transformers import AutoConfig, HfArgumentParser

from ehrseq.evaluation import evaluate_tasks, metrics_table
from ehrseq.hub import DataDescription, EhrModelCard, push_to_hub


@dataclass
class Arguments:
    """Options of this script."""

    model: str = field(metadata={"help": "Folder of the finetuned checkpoint."})
    repo_id: str = field(metadata={"help": "owner/name on the Hub; created when it does not exist."})
    scores: str | None = field(default=None, metadata={"help": "Table of held-out scores from 04_predict.py."})
    data_name: str = field(default="simulated FHIR records", metadata={"help": "Name of the data."})
    data_version: str | None = field(default=None, metadata={"help": "Version of the data."})
    simulated: bool = field(default=True, metadata={"help": "No real person is in the data."})
    credentialed: bool = field(default=False, metadata={"help": "Access to the data needs a signed agreement."})
    allow_credentialed: bool = field(default=False, metadata={"help": "You may share weights of such data."})
    license: str | None = field(default=None, metadata={"help": "License of the weights, as the Hub writes it."})
    private: bool | None = field(default=None, metadata={"help": "Create a private repository."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})


def main() -> None:
    """Evaluate the held-out scores, write the card, push."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    names = [task["name"] for task in AutoConfig.from_pretrained(arguments.model).tasks]
    results, counts = {}, {}
    if arguments.scores is not None:
        table = pl.read_parquet(arguments.scores)
        task_ids = table["task"].replace_strict(names, list(range(len(names))), return_dtype=pl.Int64)
        results = evaluate_tasks(table["label"], table["score"], task_ids, table["subject_id"], names)
        counts = {"held-out patients": table["subject_id"].n_unique(), "held-out rows": table.height}
        print(metrics_table(results))

    data = DataDescription(
        arguments.data_name,
        version=arguments.data_version,
        counts=counts,
        simulated=arguments.simulated,
        credentialed=arguments.credentialed,
    )
    name = arguments.repo_id.split("/")[-1]
    card = EhrModelCard(name, data=data, results=results, license=arguments.license)
    commit = push_to_hub(
        arguments.model,
        arguments.repo_id,
        card=card,
        private=arguments.private,
        revision=arguments.revision,
        allow_credentialed=arguments.allow_credentialed,
    )
    print(f"{commit.commit_url}\nload it with: pipeline('ehr-risk', model='{arguments.repo_id}')")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
