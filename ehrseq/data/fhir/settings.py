"""What a user may say about a source: where the hospital is, and what its encounters' classes mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ehrseq.data.fhir.classes import checked_mapping
from ehrseq.data.instants import check_zone


@dataclass(frozen=True)
class FhirSettings:
    """How a source is to be read.

    Attributes:
        timezone: Zone of dates and times that state none: a name of the IANA table or a fixed offset. None: that of the
            encounter that they belong to, else of the patient's latest encounter, else UTC.
        encounter_classes: (spelling, class) pairs, see `checked_mapping`.
    """

    timezone: str | None = None
    encounter_classes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, timezone: str | None, encounter_classes: Mapping[str, str] | None) -> FhirSettings:
        """Checked settings.

        Raises:
            ValueError: There is no such zone or class.
        """
        if timezone is not None:
            check_zone(timezone)
        return cls(timezone, tuple(sorted(checked_mapping(encounter_classes).items())))

    def to_dict(self) -> dict[str, Any]:
        """What metadata keep: only what was said."""
        said: dict[str, Any] = {}
        if self.timezone is not None:
            said["timezone"] = self.timezone
        if self.encounter_classes:
            said["encounter_classes"] = dict(self.encounter_classes)
        return said


NO_SETTINGS = FhirSettings()
"""Nothing was said."""
