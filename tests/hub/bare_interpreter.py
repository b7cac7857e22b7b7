"""An interpreter that has torch and transformers, and neither ehrseq nor the table libraries.

The current environment's packages are linked into a folder, all but those below, and Python is started on that folder
alone: `-S` leaves out site-packages, and with it the `.pth` file of an editable installation.
"""

import json
import os
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

LEFT_OUT = (
    "ehrseq*", "__editable__*", "*.pth", "polars*", "_polars*", "pyarrow*", "pandas*", "datasets*", "meds*", "sklearn*",
    "scikit_learn*", "scipy*", "matplotlib*", "orjson*", "evaluate*", "accelerate*", "typer*",
)  # fmt: skip


def link_packages(folder: Path) -> Path:
    """Link this environment's packages into `folder`, without those of `LEFT_OUT`."""
    folder.mkdir(parents=True)
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not any(fnmatch(package.name, pattern) for pattern in LEFT_OUT):
            (folder / package.name).symlink_to(package)
    return folder


def run_python(script: str, arguments: dict[str, Any], environment: dict[str, str], bare: Path | None = None) -> Any:
    """Run a script in a fresh process and return the JSON of its last line.

    Args:
        script: Reads its arguments from the dictionary `given`.
        arguments: That dictionary.
        environment: Added to this process's variables.
        bare: Folder of `link_packages`; by default the interpreter has everything this one has, ehrseq included.
    """
    prologue = f"import json\ngiven = json.loads({json.dumps(arguments)!r})\n"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-P", *(["-S"] if bare else []), "-c", prologue + script]
    here = Path(__file__).resolve().parents[2]
    variables["PYTHONPATH"] = str(bare if bare else here)
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, cwd=bare or here, timeout=300, check=False
    )
    if done.returncode != 0:
        raise AssertionError(f"the script failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


_EACH = """
import contextlib, io
answers = {}
for name, (script, own) in given.items():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(script, {"__name__": "__main__", "json": json, "given": own})
    answers[name] = json.loads(printed.getvalue().strip().splitlines()[-1])
print(json.dumps(answers))
"""


def run_scripts(
    scripts: dict[str, tuple[str, dict[str, Any]]], environment: dict[str, str], bare: Path | None = None
) -> Any:
    """Run scripts in one fresh process, one after the other; see `run_python`.

    Args:
        scripts: By name: the script and its arguments.
        environment: Added to this process's variables.
        bare: As in `run_python`.

    Returns:
        The JSON of each script's last line, by name.
    """
    return run_python(_EACH, scripts, environment, bare)
