"""`ehrseq doctor`: which fast kernels this machine has."""

from __future__ import annotations

import typer


def doctor_command() -> None:
    """Say which fast kernels this machine has, and test them.

    Takes some seconds.
    """
    import torch

    from ehrseq.kernels.doctor import check_backends, describe_machine, report_checks, report_machine
    from ehrseq.modeling import causal_conv, selective_scan

    typer.echo(report_machine(describe_machine()))
    operators = selective_scan.selective_scan, causal_conv.causal_conv1d
    tables = selective_scan.SCAN_BACKENDS.entries, causal_conv.CONV_BACKENDS.entries
    wrong = False
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        checks = check_backends(*operators, *tables, device)
        typer.echo("\n" + report_checks(checks, device))
        wrong |= any(check.wrong for check in checks)
    if wrong:
        raise typer.Exit(code=1)
