"""Worker processes that read FHIR blocks beside this one.

Not `multiprocessing`: its workers import the caller's script (which then needs a main guard) or fork a process that
already runs threads, and unpickling a function of this package would import transformers in every worker. These workers
are plain interpreters that load only `ehrseq.data.fhir.blocks` and speak length-prefixed pickles over their own pipes.
"""

from __future__ import annotations

import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ehrseq.data.fhir.blocks import Block, Task, read_task
from ehrseq.work.pipes import receive, send, worker_command


def work() -> None:
    """Loop of a worker process: tasks from stdin, blocks to stdout."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (message := receive(source)) is not None:
        task, skip_errors = message
        try:
            for block in read_task(task, skip_errors=skip_errors):
                send(sink, block)
        except ValueError as error:
            send(sink, error)
        send(sink, None)


def read_in_parallel(tasks: Sequence[Task], workers: int, *, skip_errors: bool) -> Iterator[Block]:
    """Blocks of all tasks in any order, by several processes.

    This process is one of them: it reads whenever no other has a block ready.

    Args:
        tasks: What to read; dealt out in this order (large ones first is best).
        workers: Number of processes, this one included.
        skip_errors: See `read_task`.

    Raises:
        ValueError: A line cannot be read.
        RuntimeError: A worker process died (out of memory, killed).
    """
    waiting: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    for task in [*tasks, *[None] * workers]:
        waiting.put(task)
    # Bounded, so that workers wait where this process falls behind: memory stays modest.
    results: queue.Queue[Any] = queue.Queue(maxsize=2 * workers)
    processes = [_start() for _ in range(workers - 1)]
    threads = [
        threading.Thread(target=_drive, args=(process, waiting, results, skip_errors), daemon=True)
        for process in processes
    ]
    try:
        for thread in threads:
            thread.start()
        own: Iterator[Block] | None = _read_waiting(waiting, skip_errors)
        running = len(processes)
        while running or own is not None:
            if own is not None and results.empty():
                block = next(own, None)
                if block is None:
                    own = None
                else:
                    yield block
                continue
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, Exception):
                raise result
            else:
                yield result
    finally:
        for process in processes:
            process.kill()
        while any(thread.is_alive() for thread in threads):
            # A thread may wait for room in the queue.
            try:
                results.get(timeout=0.02)
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


def _read_waiting(waiting: queue.SimpleQueue[Task | None], skip_errors: bool) -> Iterator[Block]:
    while (task := waiting.get()) is not None:
        yield from read_task(task, skip_errors=skip_errors)


def _start() -> subprocess.Popen[bytes]:
    command = worker_command("ehrseq.data.fhir.pool", "work")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _drive(
    process: subprocess.Popen[bytes],
    waiting: queue.SimpleQueue[Task | None],
    results: queue.Queue[Any],
    skip_errors: bool,
) -> None:
    """Hand tasks to one process and pass its blocks on; None when all is done, an exception when it fails."""
    try:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker process has no pipes")
        while (task := waiting.get()) is not None:
            send(process.stdin, (task, skip_errors))
            while (result := receive(process.stdout, died="the process ended before its task did")) is not None:
                results.put(result)
        results.put(None)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        results.put(
            RuntimeError(f"A worker that reads FHIR files died ({error}); out of memory? Read with num_workers=1.")
        )
