"""What `metadata/dataset.json` says of a dataset: who wrote it, where the hospital is, what its codes mean.

What a user says about a source when it is prepared is kept there, so that whoever labels, counts, audits or tokenizes
the dataset need not be told again. This is the one reader of it.

| key | meaning |
|---|---|
| `timezone` | the hospital's zone (`Europe/Berlin`, `-07:00`), whose days count |
| `encounter_classes` | what unknown classes of FHIR's encounters were read as: spelling -> class |
| `code_map` | [regular expression, kind] pairs that are tried before `DEFAULT_CODE_MAP` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ehrseq.data.fhir.classes import checked_mapping
from ehrseq.data.instants import check_zone
from ehrseq.tokenization.ehr_codes import DEFAULT_CODE_MAP, code_kinds

CodeMap = tuple[tuple[str, str], ...]
"""[regular expression, kind] pairs."""


@dataclass(frozen=True)
class DatasetSettings:
    """What a user says about a source, or about the dataset made of it.

    Attributes:
        timezone: The hospital's zone, that of dates and times that state none: a name of the IANA table or a fixed
            offset. None: nobody said; then FHIR's are in that of the encounter that they belong to, else of the
            patient's latest encounter, else UTC.
        encounter_classes: Spelling -> class of FHIR's encounters, see `checked_mapping`.
        code_map: Pairs that are tried before the default ones.
    """

    timezone: str | None = None
    encounter_classes: Mapping[str, str] = field(default_factory=dict)
    code_map: CodeMap = ()

    @classmethod
    def of(
        cls,
        timezone: str | None = None,
        encounter_classes: Mapping[str, str] | None = None,
        code_map: Sequence[Sequence[str]] | None = None,
    ) -> DatasetSettings:
        """Checked settings.

        Raises:
            ValueError: There is no such zone or class; no pairs of a regular expression and a kind.
        """
        if timezone is not None:
            check_zone(timezone)
        if isinstance(code_map, str | Mapping):
            raise ValueError(f"code_map got {code_map!r}; expected a list of [regular expression, kind] pairs.")
        code_kinds([], code_map or ())
        pairs = tuple((str(pattern), str(kind)) for pattern, kind in code_map or ())
        return cls(timezone, checked_mapping(encounter_classes), pairs)

    @property
    def rules(self) -> CodeMap | None:
        """All pairs that tell what a code is, the user's before the default ones; None: the default ones alone."""
        defaults = ((pattern, kind) for pattern, kind in DEFAULT_CODE_MAP)
        return (*self.code_map, *defaults) if self.code_map else None

    def over(self, other: DatasetSettings) -> DatasetSettings:
        """These settings, and those of another where nothing was said here."""
        return DatasetSettings(
            self.timezone if self.timezone is not None else other.timezone,
            self.encounter_classes or other.encounter_classes,
            self.code_map or other.code_map,
        )

    def to_dict(self) -> dict[str, Any]:
        """What the metadata keep: only what was said."""
        kept: dict[str, Any] = {} if self.timezone is None else {"timezone": self.timezone}
        if self.encounter_classes:
            kept["encounter_classes"] = dict(self.encounter_classes)
        if self.code_map:
            kept["code_map"] = [list(pair) for pair in self.code_map]
        return kept


NO_SETTINGS = DatasetSettings()
"""Nothing was said."""


def read_settings(dataset: str | Path) -> DatasetSettings:
    """What the metadata of a dataset say; nothing where it has none.

    Raises:
        ValueError: They are damaged, name a zone or class that there is not, or pairs that are none.
    """
    content = read_metadata(dataset)
    try:
        return DatasetSettings.of(content.get("timezone"), content.get("encounter_classes"), content.get("code_map"))
    except ValueError as error:
        raise ValueError(f"{Path(dataset) / 'metadata' / 'dataset.json'}: {error}") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """`metadata/dataset.json` of a dataset; empty where there is none."""
    file = Path(path) / "metadata" / "dataset.json"
    return read_json(file) if file.is_file() else {}


def read_notes(dataset: str | Path) -> dict[str, int]:
    """The notes of the report of a dataset's conversion; none where it has no such report."""
    file = Path(dataset) / "metadata" / "conversion_report.json"
    notes = read_json(file).get("notes") if file.is_file() else None
    return {str(note): count for note, count in notes.items() if isinstance(count, int)} if notes else {}


def written_by_us(path: Path) -> bool:
    """Whether this package wrote a dataset."""
    return read_metadata(path).get("etl_name") == "ehrseq"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a dataset's metadata.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    try:
        content = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); mend it, or take it away.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a JSON object.")
    return content
