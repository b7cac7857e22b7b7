"""Messages between a process and the workers that it starts: pickles, over the workers' own pipes."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path
from typing import IO, Any


def worker_command(module: str, function: str) -> list[str]:
    """Command line of a process that calls a function of a module of this package.

    With the safe path (-P): `python -c` alone would look for every module in the current folder first, and what lies
    there is somebody's records, not our code.
    """
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); from {module} import {function}; del sys.path[0]; {function}()"
    )
    return [sys.executable, "-P", "-c", code, str(Path(__file__).resolve().parents[2])]


def send(stream: IO[bytes], message: object) -> None:
    """Write one message to a pipe."""
    body = pickle.dumps(message, protocol=5)
    stream.write(struct.pack("<Q", len(body)))
    stream.write(body)
    stream.flush()


def receive(stream: IO[bytes], died: str | None = None) -> Any:
    """The next message, None at the end of the stream (an error where `died` says so)."""
    head = stream.read(8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    body = stream.read(size)
    if size and len(body) == size:
        return pickle.loads(body)
    if died is not None:
        raise RuntimeError(died)
    return None
