"""Work in parts: a stopped run goes on, changed sources and settings begin anew, nothing half-written is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ehrseq.work.engine import get_engine
from ehrseq.work.files import write_text
from ehrseq.work.parts import kept_parts, run_parts, settings_key
from tests.work.parts_work import Letters

ONE = get_engine(num_workers=1)
TEXTS = {"a": "one", "b": "three", "c": "seventeen", "d": "x"}


@pytest.fixture
def sources(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.in").write_text(text)
    return [str(tmp_path / f"{name}.in") for name in TEXTS]


def count(sources, folder, engine=ONE):
    return list(run_parts([Letters(source, str(folder)) for source in sources], desc="L", folder=folder, engine=engine))


def done(sources) -> str:
    """The parts that were done, in order, since the last call."""
    log = Path(sources[0]).parent / "done.log"
    names = log.read_text().replace("\n", "") if log.exists() else ""
    log.unlink(missing_ok=True)
    return names


@pytest.mark.parametrize("workers", [1, 2])
def test_reports_come_in_the_order_of_the_parts(sources, tmp_path, workers):
    reports = count(sources, tmp_path / "parts", get_engine(num_workers=workers))
    assert reports == [{"letters": len(text)} for text in TEXTS.values()]
    assert [(tmp_path / "parts" / f"{name}.txt").read_text() for name in TEXTS] == [t.upper() for t in TEXTS.values()]


def test_a_stopped_run_does_only_what_is_missing(sources, tmp_path):
    Path(sources[2]).write_text("bad")
    with pytest.raises(ValueError, match="no letters") as error:
        count(sources, tmp_path / "parts")
    assert sources[2] in str(error.value.__notes__)
    assert done(sources) == "abc"
    Path(sources[2]).write_text("seventeen")
    first = count(sources, tmp_path / "parts")
    assert done(sources) == "cd"
    assert count(sources, tmp_path / "parts") == first
    assert done(sources) == ""


def test_a_source_that_changed_is_done_again(sources, tmp_path):
    count(sources, tmp_path / "parts")
    done(sources)
    Path(sources[1]).write_text("four")
    assert count(sources, tmp_path / "parts")[1] == {"letters": 4}
    assert done(sources) == "b"


def test_a_part_that_failed_between_its_file_and_its_record_is_never_done(sources, tmp_path):
    """Its file is that of other sources; even if these come back, the old record must not speak for it."""
    count(sources, tmp_path / "parts")
    Path(sources[1]).write_text("full")
    with pytest.raises(OSError, match="No space left"):
        count(sources, tmp_path / "parts")
    Path(sources[1]).write_text("three")
    done(sources)
    count(sources, tmp_path / "parts")
    assert done(sources) == "b"
    assert (tmp_path / "parts" / "b.txt").read_text() == "THREE"


@pytest.mark.parametrize("content", ["", "{", "{}", json.dumps({"provenance": {}, "report": {}})])
def test_a_record_that_says_nothing_is_none(sources, tmp_path, content):
    count(sources, tmp_path / "parts")
    done(sources)
    (tmp_path / "parts" / "a.json").write_text(content)
    count(sources, tmp_path / "parts")
    assert done(sources) == "a"


def test_what_a_killed_run_left_half_written_is_removed(sources, tmp_path):
    half = tmp_path / "parts" / "below" / ".a.txt.writing-1"
    half.parent.mkdir(parents=True)
    half.write_text("hal")
    count(sources, tmp_path / "parts")
    assert not half.exists()


def test_the_folder_is_kept_for_the_next_run_until_the_work_is_done(sources, tmp_path):
    def run(seed, fail):
        with kept_parts(tmp_path / ".parts", {"seed": seed}) as folder:
            count(sources, folder)
            if fail:
                raise OSError("disk full")
            return folder

    with pytest.raises(OSError, match="disk full"):
        run(seed=0, fail=True)
    done(sources)
    assert not run(seed=1, fail=False).exists()
    assert done(sources) == "abcd"  # of other settings nothing is used
    assert not run(seed=0, fail=False).exists()
    assert done(sources) == ""


def test_a_temporary_folder_is_gone_however_the_block_ends():
    def run():
        with kept_parts(None, {}) as folder:
            write_text(folder / "a.txt", "a")
            places.append(folder)
            raise OSError("disk full")

    places: list[Path] = []
    with pytest.raises(OSError, match="disk full"):
        run()
    assert not places[0].exists()


def test_keys_tell_settings_apart():
    keys = [settings_key(settings) for settings in ({}, {"a": 1}, {"a": 2}, {"a": [1]}, [None], {"a": Path("b")})]
    assert len(set(keys)) == len(keys)
    assert settings_key({"a": 1, "b": (2,)}) == settings_key({"b": [2], "a": 1})
