"""What `import ehrseq` adds to the transformers imports that its users make anyway.

Each measurement is a fresh interpreter that imports transformers and then the package, and reads its CPU clock after
each of the two, so that what differs from one interpreter to the next is no part of the difference.

    python -m benchmarks.speed.bench_import --repeats 7 --output runs/bench/import.json
"""

import statistics
import subprocess
import sys
import tempfile

from benchmarks.harness import benchmark_parser, finish, keep_bytecode

PEER = "from transformers import AutoModel, PreTrainedModel, pipeline"
TARGET = 0.3  # seconds
WITH_EHRSEQ = f"""
import time
start = time.process_time()
{PEER}
before = time.process_time() - start
import ehrseq
print(before, time.process_time() - start)
"""


def cpu_seconds(script: str) -> tuple[float, float]:
    """CPU seconds up to the two lines of a script in a fresh interpreter, the interpreter's own start left out."""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split()[-2:])
    return before, after


def main() -> None:
    """Measure, print and, if asked, write the result."""
    options = benchmark_parser(__doc__, repeats=7).parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        keep_bytecode(scratch)
        cpu_seconds(WITH_EHRSEQ)  # fills the byte-code and disk caches
        measured = [cpu_seconds(WITH_EHRSEQ) for _ in range(options.repeats)]
    peer = statistics.median(before for before, _ in measured)
    added = statistics.median(after - before for before, after in measured)
    result = {
        "peer": PEER,
        "peer_seconds": peer,
        "added_seconds": added,
        "added_over_peer": added / peer,
        "target_added_seconds": TARGET,
        "repeats": options.repeats,
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
