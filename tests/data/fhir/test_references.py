"""References of every form, by FHIR's own rules (R4, 2.3.0 and 2.36.4)."""

import pytest

from ehrseq.data.fhir.references import Resolver, key_of, reference_key, resource_keys, server_of

SERVER = "http://example.org/fhir"


@pytest.mark.parametrize(
    ("reference", "server", "key"),
    [
        ("Patient/23", "", "23"),
        ("Patient/23/_history/2", "", "23"),
        ("Patient/23", SERVER, f"{SERVER}/Patient/23"),
        (f"{SERVER}/Patient/23", "", f"{SERVER}/Patient/23"),
        (f"{SERVER}/Patient/23/_history/1", "", f"{SERVER}/Patient/23"),
        ("urn:uuid:04121321-4af5", SERVER, "04121321-4af5"),
        ("urn:oid:1.2.3", "", "urn:oid:1.2.3"),
        ("Patient?identifier=http://ids|7", "", "|http://ids|7"),
        ("Group/5", "", "Group/5"),
        ("#p", "", ""),
    ],
)
def test_key_of_a_reference(reference, server, key):
    assert reference_key(reference, server) == key


@pytest.mark.parametrize(
    ("holder", "key"),
    [
        (None, ""),
        ({"display": "Jane Doe"}, ""),
        ({"identifier": {"system": "http://ids", "value": "7"}}, "|http://ids|7"),
        ({"identifier": {"value": "7"}}, ""),
        ({"reference": "Patient/1", "identifier": {"system": "s", "value": "7"}}, "1"),
    ],
)
def test_key_of_a_reference_element(holder, key):
    assert key_of(holder) == key


@pytest.mark.parametrize(
    ("full_url", "server"),
    [
        (f"{SERVER}/Patient/23", SERVER),
        (f"{SERVER}/Patient/23/_history/4", SERVER),
        ("urn:uuid:1", ""),
        (None, ""),
        ("http://example.org/page", ""),
    ],
)
def test_server_of_an_entry(full_url, server):
    assert server_of(full_url) == server


def test_a_resource_is_known_by_id_full_url_and_identifiers():
    patient = {"resourceType": "Patient", "id": "a", "identifier": [{"system": "s", "value": "7"}, {"value": "8"}]}
    assert resource_keys(patient, None) == ["a", "|s|7"]
    assert resource_keys(patient, "urn:uuid:u") == ["a", "u", "|s|7"]
    assert resource_keys(patient, f"{SERVER}/Patient/a") == [f"{SERVER}/Patient/a", "|s|7"]
    with pytest.raises(ValueError, match="no id"):
        resource_keys({"resourceType": "Patient"}, None)


def test_resolving_follows_the_server():
    resolver = Resolver(
        "Patient",
        [[f"{SERVER}/Patient/23", "|ids|1"], ["24"], ["http://b/fhir/Patient/30"], ["http://c/fhir/Patient/30"]],
    )
    assert resolver.find(f"{SERVER}/Patient/23") == 0
    assert resolver.find("23") == 0  # a bare id, where only one server has it
    assert resolver.find("http://other/fhir/Patient/23") == -1  # another server's patient 23
    assert resolver.find("http://any/fhir/Patient/24") == 1  # NDJSON patients carry no server
    assert resolver.find("http://any/fhir/Group/24") == -1
    assert resolver.find("30") == -1  # ambiguous
    assert resolver.find("|ids|1") == 0
    assert resolver.find("99") == -1


def test_an_identifier_of_two_patients_names_nobody():
    resolver = Resolver("Patient", [["a", "|ids|1"], ["b", "|ids|1"]])
    assert resolver.find("|ids|1") == -1
    assert (resolver.find("a"), resolver.find("b")) == (0, 1)
