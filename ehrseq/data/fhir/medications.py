"""Codes of medications: a concept, a contained Medication, a Medication given elsewhere, a mixture of others.

Ingredients may be references to further medications. Each is looked at once, so that medications which refer to one
another cost no more than their text; a mixture has at most `MOST_CODES` codes, and what is cut is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ehrseq.data.fhir.codes import Coder
from ehrseq.data.fhir.concepts import modifier_of
from ehrseq.data.fhir.elements import one_line
from ehrseq.data.fhir.periods import plain_status
from ehrseq.data.fhir.references import Resolver, key_of
from ehrseq.data.fhir.rows import MEDICATION_REFERENCE

MOST_CODES = 64
"""Codes of one medication: a row each for every time it is given. Multivitamin infusions have about 20."""

_MOST_CONTAINED = 200
"""Contained medications that one refers to, directly or not."""

_ORDERS = frozenset(("order", "original-order", "reflex-order", "filler-order", "instance-order"))
"""Intents of a MedicationRequest that ask for something to be given; a proposal, a plan and an option do not."""

CUT = f"codes of medications beyond the first {MOST_CODES} of one, left out"
"""Note of a report."""


def is_no_order(intent: object) -> bool:
    """Whether a MedicationRequest only proposes or plans something."""
    return intent is not None and plain_status(intent) not in _ORDERS


def contained_in(holder: dict[str, Any], literal: str) -> dict[str, Any] | None:
    """The contained resource that `#x` names; its id is `x`, or `#x` as some servers have it."""
    name = literal.removeprefix("#")
    for contained in holder.get("contained") or ():
        if str(contained.get("id")).removeprefix("#") == name:
            return contained if contained is not holder else None
    return None


class MedicationReader:
    """Codes of medications.

    Args:
        coder: Codes of concepts.
        counts: Current counts (they change from block to block).
    """

    def __init__(self, coder: Coder, counts: Callable[[], Counter[tuple[str, str]]]) -> None:
        self._coder = coder
        self._counts = counts

    def codes(self, medication: dict[str, Any], server: str) -> list[str]:
        """Codes of a Medication: its own, else those of its ingredients."""
        return self._own(medication) or self._bounded(self._of(medication, medication, server, set()))

    def referenced(self, reference: dict[str, Any], holder: dict[str, Any], server: str) -> list[str]:
        """Codes of the Medication that a Reference of `holder` names; still a key where it is not contained."""
        return self._bounded(self._referenced(reference, holder, server, set()))

    def _own(self, medication: dict[str, Any]) -> list[str]:
        """The code of a medication, as a list; empty where it has none."""
        concept = medication.get("code")
        code = self._coder.code("MEDICATION", concept) if concept else None
        return [code] if code else []

    def _bounded(self, codes: list[str]) -> list[str]:
        distinct = list(dict.fromkeys(codes))
        if len(distinct) > MOST_CODES:
            self._counts()["notes", CUT] += len(distinct) - MOST_CODES
        return distinct[:MOST_CODES]

    def _of(self, medication: dict[str, Any], holder: dict[str, Any], server: str, seen: set[str]) -> list[str]:
        codes = self._own(medication)
        if codes:
            return codes
        for ingredient in medication.get("ingredient") or ():
            if (url := modifier_of(ingredient)) is not None:
                self._counts()["skipped", f"Medication.ingredient: modifier extension not understood ({url})"] += 1
                continue
            item = ingredient.get("itemCodeableConcept")
            if item:
                code = self._coder.code("MEDICATION", item)
                codes += [code] if code else []
            elif ingredient.get("itemReference"):
                codes += self._referenced(ingredient["itemReference"], holder, server, seen)
        return codes

    def _referenced(self, reference: dict[str, Any], holder: dict[str, Any], server: str, seen: set[str]) -> list[str]:
        literal = reference.get("reference") or ""
        if literal.startswith("#"):
            contained = contained_in(holder, literal)
            if contained is not None:
                if literal in seen:  # looked at already, or in a circle
                    return []
                if len(seen) >= _MOST_CONTAINED:
                    self._counts()["notes", CUT] += 1
                    return []
                seen.add(literal)
                return self._of(contained, holder, server, seen)
        key = key_of(reference, server)
        display = reference.get("display") or ""
        return [f"{MEDICATION_REFERENCE}{key}{MEDICATION_REFERENCE}{one_line(display).replace('//', '/')}"]


class ReferencedCodes:
    """Codes of references to Medications, each worked out once.

    Args:
        resolver: Which medication a key names.
        known: Codes of each medication, perhaps references again.

    Attributes:
        cut: Codes beyond `MOST_CODES` that were left out.
    """

    def __init__(self, resolver: Resolver, known: Sequence[Sequence[str]]) -> None:
        self._resolver, self._known = resolver, known
        self.cut = 0

    def find(self, text: str) -> list[str] | None:
        """Codes of one reference (`MEDICATION_REFERENCE`, key ...), None where there is no such medication, or it
        refers only to itself.
        """
        medication = self._number(text)
        if medication < 0:
            return None
        codes: dict[str, None] = {}
        seen = {medication}
        waiting = list(reversed(self._known[medication]))
        while waiting:
            code = waiting.pop()
            if not code.startswith(MEDICATION_REFERENCE):
                codes[code] = None
            elif (inner := self._number(code)) >= 0 and inner not in seen:
                seen.add(inner)
                waiting += reversed(self._known[inner])
            if len(codes) > MOST_CODES:
                self.cut += 1
                break
        return list(codes)[:MOST_CODES]

    def _number(self, text: str) -> int:
        _, key, _ = text.split(MEDICATION_REFERENCE, 2)
        return self._resolver.find(key) if key else -1
