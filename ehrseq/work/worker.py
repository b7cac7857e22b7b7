"""A worker process: the work that it is given, the loop that it runs, and what comes back from it.

A worker loads this module (and so neither numpy nor transformers), then whatever module its work stands in.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from ehrseq.work.pipes import receive, send

# glibc's own names (mallopt(3)): no request is large enough for a mapping of its own, nor the heap for trimming.
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Work(NamedTuple):
    """A function as another process finds it.

    Attributes:
        module, function: Its name.
        streams: Whether it yields many results a task, rather than returning one.
    """

    module: str
    function: str
    streams: bool


class Message(NamedTuple):
    """What comes back of a task: its results, then one message that says how it ended.

    Attributes:
        result: One result; None in the last message.
        is_last: Whether the task has ended.
        error: What ended it, None where it was completed.
    """

    result: Any = None
    is_last: bool = False
    error: Exception | None = None


def work_of(function: Callable[..., Any], *, streams: bool) -> Work:
    """A function as another process finds it.

    Raises:
        ValueError: It is a lambda, a method, an inner function or one of the script that was started.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or "." in name or "<" in name or module == "__main__":
        raise ValueError(f"work got {function!r}; expected a function of a module that can be imported by its name.")
    return Work(module, name, streams)


def results_of(function: Callable[[Any], Any], streams: bool, task: object) -> Iterator[Any]:
    """What a function makes of a task, one by one."""
    if streams:
        yield from function(task)
    else:
        yield function(task)


def messages_of(work: Work, task: object) -> Iterator[Message]:
    """The results of a task, then how it ended, in a form that another process can take."""
    try:
        function = getattr(importlib.import_module(work.module), work.function)
        for result in results_of(function, work.streams, task):
            yield Message(result)
    except Exception as error:
        yield Message(is_last=True, error=_portable(error))
    else:
        yield Message(is_last=True)


def import_path(work: Work) -> list[str]:
    """Where a worker finds modules: this process's path, but not the current folder.

    Names that this process has long imported the worker has to find again, and the current folder may by now be that of
    somebody's records, where a file `orjson.py` is data. (It stands on the path of an interactive session, of `python
    -c` and of `python -m`.) It stays where this package or the work itself was imported from it.
    """
    here = os.path.realpath(os.curdir)
    if here in (_import_folder(__name__), _import_folder(work.module)):
        return list(sys.path)
    return [entry for entry in sys.path if os.path.realpath(entry) != here]


def _import_folder(name: str) -> str | None:
    """The folder on the path in which the top package of a loaded module lies."""
    file: str | None = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return None
    levels = name.count(".") + (os.path.basename(file) == "__init__.py")
    folder = os.path.dirname(os.path.realpath(file))
    for _ in range(levels):
        folder = os.path.dirname(folder)
    return folder


def serve() -> None:
    """Loop of a worker process: the work, then tasks, from stdin; messages to stdout.

    Stdin ends when the process that started this one does, however it ended; the worker then leaves its task at once:
    it may be begun anew by another run, and the files of one task must not have two writers.
    """
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not run into the results
    path, work = receive(source)
    sys.path[:] = path
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(source, tasks), daemon=True).start()
    while True:
        for message in messages_of(work, tasks.get()):
            send(sink, message)


def worker_environment(threads: int, *, keep_freed_memory: bool) -> dict[str, str]:
    """Environment variables of a worker that may use so many threads.

    Threads that wait for each other sleep: where they spin (OpenMP's default), they take the core from the one that
    they wait for as soon as anything else runs on it. And a core of its own is no reason to keep freed memory: glibc
    would hold up to eight arenas a core. What a worker starts itself has the safe path, as it has (`worker_command`).
    """
    names = ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {
        **dict.fromkeys(names, str(threads)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONSAFEPATH": "1",
        "MALLOC_ARENA_MAX": "2",
        **(_KEPT_MEMORY if keep_freed_memory else {}),
    }


def _read_tasks(source: IO[bytes], tasks: queue.SimpleQueue[Any]) -> None:
    """Take tasks from a stream; end the process where the stream ends, or holds what cannot be read."""
    try:
        while (task := receive(source)) is not None:
            tasks.put(task)
    finally:
        os._exit(0)


def _portable(error: Exception) -> Exception:
    """An error that another process can take; with its text only where it cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        same = type(copy) is type(error) and str(copy) == str(error)
    except Exception:  # whatever a class of errors does when it is pickled
        same = False
    return error if same else RuntimeError(f"{type(error).__name__}: {error}")
