"""The size that a progress bar counts to: exact where a gzip file tells it, mended while reading where it does not."""

import gzip
import json

import pytest
import tqdm.auto

from ehrseq.data import read_fhir
from ehrseq.data.fhir.blocks import file_size
from tests.data.fhir.samples import observation, patient

TEXT = "\n".join(
    json.dumps(row) for row in [patient(), *[observation(id=f"o{n}", value=n / 7) for n in range(3000)]]
).encode()


def members(text: bytes) -> bytes:
    """The text as gzip members of some kilobytes, as bgzip writes it, with its empty last one."""
    return b"".join(gzip.compress(text[k : k + 50_000]) for k in range(0, len(text), 50_000)) + gzip.compress(b"")


@pytest.mark.parametrize("text", [b"", b"{}", TEXT, bytes(3_000_000)], ids=["empty", "tiny", "lines", "zeros"])
def test_a_gzip_file_tells_its_size(tmp_path, text):
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(text))
    assert file_size(tmp_path / "a.ndjson.gz") == len(text)
    (tmp_path / "a.ndjson").write_bytes(text)
    assert file_size(tmp_path / "a.ndjson") == len(text)


def test_of_several_gzip_members_the_size_is_about_right(tmp_path):
    (tmp_path / "a.ndjson.gz").write_bytes(members(TEXT))
    assert 0.2 < file_size(tmp_path / "a.ndjson.gz") / len(TEXT) < 5


@pytest.mark.parametrize("pack", [gzip.compress, members, bytes], ids=["gzip", "members", "plain"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_bar_never_runs_over_and_ends_full(tmp_path, monkeypatch, pack, workers):
    for name in ("a", "b"):
        (tmp_path / f"{name}.ndjson{'' if pack is bytes else '.gz'}").write_bytes(pack(TEXT))
    monkeypatch.setattr("ehrseq.data.fhir.reader._PROGRESS_FROM", 0)
    monkeypatch.setattr("ehrseq.data.fhir.blocks.BLOCK_BYTES", 40_000)
    seen = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": False})

        def update(self, n=1):
            super().update(n)
            seen.append((self.n, self.total))

        def close(self):
            seen.append((self.n, self.total))
            super().close()

    monkeypatch.setattr("ehrseq.work.progress.tqdm", Bar)
    read_fhir(tmp_path, num_workers=workers)
    assert all(done <= total for done, total in seen)
    assert seen[-1] == (2 * len(TEXT), 2 * len(TEXT))
