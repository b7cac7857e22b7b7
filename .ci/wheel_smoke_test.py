"""The installed wheel alone, in an empty folder: from simulated patients to an evaluated model and a risk.

python wheel_smoke_test.py BACKEND      the backend of the kernels that must be at work: cpp or torch

Every command of `STEPS` runs in this process, in this order; a new one is one line more.
"""

import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import polars as pl
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ehrseq.cli.app import main
from ehrseq.data import EventDataset
from ehrseq.tasks import list_tasks

_FORECAST = """forecast --data dataset --split held_out --labels dataset --task readmission_30d --task mortality_30d
    --num 4 --workers 1 --out forecasts.parquet --page pages/forecasts.html"""
STEPS = [
    ("simulate", "records", "-n", "60"),
    ("prepare", "records", "dataset", "--workers", "1"),
    ("label", "dataset", "--workers", "1"),
    ("train", "dataset", "--out", "model", "--set", "max_steps=2"),
    ("predict", "--model", "model", "--data", "dataset", "--labels", "dataset", "--out", "risks.parquet"),
    ("evaluate", "risks.parquet", "--labels", "dataset", "--out", "evaluation", "--resamples", "20"),
    ("explain", "--data", "dataset", "--subject", "1", "--task", "mortality_30d", "--out", "pages"),
    tuple(_FORECAST.split()),
]


def check_the_installation(backend: str) -> None:
    """What the wheel has to hold, and what `ehrseq doctor` says does the work."""
    package = Path(str(files("ehrseq")))
    missing = [name for name in ("py.typed", "hub_cards/model_card.md", "tasks") if not (package / name).exists()]
    tasks = list_tasks(retrospective=None)
    if missing or len(tasks) < 12 or "site-packages" not in str(package):
        raise SystemExit(f"the wheel lacks {missing}, or tasks (has {tasks}), or this is not the wheel: {package}")
    doctor = subprocess.run([Path(sys.executable).with_name("ehrseq"), "doctor"], capture_output=True, text=True)
    used = [line for line in doctor.stdout.splitlines() if line.startswith(("scan: ", "conv: "))]
    if doctor.returncode != 0 or [line.split()[1] for line in used] != [backend] * 2:
        raise SystemExit(f"expected the backend {backend}, got {doctor.stdout}{doctor.stderr}")
    print("\n".join(used))


def run(*words: str) -> None:
    """Run `ehrseq WORDS` in this process."""
    print("ehrseq", *words, flush=True)
    sys.argv = ["ehrseq", *words]
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise


def check_a_risk(**model: str) -> None:
    """The pipeline tells one patient's risks."""
    events = EventDataset("dataset").events()
    patient = events.filter(events["subject_id"] == events["subject_id"][0])
    scores = pipeline("ehr-risk", **model)(patient, explain=True)
    told = [row["score"] for row in scores if row["score"] is not None]
    if not told or not all(0 <= score <= 1 for score in told):
        raise SystemExit(f"expected probabilities, got {scores}")
    if any("contributions" not in row for row in scores if row["score"] is not None):
        raise SystemExit(f"expected contributions beside each score, got {scores}")


def check_forecasts() -> None:
    """What the command wrote, and that the pipeline says the like of one patient."""
    table = pl.read_parquet("forecasts.parquet").filter(pl.col("score").is_not_null())
    if set(table["task"]) != {"readmission_30d", "mortality_30d"} or table["standard_error"].min() <= 0:
        raise SystemExit(f"expected two tasks with standard errors, got {table}")
    if "<svg" not in Path("pages", "forecasts.html").read_text(encoding="utf-8"):
        raise SystemExit("expected curves of cumulative incidence in pages/forecasts.html")
    events = EventDataset("dataset").events()
    patient = events.filter(events["subject_id"] == table["subject_id"][0])
    answer = pipeline("ehr-forecast")(patient, n=4, prediction_time=table["prediction_time"][0])
    if not all(0 <= each["probability"] <= 1 for each in answer["outcomes"]):
        raise SystemExit(f"expected probabilities, got {answer}")


def walk_the_whole_way() -> None:
    """Every command, then the Auto classes and the pipeline on what they wrote."""
    for words in STEPS:
        run(*words)
    AutoModelForSequenceClassification.from_pretrained("model")
    AutoTokenizer.from_pretrained("model")
    check_a_risk(model="model")
    if PIPELINE_REGISTRY.supported_tasks["ehr-risk"]["default"]:  # a checkpoint to start with is in the wheel
        check_a_risk()
    check_forecasts()
    if not Path("evaluation", "evaluation.md").is_file():
        raise SystemExit(f"expected an evaluation, got {sorted(Path('.').rglob('*.md'))}")
    page = Path("pages", "patient_1.html")
    if not page.is_file() or "trained on simulated patients" not in page.read_text(encoding="utf-8"):
        raise SystemExit(f"expected a page by the checkpoint to start with, got {list(Path().rglob('*.html'))}")


if __name__ == "__main__":
    check_the_installation(sys.argv[1])
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        walk_the_whole_way()
        os.chdir("/")
