"""FHIR references as keys, and keys as the resources they name.

A key is one string per referenced thing: the bare id for `Patient/x` and `urn:uuid:x`, the whole URL (without version)
for an absolute reference and for a relative one inside an entry whose fullUrl tells its server, `|system|value` for an
identifier (a logical reference, or a conditional one: `Patient?identifier=system|value`). Two servers may both have a
patient 23: an absolute key only meets a bare id where the resource came without a server (NDJSON), a bare key only
meets an absolute one where no other server has that id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NOTHING = ""
"""Key of a reference that names nothing (only a display text, or a contained resource that was not given)."""


def reference_key(reference: str, server: str = "") -> str:
    """Key of a literal reference.

    Args:
        reference: `Patient/x`, `urn:uuid:x`, `https://server/fhir/Patient/x`, each perhaps with `/_history/n`;
            `Patient?identifier=s|v`.
        server: Base URL of the resource that holds the reference, empty where it has none.
    """
    reference = reference.strip()
    if reference.startswith(("urn:uuid:", "urn:oid:")):
        return reference.partition("urn:uuid:")[2] or reference
    if reference.startswith("#"):
        return NOTHING
    if "?" in reference:
        query = reference.partition("?")[2]
        return f"|{query[len('identifier=') :]}" if query.startswith("identifier=") else reference
    reference = reference.partition("/_history/")[0].rstrip("/")
    if "://" in reference:
        return reference
    kind, slash, name = reference.rpartition("/")
    if server and slash:
        return f"{server}/{reference}"
    return name if kind in ("", "Patient", "Encounter", "Medication") else reference


def key_of(holder: dict[str, Any] | None, server: str = "") -> str:
    """Key of a Reference element; `NOTHING` where it is absent or only a display text.

    Raises:
        TypeError: The element is not an object with a string inside.
    """
    if holder is None:
        return NOTHING
    reference = holder.get("reference")
    if reference:
        if not isinstance(reference, str):
            raise TypeError(f"a reference must be a string, got {reference!r}")
        return reference_key(reference, server)
    return identifier_key(holder.get("identifier")) if "identifier" in holder else NOTHING


def identifier_key(identifier: object) -> str:
    """Key of an Identifier; `NOTHING` where it has no system or value: a value alone identifies nobody."""
    if not isinstance(identifier, dict) or not identifier.get("system") or not identifier.get("value"):
        return NOTHING
    return f"|{identifier['system']}|{identifier['value']}"


def server_of(full_url: str | None) -> str:
    """Base URL of an entry's fullUrl (`https://server/fhir` of `https://server/fhir/Patient/x`), empty for others."""
    if not full_url or "://" not in full_url:
        return ""
    parts = full_url.partition("/_history/")[0].rstrip("/").rsplit("/", 2)
    return parts[0] if len(parts) == 3 and parts[1][:1].isupper() else ""


def resource_keys(resource: dict[str, Any], full_url: str | None) -> list[str]:
    """Keys under which others may name a resource, its id first.

    Raises:
        ValueError: It has neither an id nor a fullUrl.
    """
    name = resource.get("id")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"an id must be a string, got {name!r}")
    if full_url:
        server, url_key = server_of(full_url), reference_key(full_url)
        keys = [f"{server}/{resource['resourceType']}/{name or bare_id(url_key)}"] if server else [name or "", url_key]
        keys = [key for key in dict.fromkeys(keys) if key]
    else:
        keys = [name] if name else []
    if not keys:
        raise ValueError("it has no id (and no fullUrl), so nothing can refer to it")
    identifiers = resource.get("identifier")
    if not isinstance(identifiers, list):
        return keys
    keys += map(identifier_key, identifiers)
    return [key for key in dict.fromkeys(keys) if key]


def deleted_names(entry: dict[str, Any]) -> list[str]:
    """Type and id (`Observation/o9`) of what an entry of a Bundle deletes, with its server and without.

    A Bulk Data export tells deletions so: `{"request": {"method": "DELETE", "url": "Observation/o9"}}`. Empty where it
    deletes nothing, or what a search would find.
    """
    request = entry.get("request")
    if not isinstance(request, dict) or request.get("method") != "DELETE":
        return []
    names: list[str] = []
    for url in (request.get("url"), entry.get("fullUrl")):
        if isinstance(url, str) and url and "?" not in url and not url.startswith("urn:"):
            parts = url.partition("/_history/")[0].rstrip("/").rsplit("/", 2)
            if len(parts) >= 2 and parts[-2][:1].isupper():
                names += ["/".join(parts[-2:]), "/".join(parts)]
    return list(dict.fromkeys(names))


def bare_id(key: str) -> str:
    """Id in a key: `x` of `https://server/fhir/Patient/x` and of `x`."""
    return key.rsplit("/", 1)[-1] if "://" in key else key


class Resolver:
    """Which of some resources of one type a key names.

    Args:
        resource_type: `Patient`, `Encounter` or `Medication`.
        keys: For each resource the keys that name it (`resource_keys`).
    """

    def __init__(self, resource_type: str, keys: Sequence[Iterable[str]]) -> None:
        self._suffix = f"/{resource_type}/"
        self._exact: dict[str, int] = {}
        by_id: dict[str, set[int]] = {}
        for number, names in enumerate(keys):
            for key in names:
                # Two resources that share an identifier make it useless; two that share an id are one, repeated.
                clash = key.startswith("|") and self._exact.get(key, number) != number
                self._exact[key] = -1 if clash else self._exact.get(key, number)
                if "://" in key:
                    by_id.setdefault(bare_id(key), set()).add(self._exact[key])
        self._by_id = {name: next(iter(numbers)) for name, numbers in by_id.items() if len(numbers) == 1}

    def find(self, key: str) -> int:
        """Number of the resource that `key` names, -1 where there is none."""
        number = self._exact.get(key)
        if number is not None:
            return number
        if "://" in key:
            return self._exact.get(bare_id(key), -1) if self._suffix in key else -1
        return self._by_id.get(key, -1)
