"""The engine: results in order, errors named, workers that start clean and end with their parent."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import time

import pytest

from ehrseq import __version__
from ehrseq.work.engine import LocalEngine, available_cores, get_engine
from tests.processes import FROM_HERE
from tests.work import engine_work as work

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (extra ehrseq[ray])")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(get_engine(num_workers=workers).map(work.square, range(11), desc="Squares")) == [
        number * number for number in range(11)
    ]


def test_no_tasks_are_no_results():
    assert list(get_engine(num_workers=2).map(work.square, [], desc="None")) == []


def test_workers_are_other_processes_and_share_the_cores():
    results = list(get_engine(num_workers=2).map(work.process_and_threads, range(6), desc="Who"))
    assert len({process for process, _ in results}) == 2
    assert os.getpid() not in {process for process, _ in results}
    assert {threads for _, threads in results} == {str(max(1, available_cores() // 2))}


def test_threads_of_workers_that_wait_sleep():
    assert set(get_engine(num_workers=2).map(work.wait_policy, range(2), desc="Policy")) == {"PASSIVE"}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_stream_gives_every_result_of_every_task(workers):
    results = list(get_engine(num_workers=workers).stream(work.count_up, [3, 0, 5, 1, 2], desc="Counting"))
    assert sorted(results) == [(number, k) for number in (1, 2, 3, 5) for k in range(number)]
    for number in (1, 2, 3, 5):  # those of one task in their order
        assert [k for task, k in results if task == number] == list(range(number))


def test_no_tasks_are_an_empty_stream():
    assert list(get_engine(num_workers=2).stream(work.count_up, [], desc="None")) == []


def test_this_process_is_one_of_the_workers_of_a_stream():
    results = list(get_engine(num_workers=2).stream(work.blocks_with_process, range(30), desc="Who"))
    assert len(results) == 120
    assert sorted({block[0] for _, block in results}) == list(range(30))
    processes = {process for process, _ in results}
    assert len(processes) == 2
    assert os.getpid() in processes


def test_workers_of_a_stream_wait_for_a_slow_reader(tmp_path):
    results = get_engine(num_workers=2).stream(work.mark_each, [str(tmp_path)] * 2, desc="Slow")
    next(results)
    time.sleep(2.0)
    assert len(list(tmp_path.iterdir())) < 15  # one here, a few in the queue, one in the pipe
    assert sum(1 for _ in results) == 199


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_the_middle_of_a_stream_is_raised_with_its_task(workers):
    with pytest.raises(ValueError, match=r"a\.ndjson, line 7: not JSON") as caught:
        list(get_engine(num_workers=workers).stream(work.refuse_three_in_the_middle, range(9), desc="Reading"))
    assert caught.value.__notes__ == ["Reading, task 4 of 9: 3"]


def test_a_worker_of_a_stream_that_dies_is_an_error_not_a_hang():
    with pytest.raises(RuntimeError, match="worker process died"):
        list(get_engine(num_workers=2).stream(work.die_in_the_middle, [os.getpid()] * 100, desc="Dying"))


def test_a_reader_that_leaves_a_stream_ends_the_workers():
    results = get_engine(num_workers=3).stream(work.blocks_with_process, range(50), desc="Early")
    next(results)
    results.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.parametrize("keep", [True, False])
def test_workers_that_train_keep_the_memory_that_they_freed(keep):
    engine = get_engine(num_workers=2, keep_freed_memory=keep)
    for first, second in engine.map(work.pages_fetched_again, range(2), desc="Pages"):
        assert (second < first / 100) if keep else (second > first / 2)


def test_a_worker_starts_without_torch_and_finds_the_package_when_it_asks():
    engine = get_engine(num_workers=2)
    assert list(engine.map(work.loaded_modules, range(2), desc="Modules")) == [False, False]
    assert list(engine.map(work.lazy_attribute, range(2), desc="Lazy")) == [__version__] * 2


def test_what_a_worker_prints_does_not_run_into_the_results():
    assert list(get_engine(num_workers=2).map(work.chatter, range(4), desc="Talk")) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_is_raised_with_its_task(workers):
    with pytest.raises(ValueError, match=r"a\.ndjson, line 7: not JSON") as caught:
        list(get_engine(num_workers=workers).map(work.refuse_three, range(9), desc="Reading"))
    assert caught.value.__notes__ == ["Reading, task 4 of 9: 3"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_keeps_its_kind(workers):
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(get_engine(num_workers=workers).map(work.disk_full, range(2), desc="Writing"))
    assert caught.value.errno == 28
    assert caught.value.filename in ("0.parquet", "1.parquet")  # whichever worker is first


def test_an_error_that_cannot_travel_keeps_its_words():
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        list(get_engine(num_workers=2).map(work.odd_error, range(2), desc="Odd"))


def test_a_worker_that_dies_is_an_error_not_a_hang():
    with pytest.raises(RuntimeError, match="worker process died"):
        list(get_engine(num_workers=2).map(work.die, range(4), desc="Dying"))


def test_no_task_begins_after_an_error(tmp_path):
    tasks = [(str(tmp_path), number) for number in range(40)]
    with pytest.raises(ValueError, match="first"):
        list(get_engine(num_workers=2).map(work.mark, tasks, desc="Marks"))
    begun = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == begun < 10


def test_a_reader_that_stops_early_ends_the_workers():
    results = get_engine(num_workers=2).map(work.square, range(50), desc="Early")
    assert next(results) == 0
    results.close()


def test_workers_need_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from ehrseq.work.engine import LocalEngine\n"
        "from tests.work.engine_work import square\n"
        "print(list(LocalEngine(2).map(square, range(4), desc='x')))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=FROM_HERE, check=True)
    assert done.stdout.strip() == "[0, 1, 4, 9]"


def test_workers_end_with_a_killed_parent_in_the_middle_of_a_task(tmp_path):
    """Else the same command, given again, would write beside them."""
    call = (
        "from ehrseq.work.engine import LocalEngine; from tests.work.engine_work import work_long; "
        f"list(LocalEngine(2).map(work_long, [{str(tmp_path)!r}] * 2, desc='x'))"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", call], env=FROM_HERE, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    parent.kill()
    parent.communicate(timeout=60)  # the workers hold stderr too: it ends when they have ended


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "spark"}, r"engine got 'spark'; expected one of \['local', 'ray'\]"),
        ({"num_workers": 0}, "num_workers must be a whole number from 1 on, got 0"),
        ({"num_workers": True}, "got True"),
        ({"num_workers": 1.5}, "got 1.5"),
        ({"num_workers": "2"}, "got '2'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_engine(**arguments)


@pytest.mark.parametrize("function", [lambda task: task, "".join, type("A", (), {"f": lambda self: self})().f])
def test_work_that_no_worker_could_find_is_refused(function):
    with pytest.raises(ValueError, match="expected a function of a module"):
        list(LocalEngine(2).map(function, [1, 2], desc="x"))


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_extra_is_named():
    with pytest.raises(ImportError, match=r'pip install "ehrseq\[ray\]"'):
        get_engine("ray")


@pytest.mark.slow
@needs_ray
def test_ray_gives_what_the_local_engine_gives():
    engine = get_engine("ray", num_workers=2)
    assert list(engine.map(work.square, range(11), desc="Squares")) == [number * number for number in range(11)]
    with pytest.raises(ValueError, match="line 7") as caught:
        list(engine.map(work.refuse_three, range(9), desc="Reading"))
    assert caught.value.__notes__ == ["Reading, task 4 of 9: 3"]
    assert sorted(engine.stream(work.count_up, [3, 0, 5], desc="Counting")) == [
        (number, k) for number in (3, 5) for k in range(number)
    ]
    with pytest.raises(ValueError, match="line 7") as caught:
        list(engine.stream(work.refuse_three_in_the_middle, range(9), desc="Reading"))
    assert caught.value.__notes__ == ["Reading, task 4 of 9: 3"]
    with pytest.raises(RuntimeError, match="worker process died"):
        list(engine.map(work.die, range(4), desc="Dying"))
