"""The installed wheel, far from its source: data, tokenizer, model, save, reload by Auto classes, a risk, the kernels.

python wheel_smoke_test.py BACKEND      the backend of the scan that must be at work: cpp or torch
"""

import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import ehrseq
from ehrseq.data.simulate.cohort import simulate
from ehrseq.tasks import list_tasks, load_task

events = simulate(num_patients=8, seed=0).events()
tasks = [load_task("mortality_30d").to_config(), load_task("readmission_30d").to_config()]
tokenizer = ehrseq.EhrTokenizer.train(events, tasks=tasks)
config = ehrseq.EhrMambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, tasks=tasks)
model = ehrseq.EhrMambaForSequenceClassification(config).eval()

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    risk = pipeline("ehr-risk", model=folder)
    scores = risk(events.filter(events["subject_id"] == events["subject_id"][0]))
    if not (len(scores) == 2 and all(0 <= row["score"] <= 1 for row in scores)):
        raise SystemExit(f"expected two probabilities, got {scores}")

package = Path(str(files("ehrseq")))
missing = [name for name in ("py.typed", "hub_cards/model_card.md", "tasks") if not (package / name).exists()]
tasks = list_tasks(retrospective=None)
if missing or len(tasks) < 12 or "site-packages" not in str(package):
    raise SystemExit(f"the wheel lacks {missing}, or tasks (has {tasks}), or this is not the wheel: {package}")

# The backend that does the work, and what `ehrseq doctor` says about it.
doctor = subprocess.run([Path(sys.executable).with_name("ehrseq"), "doctor"], capture_output=True, text=True)
used = [line for line in doctor.stdout.splitlines() if line.startswith(("scan: ", "conv: "))]
if doctor.returncode != 0 or [line.split()[1] for line in used] != [sys.argv[1]] * 2:
    raise SystemExit(f"expected the backend {sys.argv[1]}, got {doctor.stdout}{doctor.stderr}")
print("\n".join(used))
