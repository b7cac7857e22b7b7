"""Processes that tests start: Python with the safe path (`-P`), and where it finds the tests.

`python -c` and `python -m` look for modules in the current folder first, where a test keeps somebody's records.
`tests/work/test_safe_path.py` reads every such command in the repository.
"""

import os
from pathlib import Path

FROM_HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
"""The environment of a process that imports this repository's `ehrseq`, `tests` and `benchmarks`."""
