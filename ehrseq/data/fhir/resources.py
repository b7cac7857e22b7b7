"""One extractor per FHIR resource type: a parsed resource in, rows of small integers out.

The time of a row (see `ehrseq.data.fhir.rows`) is when its fact was available:

| resource | time of its rows | kind |
|---|---|---|
| Patient | birth: first instant of birthDate (or its birthTime) | `MEDS_BIRTH` |
| Patient | death: last instant of deceasedDateTime | `MEDS_DEATH` |
| Patient | static | `GENDER`, `RACE`, `ETHNICITY` |
| Encounter | period.start | `VISIT_START//<class>` |
| Encounter | period.end | `VISIT_END//<discharge disposition or class>` |
| Condition | recordedDate (never onset) | `DIAGNOSIS` |
| Procedure | end of performed, performedDateTime | `PROCEDURE` |
| Observation | issued, else effective (its end) | `LAB`, `VITAL`, `OBSERVATION` by category |
| MedicationRequest | authoredOn | `MEDICATION` |
| MedicationAdministration | end of effective | `MEDICATION` |
| MedicationDispense | whenHandedOver, else whenPrepared | `MEDICATION` |
| Immunization | recorded, else occurrence | `IMMUNIZATION` |

Where that is absent, the end of the resource's encounter; where that is absent too, the fact is skipped and counted. A
period without end stands for its start. What did not happen is left out and counted: `entered-in-error`, `not-done`,
cancelled encounters and observations, declined dispenses, refuted conditions, `doNotPerform`. Other statuses are kept:
they are often set long after the fact, so filtering by them would look into the future. Doses are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ehrseq.data.fhir.codes import Coder
from ehrseq.data.fhir.elements import (
    MALFORMED,
    US_CORE,
    birth_time,
    describe,
    explain,
    observation_kind,
    omb_categories,
    one_line,
)
from ehrseq.data.fhir.references import NOTHING, identifier_key, key_of, reference_key, resource_keys, server_of
from ehrseq.data.fhir.rows import (
    END_OF_ENCOUNTER,
    MEDICATION_REFERENCE,
    TIME_STATIC,
    TIME_UNKNOWN,
    Row,
    StringTable,
    Times,
    Visit,
)
from ehrseq.data.instants import offset_minutes, parse_birth

_NAN = float("nan")
MAX_FLOAT32 = 3.4028234663852886e38
LEFT_OUT_STATUSES: dict[str, tuple[str, ...]] = {
    "Encounter": ("planned", "cancelled"),
    "Condition": ("refuted",),
    "Procedure": ("not-done", "preparation"),
    "Observation": ("cancelled",),
    "MedicationRequest": ("doNotPerform",),
    "MedicationAdministration": ("not-done",),
    "MedicationDispense": ("cancelled", "declined"),
    "Immunization": ("not-done",),
    "Medication": (),
}
"""Type -> statuses, beside `entered-in-error`, of facts that did not happen."""

_TIME_CACHE_SIZE = 500_000

# Encounter classes as older servers write them.
_OLD_CLASSES = {
    "inpatient": "IMP",
    "outpatient": "AMB",
    "ambulatory": "AMB",
    "emergency": "EMER",
    "home": "HH",
    "virtual": "VR",
    "field": "FLD",
}
_MIMIC_HOSPITAL_STAY = "http://mimic.mit.edu/fhir/mimic/identifier/encounter-hosp"
_GENDERS = {"female": "F", "male": "M", "other": "O", "unknown": "U"}


class Extractor:
    """Collects the rows of many resources.

    Args:
        skip_errors: Count a malformed entry of a Bundle and go on, rather than refuse the Bundle.

    Attributes:
        rows: See `Row`.
        subjects, encounters, codes, texts, units: String tables that the rows point into (subjects and encounters hold
            keys).
        names, updated, sizes: Of each resource: type and id (empty without an id), `meta.lastUpdated` (`TIME_UNKNOWN`
            without it), number of its rows. One that gives no row has one without a code where earlier versions of it
            may give some.
        patients: (keys, id, index of the resource) of each Patient.
        visits: Each Encounter.
        medications: (keys, codes, index of the resource) of each Medication; a code may be `MEDICATION_REFERENCE` +
            key.
        counts: (table of the report, entry) -> number.
        errors: What was wrong with the entries of Bundles that were skipped.
        times: Text of a date or time -> instant; kept from block to block.
    """

    def __init__(self, skip_errors: bool = False) -> None:
        self.skip_errors = skip_errors
        self.coder = Coder()
        self.times = Times()
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
        self.rows: list[Row] = []
        self.subjects, self.encounters, self.codes, self.texts, self.units = (StringTable() for _ in range(5))
        self.names: list[str] = []
        self.updated: list[int] = []
        self.sizes: list[int] = []
        self.patients: list[tuple[list[str], str, int]] = []
        self.visits: list[Visit] = []
        self.medications: list[tuple[list[str], list[str], int]] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.errors: list[str] = []
        self._server = ""
        # Raw references and codings -> index, without working out the key or code again.
        self._seen_subjects: dict[str | None, int] = {}
        self._seen_encounters: dict[str | None, int] = {}
        self._seen_codes: dict[tuple[str, Any, Any], int] = {}
        if len(self.times) > _TIME_CACHE_SIZE:
            self.times.clear()

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
        stated = meta.get("lastUpdated") if isinstance(meta, dict) else None
        try:
            updated = self.times[stated] if isinstance(stated, str) else TIME_UNKNOWN
        except ValueError:
            updated = TIME_UNKNOWN
        return f"{self._server}/{kind}/{name}" if self._server else f"{kind}/{name}", updated

    def _leave_a_trace(self, kind: str, resource: dict[str, Any]) -> None:
        """A row without a code: an earlier version may say what this one takes back."""
        try:
            subject = self.subject_of(resource.get("patient" if kind == "Immunization" else "subject"), resource)
        except MALFORMED:
            return  # nobody's: nothing to take back
        self.rows.append((subject, 0, 0, TIME_STATIC, _NAN, 0, 0))

    # Bundles

    def _bundle(self, bundle: dict[str, Any], _: str | None) -> None:
        if bundle.get("type") == "history":
            raise ValueError(
                "a Bundle of type history holds versions, not a record; expected transaction, batch, collection, "
                "searchset, document or message"
            )
        entries = bundle.get("entry")
        if entries is not None and not isinstance(entries, list):
            raise ValueError(f"Bundle.entry is {type(entries).__name__}; expected a list of objects with a resource")
        for number, entry in enumerate(entries or ()):
            try:
                self._entry(entry)
            except MALFORMED as error:
                resource = entry.get("resource") if isinstance(entry, dict) else entry
                message = f"entry {number} ({describe(resource)}): {explain(error)}"
                if not self.skip_errors:
                    raise ValueError(message) from error
                self.errors.append(message)
                self.counts["skipped", "malformed resource"] += 1
        self._enter_server("")

    def _entry(self, entry: Any) -> None:
        """Read the resource of a Bundle's entry; one without (a search outcome, a deletion) is counted."""
        if not isinstance(entry, dict):
            raise ValueError(f"the entry is {type(entry).__name__}; expected an object with a resource")
        resource, full_url = entry.get("resource"), entry.get("fullUrl")
        if resource is None:
            self.counts["notes", "bundle entries without a resource"] += 1
            return
        if not isinstance(resource, dict):
            raise ValueError(f"its resource is {type(resource).__name__}; expected an object with a resourceType")
        if full_url is not None and not isinstance(full_url, str):
            raise ValueError(f"its fullUrl is {type(full_url).__name__}; expected text")
        self._enter_server(server_of(full_url))
        self.read(resource, full_url)

    def _enter_server(self, server: str) -> None:
        """Relative references mean this server's resources from now on."""
        if server != self._server:
            self._server = server
            self._seen_subjects, self._seen_encounters = {}, {}

    # Patients and encounters

    def _patient(self, patient: dict[str, Any], full_url: str | None) -> None:
        keys = resource_keys(patient, full_url)
        subject = self.subjects[keys[0]]
        rows: list[tuple[str, int]] = []
        gender = patient.get("gender")
        if gender:
            rows.append((f"GENDER//{_GENDERS.get(gender, gender)}", TIME_STATIC))
        for extension in patient.get("extension") or ():
            url = extension.get("url", "")
            if url in (US_CORE + "race", US_CORE + "ethnicity"):
                name = "RACE" if url.endswith("race") else "ETHNICITY"
                rows += [(f"{name}//{category}", TIME_STATIC) for category in omb_categories(extension)]
        birth = patient.get("birthDate")
        if birth:
            rows.append(("MEDS_BIRTH", parse_birth(birth_time(patient) or birth)))
        else:
            self.counts["notes", "patients without a birth date"] += 1
        died = patient.get("deceasedDateTime")
        if died:
            rows.append(("MEDS_DEATH", self.times[died]))
        elif patient.get("deceasedBoolean"):
            self.counts["skipped", "Patient: death without a time"] += 1
        self.patients.append((keys, patient.get("id") or keys[0], len(self.names)))
        self.rows += [(subject, 0, self.codes[code], time, _NAN, 0, 0) for code, time in rows]

    def _encounter(self, encounter: dict[str, Any], full_url: str | None) -> None:
        if self._did_not_happen("Encounter", encounter.get("status")):
            return
        keys = resource_keys(encounter, full_url)
        period = encounter.get("period") or {}
        start, end = period.get("start"), period.get("end")
        started = self.times[start] if start else TIME_UNKNOWN
        ended = self.times[end] if end else TIME_UNKNOWN
        subject = self.subject_of(encounter.get("subject"), encounter)
        number = self.encounters[keys[0]]
        part_of = key_of(encounter.get("partOf"), self._server)
        encounter_class = self._encounter_class(encounter)
        disposition = (encounter.get("hospitalization") or {}).get("dischargeDisposition") or {}
        coding = (disposition.get("coding") or [{}])[0]
        left_as = one_line(coding.get("code") or coding.get("display") or disposition.get("text") or encounter_class)

        offset = offset_minutes(start or end or "")
        self.visits.append(
            Visit(keys, encounter.get("id") or keys[0], subject, started, ended, offset, part_of, len(self.names))
        )
        if started == TIME_UNKNOWN:
            self.counts["skipped", "Encounter: no start of its period"] += 1
            return
        self.rows.append((subject, number, self.codes[f"VISIT_START//{encounter_class}"], started, _NAN, 0, 0))
        if ended == TIME_UNKNOWN:
            self.counts["notes", "encounters without an end"] += 1
            return
        if ended < started:
            self.counts["notes", "encounters that end before they start"] += 1
        self.rows.append((subject, number, self.codes[f"VISIT_END//{left_as}"], ended, _NAN, 0, 0))

    def _encounter_class(self, encounter: dict[str, Any]) -> str:
        """v3-ActCode class; MIMIC's hospital stays are admissions, whatever class they carry (it says how the patient
        came).
        """
        for identifier in encounter.get("identifier") or ():
            if identifier.get("system") == _MIMIC_HOSPITAL_STAY:
                self.counts["notes", "MIMIC hospital stays read as class IMP"] += 1
                return "IMP"
        coding = encounter.get("class")
        if isinstance(coding, list):  # FHIR R5
            coding = ((coding[0].get("coding") or [{}])[0]) if coding else None
        name = coding.get("code") if isinstance(coding, dict) else coding
        if not name:
            self.counts["notes", "encounters without a class, read as AMB"] += 1
            return "AMB"
        return _OLD_CLASSES.get(name, one_line(name))

    # Clinical resources

    def _condition(self, condition: dict[str, Any], _: str | None) -> None:
        verification = condition.get("verificationStatus")
        if verification:
            status = (verification.get("coding") or [{}])[0].get("code") or verification.get("text")
            if self._did_not_happen("Condition", status):
                return
        code = self._code("DIAGNOSIS", condition.get("code"), "Condition")
        if code:
            recorded = condition.get("recordedDate")
            time = self.times[recorded] if recorded else END_OF_ENCOUNTER["Condition"]
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
                self._when(procedure, "performed", END_OF_ENCOUNTER["Procedure"]),
            )

    def _immunization(self, immunization: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("Immunization", immunization.get("status")):
            return
        code = self._code("IMMUNIZATION", immunization.get("vaccineCode"), "Immunization")
        if code:
            recorded = immunization.get("recorded")
            time = (
                self.times[recorded]
                if recorded
                else self._when(immunization, "occurrence", END_OF_ENCOUNTER["Immunization"])
            )
            self._add(immunization, "patient", "encounter", code, time)

    def _observation(self, observation: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("Observation", observation.get("status")):
            return
        get = observation.get
        concept = get("code")
        kind = observation_kind(get("category"), concept)
        issued = get("issued")
        time = self.times[issued] if issued else self._when(observation, "effective", END_OF_ENCOUNTER["Observation"])
        subject = self.subject_of(get("subject"), observation)
        encounter = self.encounter_of(get("encounter"))
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
        if self._did_not_happen(
            "MedicationRequest",
            "doNotPerform" if request.get("doNotPerform") is True else request.get("status"),
        ):
            return
        authored = request.get("authoredOn")
        self._add_medication(
            request, "encounter", self.times[authored] if authored else END_OF_ENCOUNTER["MedicationRequest"]
        )

    def _medication_administration(self, administration: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("MedicationAdministration", administration.get("status")):
            return
        self._add_medication(
            administration,
            "context",
            self._when(administration, "effective", END_OF_ENCOUNTER["MedicationAdministration"]),
        )

    def _medication_dispense(self, dispense: dict[str, Any], _: str | None) -> None:
        if self._did_not_happen("MedicationDispense", dispense.get("status")):
            return
        when = dispense.get("whenHandedOver") or dispense.get("whenPrepared")
        self._add_medication(dispense, "context", self.times[when] if when else END_OF_ENCOUNTER["MedicationDispense"])

    def _medication(self, medication: dict[str, Any], full_url: str | None) -> None:
        if self._did_not_happen("Medication", medication.get("status")):
            return
        codes = self._medication_codes(medication, medication)
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

    def _medication_codes(self, medication: dict[str, Any], holder: dict[str, Any]) -> list[str]:
        """Codes of a Medication (or Substance): its own, else those of its ingredients."""
        concept = medication.get("code")
        code = self.coder.code("MEDICATION", concept) if concept else None
        if code:
            return [code]
        codes: list[str] = []
        for ingredient in medication.get("ingredient") or ():
            item = ingredient.get("itemCodeableConcept")
            if item:
                code = self.coder.code("MEDICATION", item)
                codes += [code] if code else []
            elif ingredient.get("itemReference"):
                codes += self.referenced_codes(ingredient["itemReference"], holder)
        return codes

    def referenced_codes(self, reference: dict[str, Any], holder: dict[str, Any]) -> list[str]:
        """Codes of the Medication that a Reference of `holder` names; still a key where it is not contained."""
        literal = reference.get("reference") or ""
        if literal.startswith("#"):
            for contained in holder.get("contained") or ():
                if contained.get("id") == literal[1:]:
                    return self._medication_codes(contained, holder) if contained is not holder else []
        key = key_of(reference, self._server)
        display = reference.get("display") or ""
        return [f"{MEDICATION_REFERENCE}{key}{MEDICATION_REFERENCE}{one_line(display).replace('//', '/')}"]

    # Parts

    def _did_not_happen(self, resource_type: str, status: Any) -> bool:
        if status == "entered-in-error":
            self.counts["entered_in_error", resource_type] += 1
            return True
        if status in LEFT_OUT_STATUSES[resource_type]:
            self.counts["skipped", f"{resource_type}: {status}"] += 1
            return True
        return False

    def _add(self, resource: dict[str, Any], subject_field: str, encounter_field: str, code: int, time: int) -> None:
        subject = self.subject_of(resource.get(subject_field), resource)
        self.rows.append((subject, self.encounter_of(resource.get(encounter_field)), code, time, _NAN, 0, 0))

    def _when(self, resource: dict[str, Any], field: str, otherwise: int) -> int:
        """Time of a choice element: its DateTime, the end of its Period (else the start), its Instant."""
        text = resource.get(field + "DateTime")
        if not text:
            period = resource.get(field + "Period")
            if period:
                text = period.get("end") or period.get("start")
            elif field == "effective":
                text = resource.get("effectiveInstant")
        return self.times[text] if text else otherwise

    def subject_of(self, holder: dict[str, Any] | None, resource: dict[str, Any]) -> int:
        """Index of the subject that a Reference of a resource names, 0 where there is none."""
        if holder is None:
            return 0
        raw = holder.get("reference")
        number = self._seen_subjects.get(raw)
        if number is None:
            key = (
                self._contained_key(raw, resource)
                if isinstance(raw, str) and raw.startswith("#")
                else key_of(holder, self._server)
            )
            number = self.subjects[key]
            if raw and not raw.startswith("#"):
                self._seen_subjects[raw] = number
        return number

    def _contained_key(self, raw: str, resource: dict[str, Any]) -> str:
        """A contained patient is known to others by its identifier only."""
        for contained in resource.get("contained") or ():
            if contained.get("id") == raw[1:]:
                for identifier in contained.get("identifier") or ():
                    if key := identifier_key(identifier):
                        return key
        return NOTHING

    def encounter_of(self, holder: dict[str, Any] | None) -> int:
        """Index of the encounter that a Reference names, 0 where there is none."""
        if holder is None:
            return 0
        raw = holder.get("reference")
        number = self._seen_encounters.get(raw)
        if number is None:
            key = key_of(holder, self._server)
            # MedicationAdministration.context may also be an EpisodeOfCare, which is no visit.
            number = self.encounters[NOTHING if "EpisodeOfCare/" in key else key]
            if raw:
                self._seen_encounters[raw] = number
        return number

    def _code(self, kind: str, concept: dict[str, Any] | None, resource_type: str) -> int:
        """Index of a concept's code, 0 where it has none (counted)."""
        number = self.find_code(kind, concept)
        if not number:
            self.counts["skipped", f"{resource_type}: no code"] += 1
        return number

    def find_code(self, kind: str, concept: dict[str, Any] | None) -> int:
        """Index of a concept's code, 0 where it has none."""
        if concept is None:
            return 0
        codings = concept.get("coding")
        if codings and len(codings) == 1:
            coding = codings[0]
            key = (kind, coding.get("system"), coding.get("code"))
            number = self._seen_codes.get(key)
            if number is not None:
                return number
            code = self.coder.coding(kind, coding)
            if code is not None:
                number = self._seen_codes[key] = self.codes[code]
                return number
        code = self.coder.code(kind, concept)
        return 0 if code is None else self.codes[code]

    def value_of(self, holder: dict[str, Any]) -> tuple[float, int, int, bool]:
        """(number, text index, unit index, whether there is a value) of an Observation or component."""
        quantity = holder.get("valueQuantity")
        if quantity is not None:
            value = quantity.get("value")
            if value is None:
                return _NAN, 0, 0, False
            if "comparator" in quantity:
                self.counts["notes", "values with a comparator (<, >), read as the number"] += 1
            return self._number(value), 0, self.units[quantity.get("unit") or quantity.get("code") or ""], True
        concept = holder.get("valueCodeableConcept")
        if concept is not None:
            coding = (concept.get("coding") or [{}])[0]
            text = coding.get("display") or concept.get("text") or coding.get("code")
            return (_NAN, self.texts[one_line(text)], 0, True) if text else (_NAN, 0, 0, False)
        text = holder.get("valueString")
        if text is not None:
            text = one_line(text)
            return _NAN, self.texts[text], 0, bool(text)
        if "valueInteger" in holder:
            return self._number(holder["valueInteger"]), 0, 0, True
        if "valueBoolean" in holder:
            return _NAN, self.texts["true" if holder["valueBoolean"] else "false"], 0, True
        for name in holder:
            if name.startswith("value"):
                # The row stays (something was observed), its value is of a kind that a table cannot hold.
                self.counts["notes", f"values not read: {name}"] += 1
                return _NAN, 0, 0, True
        return _NAN, 0, 0, False

    def _number(self, value: Any) -> float:
        if isinstance(value, str):
            value = float(value)  # some servers quote decimals
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"a value must be a number, got {value!r}")
        if not -MAX_FLOAT32 <= value <= MAX_FLOAT32:
            self.counts["notes", "values that are NaN or beyond float32, read as missing"] += 1
            return _NAN
        return value
