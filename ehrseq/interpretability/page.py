"""The page of one patient: why the model says what it says, one HTML file that needs nothing else.

    write_page([explain(checkpoint, patient, task) for task in tasks], "patient.html")

Its scripts and style lie in `page_files/`. They read the data that `page_data` writes, build what is opened when it is
opened, and put every text in as text. The page's own policy forbids it to load or send anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ehrseq._html import html_page
from ehrseq.interpretability.page_data import as_json, page_data
from ehrseq.work.files import write_text

if TYPE_CHECKING:
    from ehrseq.interpretability.attention_weights import AttentionWeights
    from ehrseq.interpretability.explanation import Explanation

_FILES = Path(__file__).with_name("page_files")
_SCRIPTS = ("base.js", "record.js", "contributions.js", "weights.js", "main.js")


def write_page(
    explanations: Explanation | Sequence[Explanation],
    file: str | Path,
    *,
    tasks: Sequence[Mapping[str, Any]] = (),
    record: pl.DataFrame | None = None,
    attention: AttentionWeights | Sequence[AttentionWeights] = (),
    fusion: AttentionWeights | Sequence[AttentionWeights] = (),
    notice: str = "",
) -> Path:
    """Write the page of one patient; equal data give equal bytes.

    Args:
        explanations: Explanations of one patient at one time: any tasks, any methods.
        file: HTML file, replaced where it is there.
        tasks: Entries of `config.tasks`, whose definitions the page tells.
        record: The patient's events (time, code, and visit_id where there is one), in the order in which they were
            explained: the timeline then has the class of every visit and the events that the model did not see. Events
            after the prediction time are left out.
        attention: Matrices of attention over tokens, each with its name.
        fusion: Weights of a stay's triplets.
        notice: What everybody must know of the model (`config.notice`), told at the top.

    Returns:
        The file.

    Raises:
        ValueError: No explanation, or those of several patients or times, or twice the same task and method.
    """
    from ehrseq.interpretability.explanation import Explanation

    chosen = [explanations] if isinstance(explanations, Explanation) else list(explanations)
    check_one_patient(chosen)
    weights = {"attention": _several(attention), "fusion": _several(fusion)}
    data = page_data(chosen, tasks=tasks, record=record, notice=notice, **weights)
    # The element ends where the JSON does: `as_json` leaves no `<` in it.
    parts = [
        (_FILES / "body.html").read_text(encoding="utf-8"),
        f'<script type="application/json" id="data">{as_json(data)}</script>',
    ]
    script = "\n".join((_FILES / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    style = (_FILES / "style.css").read_text(encoding="utf-8")
    title = f"Patient {data['patient']}: explanation" if data["patient"] else "Explanation"
    file = Path(file)
    write_text(file, html_page(title, parts, style=style, script=f'"use strict";\n(() => {{\n{script}}})();\n'))
    return file


def check_one_patient(explanations: Sequence[Explanation]) -> None:
    """Raise ValueError where explanations cannot stand on one page or picture."""
    if not explanations:
        raise ValueError("there is no explanation to show; give at least one.")
    whose = {(each.subject_id, each.prediction_time) for each in explanations}
    if len(whose) > 1:
        named = sorted(f"{subject} at {time}" for subject, time in whose)
        raise ValueError(
            f"explanations of one patient at one time were expected, got {len(whose)}: {', '.join(named[:3])}; write a "
            "file for each."
        )
    asked = [(each.task, each.method) for each in explanations]
    twice = sorted({f"{task} by {method}" for task, method in asked if asked.count((task, method)) > 1})
    if twice:
        raise ValueError(f"got several explanations of {twice[0]}; give one of each task and method.")


def _several(weights: AttentionWeights | Sequence[AttentionWeights]) -> list[AttentionWeights]:
    from ehrseq.interpretability.attention_weights import AttentionWeights

    return [weights] if isinstance(weights, AttentionWeights) else list(weights)
