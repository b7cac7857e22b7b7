"""Parts that the tests of `ehrseq.work.parts` have workers do; a worker imports them by their names."""

from dataclasses import dataclass
from pathlib import Path

from ehrseq.work.files import file_digest, write_text
from ehrseq.work.parts import RecordedPart


@dataclass(frozen=True)
class Letters(RecordedPart[dict[str, int]]):
    """Counts the letters of a file, and writes them in capitals."""

    source: str
    folder: str

    @property
    def name(self):
        return self.source

    @property
    def record(self):
        return Path(self.folder) / f"{Path(self.source).stem}.json"

    def provenance(self):
        return {"source": file_digest(self.source), "steps": ("upper",)}

    def make(self):
        text = Path(self.source).read_text()
        with (Path(self.source).parent / "done.log").open("a") as log:
            log.write(f"{Path(self.source).stem}\n")
        if text == "bad":
            raise ValueError("no letters")
        write_text(self.beside(".txt"), text.upper())
        if text == "full":
            raise OSError(28, "No space left on device")
        return {"letters": len(text)}
