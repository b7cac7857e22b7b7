"""What the tests of the engine have workers do; a worker imports it by its name."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def square(number: int) -> int:
    time.sleep(0.02 * (5 - number % 5))  # later tasks finish first
    return number * number


def count_up(number: int) -> Iterator[tuple[int, int]]:
    """Several results a task: as many as its number says."""
    for k in range(number):
        yield number, k


def blocks_with_process(number: int) -> Iterator[tuple[int, bytes]]:
    """Large results, by whichever process."""
    for _ in range(4):
        time.sleep(0.01)
        yield os.getpid(), bytes([number]) * 1_000_000


def refuse_three_in_the_middle(number: int) -> Iterator[int]:
    yield number
    if number == 3:
        raise ValueError("a.ndjson, line 7: not JSON")


def die_in_the_middle(parent: int) -> Iterator[int]:
    """In a worker, end its process once it has given something."""
    yield parent
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)


def mark_each(folder: str) -> Iterator[bytes]:
    """Leave a file for each (large) result, before it is given."""
    for k in range(100):
        Path(folder, f"{os.getpid()}-{k}").touch()
        yield bytes(200_000)


def wait_policy(_: int) -> str | None:
    return os.environ.get("OMP_WAIT_POLICY")


def process_and_threads(_: int) -> tuple[int, str]:
    time.sleep(0.1)
    return os.getpid(), os.environ["POLARS_MAX_THREADS"]


def refuse_three(number: int) -> int:
    if number == 3:
        raise ValueError("a.ndjson, line 7: not JSON")
    return number


def disk_full(number: int) -> int:
    raise OSError(28, "No space left on device", f"{number}.parquet")


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def odd_error(_: int) -> int:
    raise Odd(1, 2)


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def mark(task: tuple[str, int]) -> int:
    folder, number = task
    Path(folder, str(number)).touch()
    if number == 0:
        raise ValueError("first")
    time.sleep(0.2)
    return number


def chatter(number: int) -> int:
    os.write(2, b"")
    print("a library that prints")
    return number


def loaded_modules(_: int) -> bool:
    import sys

    return "torch" in sys.modules


def lazy_attribute(_: int) -> str:
    import ehrseq

    return ehrseq.__version__


def work_long(folder: str) -> None:
    """Say which process works, then work for as long as a model is trained."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(120)


def pages_fetched_again(_: int) -> tuple[int, int]:
    """Pages that the system hands over for two tensors of 64 MiB, the second in the place of the first."""
    import resource

    def fetched() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**23)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return fetched(), fetched()
