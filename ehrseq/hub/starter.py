"""The checkpoints that come with the package: for `pipeline("ehr-risk")` and `pipeline("ehr-forecast")` without a
model, and for tests.

One is the demo's classifier, the other was pretrained on the same simulated patients, with a time head and the silence
after their last visits. Both say what they are at every call. They stand without their code: the package's classes load
them. `make starter` makes them anew:

    ehrseq demo --output build/starter
    ehrseq train build/starter/dataset --out build/starter/forecaster --recipe demo_forecast
    python -P -m ehrseq.hub.starter build/starter/checkpoint build/starter/forecaster/pretrained
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ehrseq.hub.families import STARTER, STARTER_FORECAST
from ehrseq.work.files import write_whole

NOTICE = "This model was trained on simulated patients: its risks mean nothing for a real one."
FORECAST_NOTICE = "This model was trained on simulated patients: its forecasts mean nothing for a real one."
_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
FILES = (*_MODEL, "thresholds.json", "README.md")
FORECAST_FILES = (*_MODEL, "README.md")

_FORECAST_CARD = """---
library_name: transformers
license: apache-2.0
tags:
- ehrseq
- ehr
- healthcare
- ehrmamba
---

# ehrseq-starter-forecast

{notice}

An EhrMamba of next tokens with {parameters:,} weights, pretrained on whole records of simulated patients (seed 0 of
`ehrseq simulate`). Beside the next token it learnt the time up to it (`time_head`, gaps in {bins} bins), and from the
silence between a patient's last visit and the end of the data that not everybody comes back. It comes with ehrseq, for
`pipeline("ehr-forecast")` without a model, and for tests.

```python
from transformers import pipeline

import ehrseq

forecast = pipeline("ehr-forecast")
```

It was made by `make starter`: recipe `demo_forecast`. Pretrained, not finetuned: its sibling `ehrseq-starter` answers
the questions of `pipeline("ehr-risk")`.
"""


def pack_starter(checkpoint: str | Path, folder: str | Path = STARTER) -> Path:
    """Make the package's checkpoint of a trained one.

    Args:
        checkpoint: Folder that `ehrseq train` or `ehrseq demo` wrote.
        folder: Where it goes; replaced where it is there.

    Returns:
        The folder.

    Raises:
        ValueError: A file is missing.
    """
    card = _read(checkpoint, FILES, "the checkpoint of `ehrseq train` or `ehrseq demo`")["README.md"]
    card = re.sub(r'pipeline\("ehr-risk", model="[^"]*"\)', 'pipeline("ehr-risk")', card)
    card = re.sub(r"(?m)^(- name: |# )checkpoint$", r"\1ehrseq-starter", card)
    return _pack(checkpoint, folder, FILES, {"notice": NOTICE}, card)


def pack_forecaster(pretrained: str | Path, folder: str | Path = STARTER_FORECAST) -> Path:
    """Make the package's forecasting checkpoint of a pretrained one.

    Args:
        pretrained: Folder of a causal model with a time head, such as `pretrained/` in a folder of `ehrseq
            train --recipe demo_forecast`.
        folder: Where it goes; replaced where it is there.

    Returns:
        The folder.

    Raises:
        ValueError: A file is missing, or the model is another one.
    """
    from safetensors import safe_open

    whose = "the pretrained model of `ehrseq train --recipe demo_forecast`"
    config = json.loads(_read(pretrained, _MODEL, whose)["config.json"])
    if config.get("architectures") != ["EhrMambaForCausalLM"] or not config.get("time_edges"):
        raise ValueError(
            f"{pretrained} holds {config.get('architectures')} with time_edges={config.get('time_edges')}; give "
            f"{whose}."
        )
    with safe_open(str(Path(pretrained) / "model.safetensors"), "np") as weights:
        count = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118  (it cannot be iterated)
    card = _FORECAST_CARD.format(notice=FORECAST_NOTICE, parameters=count, bins=len(config["time_edges"]) + 1)
    return _pack(pretrained, folder, FORECAST_FILES, {"notice": FORECAST_NOTICE}, card)


def _read(source: str | Path, names: Sequence[str], whose: str) -> dict[str, str]:
    """The texts among the files that must be there."""
    missing = [name for name in names if not (Path(source) / name).is_file()]
    if missing:
        raise ValueError(f"{source} lacks {missing}; give {whose}.")
    texts = [name for name in names if not name.endswith(".safetensors")]
    return {name: (Path(source) / name).read_text(encoding="utf-8") for name in texts}


def _pack(source: str | Path, folder: str | Path, names: Sequence[str], fields: Mapping[str, str], card: str) -> Path:
    """Copy the files; the configuration gets further fields, the card is another one."""

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for name in names:
            if name not in ("config.json", "README.md"):
                shutil.copyfile(Path(source) / name, temporary / name)
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8")) | fields
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        (temporary / "README.md").write_text(card, encoding="utf-8")

    write_whole(folder, write)
    return Path(folder)


if __name__ == "__main__":
    pack_starter(sys.argv[1])
    pack_forecaster(sys.argv[2])
