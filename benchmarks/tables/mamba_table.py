"""The table of what EhrMamba's blocks cost on this machine, beside their peers and what this project asks of them.

Runs bench_block.py, bench_memory.py, bench_packing.py and bench_step.py (about 20 minutes, most of it the peers), keeps
what each of them wrote, and prints one Markdown table. A run that was stopped goes on with what is missing; `--fresh`
measures everything again.

    python -m benchmarks.tables.mamba_table --output runs/bench
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import in_a_process

PARTS = ("block", "memory", "packing", "step")
# Figure, peer, sense (">=" or "<="), bar, measured, and what a block would reach that did nothing but its matmuls.
Row = tuple[str, str, str, float, float | None, float | None]


def run_parts(folder: Path, *, fresh: bool, quick: bool) -> dict[str, dict[str, Any]]:
    """The results of the four benchmarks, measured where they are not in the folder yet."""
    results = {}
    for part in PARTS:
        file = folder / f"{part}.json"
        if fresh or not file.exists():
            print(f"bench_{part}.py ...", file=sys.stderr, flush=True)
            in_a_process(f"benchmarks.speed.bench_{part}", "--output", file, *(["--quick"] if quick else []))
        results[part] = json.loads(file.read_text())
    return results


def rows(results: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """The figures: what, against whom, and the least (or most) that is asked."""
    block, memory, packing, step = (results[part] for part in PARTS)

    def against_peer(name: str, way: str, layers: int) -> tuple[float | None, float | None]:
        """The ratio to the peer, and the ratio of the block's matmuls alone to the peer: no block can do better."""
        if name not in block:
            return None, None
        matmuls = block[f"matmuls_{name.split('_')[-1]}"]
        seconds = layers * matmuls[way]["matmul_cpu_seconds"] * block[name]["length"] / matmuls["length"]
        return block[name]["ratio"], block[name]["peer_cpu_seconds"] / seconds

    for dtype, bars in (("fp32", (300, 11, 4)), ("bf16", (300, 16, 6))):
        by = "" if dtype == "fp32" else " (fp32)"
        short, medium, long = (f"{name}_{dtype}" for name in ("train_512", "forward", "train_2048"))
        yield (
            f"train one block, L=512, {dtype}",
            f"transformers{by}",
            ">=",
            bars[0],
            *against_peer(short, "training", 1),
        )
        peer = f"transformers + mambapy{by}"
        yield f"train one block, L=2048, {dtype}", peer, ">=", bars[1], *against_peer(long, "training", 1)
        layers = block["num_hidden_layers"]
        figure = f"forward, {layers} blocks, L=1024, {dtype}"
        yield figure, f"transformers{by}", ">=", bars[2], *against_peer(medium, "forward", layers)
    # The faster the products, the more the rest of a block shows: the bar depends on the library that multiplies.
    faster = block["linear_ways"]["fp32"]["forward"] != "default"
    for way, default, onednn, bf16 in (("forward", 1.15, 1.25, 1.4), ("training", 1.2, 1.45, 1.8)):
        for name, bar in (("fp32", onednn if faster else default), ("bf16", bf16)):
            yield (
                f"block {way}, L=2048, {name}",
                "its matmuls alone",
                "<=",
                bar,
                block[f"matmuls_{name}"][way]["ratio"],
                1.0,
            )
    share = memory.get("block_share_of_mambapy")
    yield "peak memory of a training block, L=2048", "transformers + mambapy", "<=", 0.1, share, None
    yield "training 32 blocks, L=2048: GiB", "", "<=", 6, memory["model"]["peak_gib"], None
    yield "packed rows, lognormal lengths", "rows padded to 2048", ">=", 4, packing["ratio"], None
    yield "one event after 64k events over 1k: spread", "ourselves", "<=", 0.1, step["history"]["spread"], None
    yield "one event, one patient, 32 blocks, fp32", "transformers", ">=", 2.2, step["one"]["times_transformers"], None
    yield "one event of 64 patients at once", "transformers", ">=", 2.2, step["many"]["times_transformers"], None


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown, the machine below."""
    lines = ["| figure | peer | asked | measured | met | matmuls alone |", "|---|---|---:|---:|---|---:|"]
    for figure, peer, sense, bar, value, limit in rows(results):
        if value is None:
            lines.append(f"| {figure} | {peer} | {sense} {bar} | peer not installed | | |")
            continue
        met = value >= bar if sense == ">=" else value <= bar
        cells = [figure, peer, f"{sense} {bar:g}", f"{value:.3g}", "yes" if met else "no"]
        lines.append("| " + " | ".join([*cells, "" if limit is None else f"{limit:.3g}"]) + " |")
    machine = results["block"]["machine"]
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, load {machine['load_average_at_start']:.1f} at the start. "
        "CPU seconds on one thread, medians. The last column is what a block would reach that did nothing but its four "
        "matrix products: where it lies below what is asked, this machine cannot give more.",
        *(f"{name}: {text}." for name, text in results["block"]["linear"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    text = table(run_parts(options.output, fresh=options.fresh, quick=options.quick))
    (options.output / "mamba_table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
