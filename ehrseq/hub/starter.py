"""The checkpoint that comes with the package: for `pipeline("ehr-risk")` without a model, and for tests.

It is the demo's model, trained on simulated patients, and says so at every call. It stands without its code: the
package's classes load it. `make starter` makes it anew:

    ehrseq demo --output build/starter
    python -P -m ehrseq.hub.starter build/starter/checkpoint
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from ehrseq.hub.families import STARTER
from ehrseq.work.files import write_whole

NOTICE = "This model was trained on simulated patients: its risks mean nothing for a real one."
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "thresholds.json", "README.md")


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
    source = Path(checkpoint)
    missing = [name for name in FILES if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{source} lacks {missing}; give the checkpoint of `ehrseq train` or `ehrseq demo`.")
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"notice": NOTICE}

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for name in FILES:
            shutil.copyfile(source / name, temporary / name)
        card = (source / "README.md").read_text(encoding="utf-8")
        card = re.sub(r'pipeline\("ehr-risk", model="[^"]*"\)', 'pipeline("ehr-risk")', card)
        card = re.sub(r"(?m)^(- name: |# )checkpoint$", r"\1ehrseq-starter", card)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")

    write_whole(folder, write)
    return Path(folder)


if __name__ == "__main__":
    pack_starter(sys.argv[1])
