"""`ehrseq medications`: which drugs will be given in a visit, and how good such recommendations are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import EngineName, EngineOption, Workers, check_folder


def medications_command(
    data: Annotated[Path, typer.Option(help="Prepared dataset with the splits train, tuning, held_out.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Checkpoint whose vectors a line is fitted to; repeat for several.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Pretrained EhrMamba whose futures are drawn up to the visit's end.")
    ] = None,
    context: Annotated[
        str, typer.Option(help="Known of the visit: start; so_far or visit add its diagnoses and procedures.")
    ] = "start",
    num: Annotated[int, typer.Option(min=1, help="Futures of a visit.")] = 32,
    most: Annotated[int | None, typer.Option(min=1, help="Held-out visits asked at most. Default: all.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples of patients.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("medications"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Recommend the next medications of held-out visits, and measure it.

    Recall at k, Jaccard and PR-AUC against the frequent drugs and those of the last visit; drugs started and repeated
    apart.
    """
    from ehrseq.benchmark.medications import recommend_medications
    from ehrseq.work.engine import get_engine

    check_folder(out)
    names = [Path(each).name for each in model or []]
    if len(set(names)) < len(names):
        raise ValueError(f"two checkpoints are both called {sorted(names)[0]}; give them names that differ.")
    report = recommend_medications(
        data,
        dict(zip(names, model or [], strict=True)),
        context=context,
        pretrained=pretrained,
        num=num,
        most_questions=most,
        num_resamples=resamples,
        seed=seed,
        out=out,
        engine=get_engine(engine.value, num_workers=workers),
    )
    typer.echo(report.to_markdown())
    typer.echo(f"Written to {out}; the page is {out / 'medications.html'}")
