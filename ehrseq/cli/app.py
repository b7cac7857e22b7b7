"""`ehrseq ...`: every command, each from its own file.

Heavy imports stand inside the commands, so that `ehrseq --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ehrseq.cli.audit import audit_command, stats_command
from ehrseq.cli.benchmark import benchmark_command
from ehrseq.cli.demo import demo_command
from ehrseq.cli.doctor import doctor_command
from ehrseq.cli.embed import embed_command
from ehrseq.cli.encode import label_command, tokenize_command
from ehrseq.cli.evaluate import evaluate_command
from ehrseq.cli.evaluate_forecast import evaluate_forecast_command
from ehrseq.cli.explain import explain_command
from ehrseq.cli.forecast import forecast_command
from ehrseq.cli.medications import medications_command
from ehrseq.cli.phenotypes import phenotypes_command
from ehrseq.cli.predict import predict_command
from ehrseq.cli.prepare import prepare_command, split_command
from ehrseq.cli.probe import probe_command
from ehrseq.cli.simulate import simulate_command, simulate_stays_command
from ehrseq.cli.synthesize import synthesize_command
from ehrseq.cli.train import train_command
from ehrseq.version import __version__

COMMANDS: dict[str, Callable[..., None]] = {
    "simulate": simulate_command,
    "simulate-stays": simulate_stays_command,
    "prepare": prepare_command,
    "split": split_command,
    "label": label_command,
    "audit": audit_command,
    "stats": stats_command,
    "tokenize": tokenize_command,
    "train": train_command,
    "predict": predict_command,
    "synthesize": synthesize_command,
    "explain": explain_command,
    "forecast": forecast_command,
    "embed": embed_command,
    "phenotypes": phenotypes_command,
    "probe": probe_command,
    "medications": medications_command,
    "evaluate": evaluate_command,
    "evaluate-forecast": evaluate_forecast_command,
    "benchmark": benchmark_command,
    "demo": demo_command,
    "doctor": doctor_command,
}

app = typer.Typer(
    name="ehrseq",
    help="Risks from patient records: EhrMamba and HyMaTE on FHIR R4 or MEDS.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half of the time of `--help` would be the import of rich
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ehrseq {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Risks from patient records: EhrMamba and HyMaTE on FHIR R4 or MEDS."""


def main() -> None:
    """Run the command line; an error of the input is one line, not a traceback.

    Whatever Python a library starts for it (data loaders, compilers, a cluster's workers) has the safe path too: a
    command is run in the folder of somebody's records, and no file there is a module.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
