"""What `import ehrseq` adds to the transformers imports that its users make anyway.

Each measurement is a fresh interpreter; the two lines alternate, so that a busy machine slows both alike.

    python benchmarks/bench_import.py --repeats 7 --output runs/bench/import.json
"""

import statistics
import subprocess
import sys

from harness import benchmark_parser, finish

PEER = "from transformers import AutoModel, PreTrainedModel, pipeline"
TIMED = "import time; start = time.process_time(); {lines}; print(time.process_time() - start)"


def cpu_seconds(lines: str) -> float:
    """CPU seconds of `lines` in a fresh interpreter, the interpreter's own start left out."""
    done = subprocess.run([sys.executable, "-c", TIMED.format(lines=lines)], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, print and, if asked, write the result."""
    options = benchmark_parser(__doc__, repeats=7).parse_args()

    cpu_seconds(f"{PEER}; import ehrseq")  # fills the byte-code and disk caches
    peer, ours = [], []
    for _ in range(options.repeats):
        peer.append(cpu_seconds(PEER))
        ours.append(cpu_seconds(f"{PEER}; import ehrseq"))
    result = {
        "peer": PEER,
        "peer_seconds": statistics.median(peer),
        "with_ehrseq_seconds": statistics.median(ours),
        "added_seconds": statistics.median(ours) - statistics.median(peer),
        "repeats": options.repeats,
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
