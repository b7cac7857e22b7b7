"""What a preparation has to do: parts of the source of about equal size, and how many partitions they fall into.

Everything here follows from the source and the settings, not from the machine: the same source gives the same bytes,
whatever the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from ehrseq.data.fhir.blocks import Task, is_ndjson
from ehrseq.data.fhir.reader import size_of
from ehrseq.prepare.fhir_parts import FhirPart

BYTES_PER_EVENT = 430
"""Bytes of FHIR text that become an event, at least as a rule: MIMIC-IV has 1,230, Synthea 710, our simulator 430.
Where it is less, partitions hold more rows than was asked for.
"""
PART_BYTES = 128 << 20
"""Bytes of text in a part, about."""
DEFAULT_SHARD_ROWS = 750_000
"""Rows of a partition: a worker then takes about half a gigabyte, and two of them with their parent stay below two."""
STRIPE_BYTES = 1 << 30
"""Bytes of text in a part of a gzip file, about: each of its parts decompresses all of it."""
_MOST_STRIPES = 8


def fhir_parts(
    files: Sequence[Path], folder: Path, *, shard_rows: int, skip_errors: bool
) -> tuple[list[FhirPart], int]:
    """The parts of FHIR files, and the number of partitions.

    A plain file is cut at lines; a gzip file, which cannot be entered in the middle, is read whole by each of its
    parts, which parse every n-th block; small files are put together.
    """
    tasks: list[Task] = []
    total = 0
    for index, file in enumerate(files):
        size = size_of(file)
        total += size
        if not is_ndjson(str(file)) or size <= PART_BYTES:
            tasks.append(Task(index, str(file), cost=size))
        elif file.suffix == ".gz":
            stripes = min(_MOST_STRIPES, math.ceil(size / STRIPE_BYTES))
            tasks += [
                Task(index, str(file), stripe=stripe, stripes=stripes, cost=size // stripes)
                for stripe in range(stripes)
            ]
        else:
            tasks += line_ranges(Task(index, str(file)), size)
    partitions = max(1, math.ceil(total / (shard_rows * BYTES_PER_EVENT)))
    return [
        FhirPart(number, tuple(group), str(folder), partitions, skip_errors)
        for number, group in enumerate(_grouped(tasks))
    ], partitions


def line_ranges(task: Task, size: int) -> list[Task]:
    """A plain file in ranges of whole lines."""
    bounds = [0]
    with open(task.path, "rb") as stream:
        while bounds[-1] + PART_BYTES < size:
            stream.seek(bounds[-1] + PART_BYTES)
            stream.readline()
            bounds.append(stream.tell())
    if bounds[-1] < size:
        bounds.append(size)
    return [replace(task, start=start, stop=stop, cost=stop - start) for start, stop in pairwise(bounds)]


def _grouped(tasks: Sequence[Task]) -> list[list[Task]]:
    """Neighbours together, as long as they are not more than a part."""
    groups: list[list[Task]] = []
    cost = 0
    for task in tasks:
        if not groups or cost + task.cost > PART_BYTES:
            groups.append([])
            cost = 0
        groups[-1].append(task)
        cost += task.cost
    return groups
