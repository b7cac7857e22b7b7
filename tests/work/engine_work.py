"""What the tests of the engine have workers do; a worker imports it by its name."""

import os
import signal
import time
from pathlib import Path

import numpy as np


def square(number: int) -> int:
    time.sleep(0.02 * (5 - number % 5))  # later tasks finish first
    return number * number


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
