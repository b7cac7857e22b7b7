"""`ehrseq ...`: every command, each from its own file.

Heavy imports stand inside the commands, so that `ehrseq --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ehrseq.cli.audit import audit, stats
from ehrseq.cli.benchmark import benchmark
from ehrseq.cli.demo import demo
from ehrseq.cli.doctor import doctor
from ehrseq.cli.encode import label, tokenize
from ehrseq.cli.evaluate import evaluate
from ehrseq.cli.predict import predict
from ehrseq.cli.prepare import prepare, split
from ehrseq.cli.simulate import simulate, simulate_stays
from ehrseq.cli.train import train
from ehrseq.version import __version__

COMMANDS = (
    *(simulate, simulate_stays, demo, predict, doctor, prepare, split, label, tokenize),
    *(train, audit, stats, evaluate, benchmark),
)

app = typer.Typer(
    name="ehrseq",
    help="Risks from patient records: EhrMamba and HyMaTE on FHIR R4 or MEDS.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)


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
    """Run the command line; an error of the input is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
