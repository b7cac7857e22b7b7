"""One way to work on many tasks: in this process, in several processes, or on a Ray cluster.

    engine = get_engine("local", num_workers=2)
    for result in engine.map(convert_file, tasks, desc="Reading"):
        ...

A task is small (paths, numbers); tables stay on disk, or come back piece by piece (`Engine.stream`). Whoever calls
decides what needs to be done at all (a result file that is there already); engines know nothing of it.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from ehrseq.work.pipes import receive, send, worker_command
from ehrseq.work.worker import Message, Work, import_path, messages_of, results_of, work_of, worker_environment

Task = TypeVar("Task")
Result = TypeVar("Result")

ENGINES = ("local", "ray")

_Arrival = tuple[int, Message]  # number of the task, and what came of it
_MAX_NAME = 160  # characters of a task in messages


class Engine(Protocol):
    """Applies a function to many tasks."""

    num_workers: int

    def map(self, work: Callable[[Task], Result], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """One result a task, in the order of the tasks, with a progress bar.

        Args:
            work: A function of a module (workers import it by its name).
            tasks: What it is called with; pickled. An attribute `name` stands for the task in messages.
            desc: What is being done, for the progress bar and for messages.

        Raises:
            Exception: The first error of a task, with a note that names the task; no further task is begun.
            RuntimeError: A worker process died.
        """
        ...

    def stream(self, work: Callable[[Task], Iterator[Result]], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """Many results a task, as they come: those of one task in their order, those of several tasks mixed.

        For results that are large: workers wait where the caller falls behind, so that memory stays modest. Tasks
        begin in their order; large ones first is best. Progress is the caller's to show, in a measure of its own.

        Args:
            work: A generator function of a module.
            tasks: See `map`.
            desc: What is being done, for messages.

        Raises:
            Exception: See `map`.
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
        num_workers: Processes at a time. Those of `map` stand beside this one, which waits; in `stream`, where it has
            to take in large results, this one is among them and works whenever no result is ready.
        keep_freed_memory: See `get_engine`.
    """

    def __init__(self, num_workers: int, *, keep_freed_memory: bool = False) -> None:
        self.num_workers = num_workers
        self.keep_freed_memory = keep_freed_memory

    def map(self, work: Callable[[Task], Result], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """See `Engine.map`."""
        return _one_each(self._arrivals(work, tasks, desc, streams=False), len(tasks), desc)

    def stream(self, work: Callable[[Task], Iterator[Result]], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """See `Engine.stream`."""
        return _all_of(self._arrivals(work, tasks, desc, streams=True))

    def _arrivals(
        self, work: Callable[[Any], Any], tasks: Sequence[Any], desc: str, *, streams: bool
    ) -> Iterator[_Arrival]:
        workers = min(self.num_workers, len(tasks))
        if workers <= 1:
            return _work_here(work, streams, tasks, desc, range(len(tasks)))
        return self._in_processes(work, tasks, desc, workers, streams)

    def _in_processes(
        self, work: Callable[[Any], Any], tasks: Sequence[Any], desc: str, workers: int, streams: bool
    ) -> Iterator[_Arrival]:
        named = work_of(work, streams=streams)
        waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for number in [*range(len(tasks)), *[None] * workers]:
            waiting.put(number)
        # Bounded where results are large: a worker that finds no room waits.
        arrived: queue.Queue[_Arrival] = queue.Queue(maxsize=2 * workers if streams else 0)
        here = _work_here(work, streams, tasks, desc, iter(waiting.get, None)) if streams else iter(())
        processes = [self._start(workers) for _ in range(workers - streams)]
        threads = [
            threading.Thread(target=_drive, args=(process, named, tasks, waiting, arrived), daemon=True)
            for process in processes
        ]
        unfinished = len(tasks)
        try:
            for thread in threads:
                thread.start()
            while unfinished:
                arrival = next(here, None) if arrived.empty() else None
                number, message = arrival or arrived.get()
                if message.error is not None:
                    raise _noted(message.error, desc, number, tasks)
                unfinished -= message.is_last
                yield number, message
        finally:
            _end(processes, threads, arrived)

    def _start(self, workers: int) -> subprocess.Popen[bytes]:
        """One of several workers: together they have as many threads as there are cores."""
        limits = worker_environment(max(1, available_cores() // workers), keep_freed_memory=self.keep_freed_memory)
        return subprocess.Popen(
            worker_command("ehrseq.work.worker", "serve"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **limits, "TQDM_DISABLE": "1"},
        )


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
            # RAY_ADDRESS decides whether this joins a cluster; only a cluster that is started here takes a number.
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": num_workers, "include_dashboard": False}
            self._ray.init(log_to_driver=False, logging_level="ERROR", **here)
        self.num_workers = num_workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map(self, work: Callable[[Task], Result], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """See `Engine.map`."""
        return _one_each(self._arrivals(work, tasks, desc, streams=False), len(tasks), desc)

    def stream(self, work: Callable[[Task], Iterator[Result]], tasks: Sequence[Task], *, desc: str) -> Iterator[Result]:
        """See `Engine.stream`."""
        return _all_of(self._arrivals(work, tasks, desc, streams=True))

    def _arrivals(
        self, work: Callable[[Any], Any], tasks: Sequence[Any], desc: str, *, streams: bool
    ) -> Iterator[_Arrival]:
        ray = self._ray
        remote = ray.remote(
            num_cpus=1,
            num_returns="streaming",
            runtime_env={"env_vars": worker_environment(1, keep_freed_memory=self.keep_freed_memory)},
            _generator_backpressure_num_objects=2,
        )(messages_of)
        named = work_of(work, streams=streams)
        waiting = iter(enumerate(tasks))
        running: dict[Any, int] = {}
        try:
            while True:
                # One more than there are workers waits, so that none of them does.
                while len(running) <= self.num_workers and (item := next(waiting, None)) is not None:
                    running[remote.remote(named, item[1])] = item[0]
                if not running:
                    return
                for messages in ray.wait(list(running), num_returns=1)[0]:
                    number = running[messages]
                    try:
                        message = ray.get(next(messages))
                    except ray.exceptions.RayError as error:
                        raise _noted(_death(error), desc, number, tasks) from error
                    if message.error is not None:
                        raise _noted(message.error, desc, number, tasks)
                    if message.is_last:
                        del running[messages]
                    yield number, message
        finally:
            for messages in running:
                ray.cancel(messages, force=True)


def _work_here(
    work: Callable[[Any], Any], streams: bool, tasks: Sequence[Any], desc: str, numbers: Iterable[int]
) -> Iterator[_Arrival]:
    for number in numbers:
        try:
            for result in results_of(work, streams, tasks[number]):
                yield number, Message(result)
        except Exception as error:
            raise _noted(error, desc, number, tasks) from error.__cause__
        yield number, Message(is_last=True)


def _drive(
    process: subprocess.Popen[bytes],
    work: Work,
    tasks: Sequence[Any],
    waiting: queue.SimpleQueue[int | None],
    arrived: queue.Queue[_Arrival],
) -> None:
    """Hand tasks to one process and pass on what comes of them."""
    number: int | None = 0
    try:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker process has no pipes")
        send(process.stdin, (import_path(work), work))
        while (number := waiting.get()) is not None:
            send(process.stdin, tasks[number])
            message = Message()
            while not message.is_last:
                message = receive(process.stdout, died="the process ended before its task did")
                arrived.put((number, message))
            if message.error is not None:
                return
    except (OSError, RuntimeError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        arrived.put((number or 0, Message(is_last=True, error=_death(error))))


def _death(error: Exception) -> RuntimeError:
    return RuntimeError(f"A worker process died ({error}); out of memory? Use fewer workers.")


def _end(
    processes: Sequence[subprocess.Popen[bytes]], threads: Sequence[threading.Thread], arrived: queue.Queue[_Arrival]
) -> None:
    """End the workers, whatever they do, and the threads that drive them."""
    for process in processes:
        process.kill()
    while any(thread.is_alive() for thread in threads):
        try:
            arrived.get(timeout=0.02)  # a thread may wait for room in the queue
        except queue.Empty:
            continue
    for process in processes:
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


def _noted(error: Exception, desc: str, number: int, tasks: Sequence[Any]) -> Exception:
    """The error, with a note that names its task."""
    text = str(getattr(tasks[number], "name", tasks[number]))
    if len(text) > _MAX_NAME:
        text = text[: _MAX_NAME - 3] + "..."
    error.add_note(f"{desc}, task {number + 1} of {len(tasks)}: {text}")
    return error


def _all_of(arrivals: Iterator[_Arrival]) -> Iterator[Any]:
    """The results, as they come."""
    for _, message in arrivals:
        if not message.is_last:
            yield message.result


def _one_each(arrivals: Iterator[_Arrival], total: int, desc: str) -> Iterator[Any]:
    """The one result of each task, in the order of the tasks; a progress bar where there are several."""
    from ehrseq.work.progress import progress_bar

    early: dict[int, Any] = {}
    following = 0
    with progress_bar(total=total, desc=desc, disable=total < 2) as bar:
        for number, message in arrivals:
            if not message.is_last:
                early[number] = message.result
            while following in early:
                bar.update()
                yield early.pop(following)
                following += 1
