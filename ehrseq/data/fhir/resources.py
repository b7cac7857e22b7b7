"""One extractor per FHIR resource type: a parsed resource in, rows of small integers out.

The time of a row (see `ehrseq.data.fhir.rows`) is when its fact was available:

| resource | time of its rows | kind |
|---|---|---|
| Patient | birth: first instant of birthDate (or its birthTime) | `MEDS_BIRTH` |
| Patient | death: last instant of deceasedDateTime, none where it is not known (`patients`) | `MEDS_DEATH` |
| Patient | static | `GENDER`, `RACE`, `ETHNICITY` |
| Encounter | first instant of period.start | `VISIT_START//<class>` (`classes`) |
| Encounter | last instant of period.end, none where it is not known (`periods`) | `VISIT_END//<disposition or class>` |
| Condition | recordedDate (never onset) | `DIAGNOSIS` |
| Procedure | end of performed, performedDateTime | `PROCEDURE` |
| Observation | issued, else effective (its end) | `LAB`, `VITAL`, `OBSERVATION` by category |
| MedicationRequest | authoredOn | `MEDICATION` |
| MedicationAdministration | end of effective | `MEDICATION` |
| MedicationDispense | whenHandedOver, else whenPrepared | `MEDICATION` |
| Immunization | recorded, else occurrence | `IMMUNIZATION` |

Where that is absent, the end of the resource's encounter; where that is absent too, the fact is skipped and counted. A
period without end stands for its start. What did not happen is left out and counted: `entered-in-error`, `not-done`,
cancelled encounters and observations, declined dispenses, refuted conditions, `doNotPerform`, requests that are no
orders, what a modifier extension changes in a way that we do not know, findings that are known to be absent. Other
statuses are kept: they are often set long after the fact, so that filtering by them looks ahead. Doses are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ehrseq.data.fhir.classes import ClassReader
from ehrseq.data.fhir.concepts import modifier_of
from ehrseq.data.fhir.dispositions import DispositionReader
from ehrseq.data.fhir.elements import MALFORMED, describe, read_flag, what_is_wrong
from ehrseq.data.fhir.lookups import LEFT_OUT_STATUSES, NAN, Lookups, stated_times
from ehrseq.data.fhir.medications import MedicationReader, is_no_order
from ehrseq.data.fhir.patients import links_of, patient_facts
from ehrseq.data.fhir.periods import ONGOING, OVER, STILL_THERE, plain_status, span_of
from ehrseq.data.fhir.references import (
    deleted_names,
    key_of,
    reference_key,
    resource_keys,
    server_of,
)
from ehrseq.data.fhir.rows import TIME_STATIC, TIME_UNKNOWN, Row, Visit, trace_of
from ehrseq.data.instants import zone_of
from ehrseq.data.metadata import NO_SETTINGS, DatasetSettings

_DEEPEST_BUNDLE = 16
"""Bundles inside Bundles."""


class Extractor(Lookups):
    """Collects the rows of many resources.

    Args:
        skip_errors: Count a malformed entry of a Bundle and go on, rather than refuse the Bundle.
        settings: What the user says about the source.

    Attributes:
        rows: See `Row`.
        names, updated, sizes: Of each resource: type and id (empty without an id), `meta.lastUpdated` (`TIME_UNKNOWN`
            without it), number of its rows. One that gives no row has one without a code where earlier versions of it
            may give some.
        patients: (keys, id, links, index of the resource) of each Patient.
        visits: Each Encounter.
        medications: (keys, codes, index of the resource) of each Medication; a code may be `MEDICATION_REFERENCE` +
            key.
        deleted: (name as in `names`, when) of each resource that a Bundle deletes.
        errors: What was wrong with the entries of Bundles that were skipped.
    """

    def __init__(self, skip_errors: bool = False, settings: DatasetSettings = NO_SETTINGS) -> None:
        self.skip_errors = skip_errors
        super().__init__()
        self._zone = None if settings.timezone is None else zone_of(settings.timezone)
        self._classes = ClassReader(settings.encounter_classes)
        self._medicines = MedicationReader(self.coder, lambda: self.counts)
        self._dispositions = DispositionReader()
        self._depth = 0
        self._readers: dict[str, Callable[[dict[str, Any], str | None], None]] = {
            "Patient": self._patient,
            "Encounter": self._encounter,
            "Condition": self._condition,
            "Procedure": self._procedure,
            "Observation": self._observation,
            "MedicationRequest": self._medication_request,
            "MedicationAdministration": self._medication_administration,
            "MedicationDispense": self._medication_dispense,
            "Immunization": self._immunization,
            "Medication": self._medication,
            "Bundle": self._bundle,
        }
        self.clear()

    def clear(self) -> None:
        """Start a new block: empty tables and rows; what was worked out about codes and times stays."""
        super().clear()
        self.rows: list[Row] = []
        self.names: list[str] = []
        self.updated: list[int] = []
        self.sizes: list[int] = []
        self.patients: list[tuple[list[str], str, list[str], int]] = []
        self.visits: list[Visit] = []
        self.medications: list[tuple[list[str], list[str], int]] = []
        self.deleted: list[tuple[str, int]] = []
        self.errors: list[str] = []

    def read(self, resource: dict[str, Any], full_url: str | None = None) -> None:
        """Add one resource.

        Args:
            resource: Parsed JSON of a FHIR R4 resource.
            full_url: `fullUrl` of its Bundle entry.

        Raises:
            ValueError: It is malformed (or another of `MALFORMED`); rows added before stay whole.
        """
        kind = resource["resourceType"]
        reader = self._readers.get(kind)
        if reader is None:
            self.counts["resources_not_used", kind] += 1
            return
        if kind == "Bundle":
            reader(resource, full_url)
            self.counts["resources_read", kind] += 1
            return
        name, updated = self._version(kind, resource, full_url)
        before = len(self.rows)
        if "modifierExtension" in resource and (url := modifier_of(resource)) is not None:
            self.counts["skipped", f"{kind}: modifier extension not understood ({url})"] += 1
        else:
            reader(resource, full_url)
        self.counts["resources_read", kind] += 1
        if name and len(self.rows) == before and kind in LEFT_OUT_STATUSES and kind != "Medication":
            self._leave_a_trace(kind, resource)
        self.names.append(name)
        self.updated.append(updated)
        self.sizes.append(len(self.rows) - before)

    def _version(self, kind: str, resource: dict[str, Any], full_url: str | None) -> tuple[str, int]:
        """What a resource and its other versions have in common, and when this one was written."""
        name = resource.get("id") or (reference_key(full_url) if full_url else "")
        if not name or not isinstance(name, str):
            return "", TIME_UNKNOWN
        meta = resource.get("meta")
        updated = self._written(meta) if isinstance(meta, dict) and "lastUpdated" in meta else TIME_UNKNOWN
        return f"{self._server}/{kind}/{name}" if self._server else f"{kind}/{name}", updated

    def _written(self, meta: Any) -> int:
        """When a resource was written, `TIME_UNKNOWN` where it does not say."""
        stated = meta.get("lastUpdated") if isinstance(meta, dict) else None
        try:
            return self.times[stated] if isinstance(stated, str) else TIME_UNKNOWN
        except ValueError:
            return TIME_UNKNOWN

    def _leave_a_trace(self, kind: str, resource: dict[str, Any]) -> None:
        """Add a row without a code (see `trace_of`)."""
        try:
            subject = self.subject_of(resource.get("patient" if kind == "Immunization" else "subject"), resource)
        except MALFORMED:
            return  # nobody's: nothing to take back
        self.rows.append(trace_of(subject))

    # Bundles

    def _bundle(self, bundle: dict[str, Any], _: str | None) -> None:
        if bundle.get("type") == "history":
            raise ValueError(
                "a Bundle of type history holds versions, not a record; expected transaction, batch, collection, "
                "searchset, document or message"
            )
        if self._depth >= _DEEPEST_BUNDLE:
            raise ValueError(f"Bundles lie inside Bundles, deeper than {_DEEPEST_BUNDLE} levels; give the innermost")
        entries = bundle.get("entry")
        if entries is not None and not isinstance(entries, list):
            raise ValueError(f"Bundle.entry is {type(entries).__name__}; expected a list of objects with a resource")
        self._depth += 1
        try:
            for number, entry in enumerate(entries or ()):
                try:
                    self._entry(entry, bundle)
                except MALFORMED as error:
                    resource = entry.get("resource") if isinstance(entry, dict) else entry
                    message = f"entry {number} ({describe(resource)}): {what_is_wrong(error)}"
                    if not self.skip_errors:
                        raise ValueError(message) from error
                    self.errors.append(message)
                    self.counts["skipped", "malformed resource"] += 1
        finally:
            self._depth -= 1
        if self._server:
            self._enter_server("")

    def _entry(self, entry: Any, bundle: dict[str, Any]) -> None:
        """Read the resource of a Bundle's entry, or what it deletes; one without both (a search outcome) is counted."""
        if not isinstance(entry, dict):
            raise ValueError(f"the entry is {type(entry).__name__}; expected an object with a resource")
        resource, full_url = entry.get("resource"), entry.get("fullUrl")
        if resource is None:
            names = deleted_names(entry)
            if names:
                self.counts["notes", "resources that the source deletes"] += 1
                self.deleted += [(name, self._written(bundle.get("meta"))) for name in names]
            else:
                self.counts["notes", "bundle entries without a resource"] += 1
            return
        if not isinstance(resource, dict):
            raise ValueError(f"its resource is {type(resource).__name__}; expected an object with a resourceType")
        if full_url is not None and not isinstance(full_url, str):
            raise ValueError(f"its fullUrl is {type(full_url).__name__}; expected text")
        if (server := server_of(full_url)) != self._server:
            self._enter_server(server)
        self.read(resource, full_url)

    # Patients and encounters

    def _patient(self, patient: dict[str, Any], full_url: str | None) -> None:
        keys = resource_keys(patient, full_url)
        facts, links = patient_facts(patient, self.times, self.counts), links_of(patient, self._server)
        subject = self.subjects[keys[0]]
        self.patients.append((keys, patient.get("id") or keys[0], links, len(self.names)))
        rows = [(subject, 0, self.codes[code], time, NAN, self.texts[text], 0) for code, time, text in facts]
        self.rows += rows or [trace_of(subject)]  # that takes back what an earlier version said

    def _encounter(self, encounter: dict[str, Any], full_url: str | None) -> None:
        status = plain_status(encounter.get("status"))
        if self._did_not_happen("Encounter", status):
            return
        keys = resource_keys(encounter, full_url)
        period = encounter.get("period") or encounter.get("actualPeriod")  # R5
        start, end, offset = span_of(period, self.times, self._starts, self._zone, self.counts)
        subject = self.subject_of(encounter.get("subject") or encounter.get("patient"), encounter)
        number = self.encounters[keys[0]]
        part_of = key_of(encounter.get("partOf"), self._server)
        encounter_class = self._classes.read(encounter, self.counts)
        left_as, died = self._dispositions.read(encounter, encounter_class, self.counts)
        visit = Visit(keys, encounter.get("id") or keys[0], subject, start, end, offset, part_of, len(self.names))
        self.visits.append(visit)
        facts: list[tuple[str, int]] = []
        if start == TIME_UNKNOWN:
            self.counts["skipped", "Encounter: no start of its period"] += 1
            if died:
                facts.append(("MEDS_DEATH", end if end != TIME_UNKNOWN else TIME_STATIC))
        else:
            facts.append((f"VISIT_START//{encounter_class}", start))
            if end != TIME_UNKNOWN:
                facts.append((f"VISIT_END//{left_as}", end))
            else:
                self.counts["notes", "encounters without an end"] += 1
                # Without a time these rows tell what became of the stay, and nothing of when.
                if died or status in OVER:
                    facts.append((f"VISIT_END//{left_as}", TIME_STATIC))
                elif status in ONGOING:
                    facts.append((f"VISIT_END//{STILL_THERE}", TIME_STATIC))
                if died:
                    facts.append(("MEDS_DEATH", TIME_STATIC))
        for code, time in facts:
            self.rows.append((subject, number, self.codes[code], time, NAN, 0, 0))

    # Clinical resources

    def _condition(self, condition: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("Condition", self._verification(condition.get("verificationStatus"))):
            return
        code = self._code("DIAGNOSIS", condition.get("code"), "Condition")
        if code:
            time = self._at("Condition", condition.get("recordedDate"))
            self._add(condition, "subject", "encounter", code, time)

    def _procedure(self, procedure: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("Procedure", procedure.get("status")):
            return
        code = self._code("PROCEDURE", procedure.get("code"), "Procedure")
        if code:
            self._add(
                procedure,
                "subject",
                "encounter",
                code,
                self._at("Procedure", *stated_times(procedure, "performed")),
            )

    def _immunization(self, immunization: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("Immunization", immunization.get("status")):
            return
        code = self._code("IMMUNIZATION", immunization.get("vaccineCode"), "Immunization")
        if code:
            time = self._at_stated("Immunization", immunization.get("recorded"), immunization, "occurrence")
            self._add(immunization, "patient", "encounter", code, time)

    def _observation(self, observation: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("Observation", observation.get("status")):
            return
        get = observation.get
        time = self._at_stated("Observation", get("issued"), observation, "effective")
        subject = self.subject_of(get("subject"), observation)
        self.add_observed(observation, subject, self.encounter_of(get("encounter")), time)

    def add_observed(self, observation: dict[str, Any], subject: int, encounter: int, time: int) -> None:
        """Add the rows of an Observation, of its value and of its components.

        Args:
            observation: The resource.
            subject, encounter: Indices of what it refers to.
            time: When it was available.
        """
        get = observation.get
        concept = get("code")
        kind = self._kind_of(get("category"), concept)
        # A panel without a value of its own is only its components.
        components = get("component") or ()
        value, text, unit, has_value = self.value_of(observation)
        rows: list[Row] = []
        if has_value or not components:
            if not has_value and get("dataAbsentReason"):
                self.counts["skipped", "Observation: value absent (dataAbsentReason)"] += 1
            else:
                code = self._code(kind, concept, "Observation")
                if code:
                    rows.append((subject, encounter, code, time, value, text, unit))
        for component in components:
            if "modifierExtension" in component and (url := modifier_of(component)) is not None:
                self.counts["skipped", f"Observation.component: modifier extension not understood ({url})"] += 1
                continue
            value, text, unit, has_value = self.value_of(component)
            if not has_value:
                self.counts["skipped", "Observation: component without a value"] += 1
                continue
            code = self._code(kind, component.get("code"), "Observation")
            if code:
                rows.append((subject, encounter, code, time, value, text, unit))
        self.rows += rows

    # Medications

    def _medication_request(self, request: dict[str, Any], _: str | None) -> None:
        forbidden = "doNotPerform" in request and read_flag(request["doNotPerform"], "doNotPerform")
        if self._did_not_happen("MedicationRequest", "doNotPerform" if forbidden else request.get("status")):
            return
        intent = request.get("intent")
        if is_no_order(intent):
            self.counts["skipped", f"MedicationRequest: intent {intent}"] += 1
            return
        time = self._at("MedicationRequest", request.get("authoredOn"))
        self._add_medication(request, "encounter", time)

    def _medication_administration(self, administration: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("MedicationAdministration", administration.get("status")):
            return
        self._add_medication(
            administration,
            "context",
            self._at("MedicationAdministration", *stated_times(administration, "effective")),
        )

    def _medication_dispense(self, dispense: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("MedicationDispense", dispense.get("status")):
            return
        time = self._at("MedicationDispense", dispense.get("whenHandedOver"), dispense.get("whenPrepared"))
        self._add_medication(dispense, "context", time)

    def _medication(self, medication: dict[str, Any], full_url: str | None) -> None:
        if self._did_not_happen("Medication", medication.get("status")):
            return
        codes = self._medicines.codes(medication, self._server)
        self.medications.append((resource_keys(medication, full_url), codes, len(self.names)))

    def _add_medication(self, resource: dict[str, Any], encounter_field: str, time: int) -> None:
        concept = resource.get("medicationCodeableConcept")
        if concept is not None:
            code = self._code("MEDICATION", concept, resource["resourceType"])
            if code:
                self._add(resource, "subject", encounter_field, code, time)
            return
        reference = resource.get("medicationReference")
        if reference is None:
            self.counts["skipped", f"{resource['resourceType']}: no medication"] += 1
            return
        for code_text in self.referenced_codes(reference, resource):
            self._add(resource, "subject", encounter_field, self.codes[code_text], time)

    def _add(self, resource: dict[str, Any], subject_field: str, encounter_field: str, code: int, time: int) -> None:
        subject = self.subject_of(resource.get(subject_field), resource)
        self.rows.append((subject, self.encounter_of(resource.get(encounter_field)), code, time, NAN, 0, 0))

    def referenced_codes(self, reference: dict[str, Any], holder: dict[str, Any]) -> list[str]:
        """Codes of the Medication that a Reference of `holder` names; still a key where it is not contained."""
        return self._medicines.referenced(reference, holder, self._server)
