"""One way to work on many shards: the same tasks in this process, in several processes, or on a Ray cluster.

    engine = get_engine("local", num_workers=2)
    for result in engine.map(convert_file, tasks, desc="Reading"):
        ...

A task and its result are small (paths, numbers, counters); tables stay on disk. Whoever calls decides what needs to be
done at all (a result file that is there already); engines know nothing of it.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from ehrseq.work.pipes import receive, send, worker_command

Task = TypeVar("Task")
Result = TypeVar("Result")

ENGINES = ("local", "ray")
_MAX_NAME = 160  # characters of a task in messages

# glibc's own names (mallopt(3)): no request is large enough for a mapping of its own, nor the heap for trimming.
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Engine(Protocol):
    """Applies a function to many tasks."""

    num_workers: int

    def map(self, work: Callable[[Task], Result], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """Results in the order of the tasks, with a progress bar.

        Args:
            work: A function of a module (workers import it by its name).
            tasks: What it is called with; pickled.
            desc: What is being done, for the progress bar and for messages.

        Raises:
            Exception: The first error of a task, with a note that names the task; no further task is begun.
            RuntimeError: A worker process died.
        """
        ...


def get_engine(name: str = "local", *, num_workers: int | None = None, keep_freed_memory: bool = False) -> Engine:
    """The engine of a name.

    Args:
        name: `local`: processes of this machine; `ray`: the Ray cluster that RAY_ADDRESS names, else one started here
            (extra `ehrseq[ray]`).
        num_workers: Tasks at a time. Default: one a core (local), all that the cluster has room for (ray). With 1 the
            local engine works in this process.
        keep_freed_memory: For tasks that train: worker processes hold what they freed until they end (glibc). Every
            step asks for the same large tensors, and the system would zero their pages each time.

    Raises:
        ValueError: An unknown name, less than one worker.
        ImportError: Ray is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"engine got {name!r}; expected one of {list(ENGINES)}.")
    if num_workers is not None and (
        isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1
    ):
        raise ValueError(f"num_workers must be a whole number from 1 on, got {num_workers!r}.")
    if name == "ray":
        return RayEngine(num_workers, keep_freed_memory=keep_freed_memory)
    return LocalEngine(num_workers or available_cores(), keep_freed_memory=keep_freed_memory)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEngine:
    """Tasks in processes of this machine; in this process where there is one worker or one task.

    Not `multiprocessing`: its workers import the caller's script again (which then needs a main guard) or fork a
    process that already runs threads. These are plain interpreters that speak over their own pipes, and end when this
    process does.

    Args:
        num_workers: Processes at a time.
        keep_freed_memory: See `get_engine`.
    """

    def __init__(self, num_workers: int, *, keep_freed_memory: bool = False) -> None:
        self.num_workers = num_workers
        self.keep_freed_memory = keep_freed_memory

    def map(self, work: Callable[[Task], Result], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """See `Engine.map`."""
        workers = min(self.num_workers, len(tasks))
        if workers <= 1:
            results = _here(work, tasks, desc)
        else:
            results = _in_processes(work, tasks, desc, workers, self.keep_freed_memory)
        return _with_progress(results, len(tasks), desc)


class RayEngine:
    """Tasks on a Ray cluster; files must lie where every machine of it sees them.

    Args:
        num_workers: Tasks at a time; None for as many as the cluster has cores.
        keep_freed_memory: See `get_engine`.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, num_workers: int | None = None, *, keep_freed_memory: bool = False) -> None:
        self.keep_freed_memory = keep_freed_memory
        try:
            self._ray = importlib.import_module("ray")
        except ImportError as error:
            raise ImportError('The Ray engine needs Ray: pip install "ehrseq[ray]".') from error
        if not self._ray.is_initialized():
            # RAY_ADDRESS decides whether this joins a cluster; only a cluster of our own takes a number of cores.
            own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": num_workers, "include_dashboard": False}
            self._ray.init(log_to_driver=False, logging_level="ERROR", **own)
        self.num_workers = num_workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map(self, work: Callable[[Task], Result], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """See `Engine.map`."""
        return _with_progress(self._results(work, tasks, desc), len(tasks), desc)

    def _results(self, work: Callable[[Task], Result], tasks: Sequence[Task], desc: str) -> Iterator[Result]:
        ray = self._ray
        environment = {"env_vars": _limits(1, self.keep_freed_memory)}
        remote = ray.remote(num_cpus=1, runtime_env=environment)(_call_by_name)
        name = _name_of(work)
        waiting = iter(enumerate(tasks))
        running: dict[Any, int] = {}
        done: dict[int, Any] = {}
        following = 0
        try:
            while following < len(tasks):
                # One more than there are workers waits, so that none of them does.
                while len(running) <= self.num_workers and (item := next(waiting, None)) is not None:
                    running[remote.remote(name, item[1])] = item[0]
                if following not in done:
                    for reference in ray.wait(list(running), num_returns=1)[0]:
                        number = running.pop(reference)
                        try:
                            done[number] = ray.get(reference)
                        except ray.exceptions.RayTaskError as error:
                            cause = error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))
                            raise _noted(cause, desc, number, tasks) from error
                    continue
                yield done.pop(following)
                following += 1
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _call_by_name(name: tuple[str, str], task: Any) -> Any:
    return _function(name)(task)


def _name_of(work: Callable[..., Any]) -> tuple[str, str]:
    """(module, name) under which a worker finds a function.

    Raises:
        ValueError: It is a lambda, a method, an inner function or one of the script that was started.
    """
    module, name = getattr(work, "__module__", None), getattr(work, "__qualname__", None)
    if not module or not name or "." in name or "<" in name or module == "__main__":
        raise ValueError(f"work got {work!r}; expected a function of a module that can be imported by its name.")
    return module, name


def _function(name: tuple[str, str]) -> Callable[..., Any]:
    return getattr(importlib.import_module(name[0]), name[1])


def _here(work: Callable[[Task], Result], tasks: Sequence[Task], desc: str) -> Iterator[Result]:
    for number, task in enumerate(tasks):
        try:
            result = work(task)
        except Exception as error:
            raise _noted(error, desc, number, tasks) from error.__cause__
        yield result


def _in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], desc: str, workers: int, keep_freed_memory: bool
) -> Iterator[Result]:
    name = _name_of(work)
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for number in [*range(len(tasks)), *[None] * workers]:
        waiting.put(number)
    results: queue.SimpleQueue[tuple[int, Any, Exception | None]] = queue.SimpleQueue()
    processes = [_start(workers, keep_freed_memory) for _ in range(workers)]
    threads = [
        threading.Thread(target=_drive, args=(process, name, tasks, waiting, results), daemon=True)
        for process in processes
    ]
    done: dict[int, Any] = {}
    try:
        for thread in threads:
            thread.start()
        for number in range(len(tasks)):
            while number not in done:
                finished, result, error = results.get()
                if error is not None:
                    raise _noted(error, desc, finished, tasks)
                done[finished] = result
            yield done.pop(number)
    finally:
        for process in processes:
            process.kill()
        for process, thread in zip(processes, threads, strict=True):
            process.wait()
            thread.join()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue


def _start(workers: int, keep_freed_memory: bool) -> subprocess.Popen[bytes]:
    threads = max(1, available_cores() // workers)
    return subprocess.Popen(
        worker_command("ehrseq.work.engine", "serve"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_limits(threads, keep_freed_memory), "TQDM_DISABLE": "1"},
    )


def _limits(threads: int, keep_freed_memory: bool) -> dict[str, str]:
    """Environment of a worker: together the workers have as many threads as there are cores.

    A core of its own is no reason to keep freed memory: glibc would hold up to eight arenas a core.
    """
    kept = _KEPT_MEMORY if keep_freed_memory else {}
    names = ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "MALLOC_ARENA_MAX": "2", **kept}


def _drive(
    process: subprocess.Popen[bytes],
    name: tuple[str, str],
    tasks: Sequence[Any],
    waiting: queue.SimpleQueue[int | None],
    results: queue.SimpleQueue[tuple[int, Any, Exception | None]],
) -> None:
    """Hand tasks to one process and pass its results on."""
    number: int | None = 0
    try:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker process has no pipes")
        send(process.stdin, (list(sys.path), name))
        while (number := waiting.get()) is not None:
            send(process.stdin, tasks[number])
            result, error = receive(process.stdout, died="the process ended before its task did")
            results.put((number, result, error))
            if error is not None:
                return
    except (OSError, RuntimeError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        results.put((number or 0, None, RuntimeError(f"A worker process died ({error}); out of memory?")))


def serve() -> None:
    """Loop of a worker process: a function's name, then tasks, from stdin; results to stdout.

    Stdin ends when the process that started this one does, however it ended; the worker then leaves its task at once:
    it may be begun anew by another run, and the files of one task must not have two writers.
    """
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not run into the results
    path, name = receive(source)
    sys.path[:] = path
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(source, tasks), daemon=True).start()
    while True:
        task = tasks.get()
        result, failure = None, None
        try:
            result = _function(name)(task)
        except Exception as error:
            failure = _portable(error)
        send(sink, (result, failure))


def _read_tasks(source: Any, tasks: queue.SimpleQueue[Any]) -> None:
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


def _noted(error: Exception, desc: str, number: int, tasks: Sequence[Any]) -> Exception:
    text = str(getattr(tasks[number], "name", tasks[number]))
    if len(text) > _MAX_NAME:
        text = text[: _MAX_NAME - 3] + "..."
    error.add_note(f"{desc}, task {number + 1} of {len(tasks)}: {text}")
    return error


def _with_progress(results: Iterator[Result], total: int, desc: str) -> Iterator[Result]:
    if total < 2:
        yield from results
        return
    from ehrseq.work.progress import progress_bar

    with progress_bar(total=total, desc=desc) as bar:
        for result in results:
            bar.update()
            yield result
