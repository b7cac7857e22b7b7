"""Files and folders that appear whole or not at all."""

import json
import os

import pytest

from ehrseq.work.files import (
    check_apart,
    check_replaceable,
    file_digest,
    remove_unfinished,
    write_json,
    write_text,
    write_whole,
)


def folder_of(name):
    def write(path):
        path.mkdir()
        (path / f"{name}.txt").write_text(name)

    return write


def file_of(name):
    return lambda path: path.write_text(name)


def content(path):
    return path.read_text() if path.is_file() else sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (file_of("a"), file_of("b"), "b"),
        (folder_of("a"), folder_of("b"), ["b.txt"]),
        (folder_of("a"), file_of("b"), "b"),
        (file_of("a"), folder_of("b"), ["b.txt"]),
    ],
)
def test_what_is_there_is_replaced_and_nothing_stays_beside_it(tmp_path, first, second, expected):
    target = tmp_path / "new" / "target"
    write_whole(target, first)
    write_whole(target, second)
    assert content(target) == expected
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("old", [file_of("a"), folder_of("a")])
def test_a_full_disk_leaves_what_was_there(tmp_path, old):
    def full(path):
        old(path)
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "target", old)
    before = content(tmp_path / "target")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "target", full)
    assert content(tmp_path / "target") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "target"]


def test_leftovers_of_a_killed_process_of_the_same_number_do_no_harm(tmp_path):
    folder_of("old")(tmp_path / f".target.writing-{os.getpid()}")
    write_whole(tmp_path / "target", folder_of("new"))
    assert content(tmp_path / "target") == ["new.txt"]


def test_text_and_json(tmp_path):
    write_text(tmp_path / "a.txt", "Ä\n")
    assert (tmp_path / "a.txt").read_bytes() == "Ä\n".encode()
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert (tmp_path / "a.json").read_text() == '{"a": [1, null]}'
    write_json(tmp_path / "a.json", {"a": 1}, indent=2)
    assert (tmp_path / "a.json").read_text() == json.dumps({"a": 1}, indent=2) + "\n"


def test_digests_tell_files_apart(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        write_text(tmp_path / name, text)
    digests = [file_digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_nothing_to_remove_is_no_error(tmp_path):
    remove_unfinished(tmp_path / "nowhere")


def test_a_folder_of_others_is_not_replaced(tmp_path):
    whose = (lambda name: name == "0.parquet", "files of trajectories")
    check_replaceable(tmp_path / "new", *whose)
    (tmp_path / "0.parquet").touch()
    check_replaceable(tmp_path, *whose)
    (tmp_path / "Patient.ndjson").touch()
    with pytest.raises(ValueError, match=r"other than files of trajectories \(Patient.ndjson\); name a new folder"):
        check_replaceable(tmp_path, *whose)
    with pytest.raises(ValueError, match="is a file"):
        check_replaceable(tmp_path / "0.parquet", *whose)


@pytest.mark.parametrize("output", ["data", "data/x", "."])
def test_an_output_lies_apart_from_what_is_read(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    check_apart("other", "data")
    with pytest.raises(ValueError, match="lie in one another"):
        check_apart(output, "data")
