"""Compiles the C++ kernels: one library for each instruction set, from the same source.

Run by the package's build (hatch_build.py), or by hand after a change of the source:

    python ehrseq/kernels/build_library.py

Needs only the standard library. The compiler is that of the environment variable CXX, else g++, else clang++.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
LIBRARIES = Path(__file__).resolve().parent / "lib"

# By machine: {name of the variant: options}. The names are those that cpu_library.py looks for.
VARIANTS = {
    "x86_64": {
        "x86-64-v3": ["-march=x86-64-v3"],
        "x86-64-v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
    "aarch64": {"aarch64": ["-march=armv8-a"]},
}
OPTIONS = [
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # fused multiply-adds; nothing that reorders sums or forgets NaN
    "-Wno-psabi",
    "-static-libstdc++",
    "-static-libgcc",
]


def find_compiler() -> list[str]:
    """The C++ compiler's command, [] when there is none."""
    asked = os.environ.get("CXX")
    candidates = [asked] if asked else ["g++", "clang++", "c++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return []


def build_libraries(target: Path = LIBRARIES) -> tuple[list[Path], str]:
    """Compile every variant for this machine.

    Args:
        target: Folder for the libraries; a library there is replaced only by one that compiled.

    Returns:
        (the libraries that were built, a sentence that says what happened).
    """
    if os.environ.get("EHRSEQ_NO_COMPILE"):
        return [], "EHRSEQ_NO_COMPILE is set: the C++ kernels were left out; the torch backend is used."
    if sys.platform != "linux" or platform.machine() not in VARIANTS:
        return [], f"No C++ kernels for {sys.platform} on {platform.machine()}: the torch backend is used."
    compiler = find_compiler()
    if not compiler:
        return [], (
            f"No C++ compiler ({os.environ.get('CXX') or 'g++, clang++'}): the torch backend is used, several times "
            "slower on CPU. Install g++ and then install ehrseq again."
        )
    built, said = _compile(compiler, ["-fopenmp"], target)
    if not built:  # Clang often comes without an OpenMP runtime
        built, plain = _compile(compiler, [], target)
        said = f"Without OpenMP, on one thread: {plain}" if built else said
    return built, said


def _compile(compiler: list[str], more_options: list[str], target: Path) -> tuple[list[Path], str]:
    """All variants at once, each in its own process; (what compiled, a sentence about it)."""
    target.mkdir(parents=True, exist_ok=True)
    built, failures = [], []
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {}
        for name, options in VARIANTS[platform.machine()].items():
            output = Path(scratch) / f"libehrseq-{name}.so"
            command = [*compiler, *OPTIONS, *more_options, *options, str(SOURCES / "kernels.cpp"), "-o", str(output)]
            jobs[output] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for output, job in jobs.items():
            messages = job.communicate()[0]
            if job.returncode == 0:
                # A copy beside the target, then a rename: a process that has the old library open keeps it whole.
                unfinished = target / f".{output.name}.part"
                shutil.copyfile(output, unfinished)
                unfinished.replace(target / output.name)
                built.append(target / output.name)
            else:
                failures.append(f"{output.name}: {messages.strip()[-2000:]}")
    said = f"C++ kernels built by {' '.join(compiler)}: {', '.join(path.name for path in built) or 'none'}."
    if failures:
        said += " Failed, and left out: " + "; ".join(failures)
    return built, said


if __name__ == "__main__":
    libraries, message = build_libraries()
    sys.stderr.write(message + "\n")
    sys.exit(0 if libraries else 1)
