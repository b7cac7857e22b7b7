"""`ehrseq train`: from a labelled dataset to a trained and evaluated model in one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import check_folder


def train_command(
    dataset: Annotated[
        Path | None, typer.Argument(help="Dataset with labels (`ehrseq prepare`, `ehrseq label`).", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write: checkpoint, tokenizer, card, evaluation; in `pretrained` the model that forecasts.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe (--list), or a YAML file.")] = "ehrmamba_quick",
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change one value of the recipe, as KEY=VALUE; repeat. Stages take any field of TrainingArguments: "
            "finetune.learning_rate=1e-3, model.hidden_size=64, bf16=true (in every stage).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and dropout.")] = 0,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples of patients in the evaluation.")] = 1000,
    list_only: Annotated[bool, typer.Option("--list", help="Show the named recipes and leave.")] = False,
) -> None:
    """Train a model, and evaluate it on held-out patients.

    Pretrains, finetunes, chooses thresholds, evaluates; a stopped run goes on. With torchrun (`torchrun
    --nproc_per_node 2 --no-python ehrseq train ...`) several processes train together.
    """
    if list_only:
        from ehrseq.training.named_recipes import list_recipes

        named = list_recipes()
        width = max(len(name) for name, _, _ in named)
        for name, family, description in named:
            typer.echo(f"{name:<{width}}  {family:<8}  {description}")
        return
    if dataset is None or out is None:
        raise ValueError("give a DATASET and --out MODEL, or --list for the named recipes.")
    check_folder(out)
    from ehrseq.evaluation import metrics_table
    from ehrseq.training.run import train_model
    from ehrseq.training.trainer import is_main_process, leave_process_group

    say: Callable[[str], object] = typer.echo if is_main_process() else (lambda _: None)
    trained = train_model(
        dataset, out, recipe=recipe, changes=change or [], seed=seed, num_resamples=resamples, say=say
    )
    say("\n" + metrics_table(trained.metrics, best_possible=trained.best_possible))
    for metrics in trained.metrics.values():
        if metrics.reason:
            say(f"  {metrics.task}: not estimable, {metrics.reason}")
    say(f"Written to {out}")
    leave_process_group()
