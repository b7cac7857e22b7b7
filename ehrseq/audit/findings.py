"""What an audit says: findings, what a user has accepted, and the report.

A finding has a key, `kind`, `kind:task` or `kind:task:item` (the item is a code, a split, a file); accepting a key
accepts every finding whose key it is, or begins with it at a colon. `*` stands for any task:
`near_label_code:*:DIAGNOSIS//ICD10CM//Z66`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

KINDS: dict[str, str] = {
    "future_event_in_row": "an encoded row holds what happened after its prediction time",
    "outcome_at_prediction": "the outcome stands at the very instant of the prediction, or before it",
    "prediction_after_death": "the prediction is made when the patient is already dead",
    "label_dependent_window": "when a prediction is made depends on what it is to foretell",
    "label_differs": "a label is not the one that its task gives, or the task gives this row none",
    "near_label_code": "a single code, known at the prediction time, nearly is the label",
    "shared_patients": "a patient stands in more than one split",
    "copied_patients": "patients of different splits have the same history",
    "fitted_on_held_out": "tokenizer or bins were fitted on patients of other splits than pretrain and train",
    "fitted_on_unknown": "the stored digest fits no combination of this dataset's splits",
}
"""Kinds of findings, in the order of a report."""


@dataclass(frozen=True)
class Finding:
    """One leak.

    Attributes:
        kind: One of `KINDS`.
        task: The task that it concerns, empty where it concerns none.
        item: The code, split or file that it is about, may be empty.
        count: How many rows or patients, or 0.
        text: What was found, in words, with numbers.
        example: One case; patients by the user's own ids.
        numbers: Measured figures, for machines.
        accepted: Why it is accepted; empty: it is not.
    """

    kind: str
    task: str
    item: str
    count: int
    text: str
    example: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    accepted: str = ""

    @property
    def key(self) -> str:
        """What accepts it."""
        return ":".join([self.kind, self.task or "*", self.item]).rstrip(":") if self.item else self._short

    @property
    def _short(self) -> str:
        return f"{self.kind}:{self.task}" if self.task else self.kind

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "key": self.key,
            "kind": self.kind,
            "task": self.task,
            "item": self.item,
            "count": self.count,
            "text": self.text,
            "example": self.example,
            "numbers": self.numbers,
            "accepted": self.accepted,
        }


@dataclass(frozen=True)
class Accepted:
    """Findings that a user knows of and wants no exit code for.

    Attributes:
        kind: One of `KINDS`.
        task: Of this task only; `*` for any.
        item: Of this code, split or file only; empty for any.
        reason: Why, in words.
    """

    kind: str
    task: str = "*"
    item: str = ""
    reason: str = ""

    @classmethod
    def parse(cls, text: str, *, reason: str = "", source: str = "--accept") -> Accepted:
        """Read a key `kind[:task[:item]]`.

        Raises:
            ValueError: An unknown kind, or an empty key.
        """
        kind, _, rest = text.strip().partition(":")
        task, _, item = rest.partition(":")
        if kind not in KINDS:
            raise ValueError(
                f"{source}: {text!r} names no kind of finding; expected KIND, KIND:TASK or KIND:TASK:ITEM with a kind "
                f"out of {list(KINDS)}, or a .yaml file of such."
            )
        return cls(kind, task or "*", item, reason)

    @property
    def key(self) -> str:
        """As the user would write it."""
        parts = [self.kind, *([self.task] if self.task != "*" or self.item else []), *([self.item] * bool(self.item))]
        return ":".join(parts)

    def covers(self, finding: Finding) -> bool:
        """Whether it speaks of a finding."""
        return (
            self.kind == finding.kind
            and self.task in ("*", finding.task)
            and (not self.item or self.item == finding.item)
        )


def read_accepted(entries: Iterable[str | Path]) -> list[Accepted]:
    """What is accepted: keys, and YAML files of keys.

    A file is a list of keys, or of mappings with `finding` (a key) and `reason`.

    Raises:
        ValueError: A file that cannot be read, or an unknown kind.
    """
    out: list[Accepted] = []
    for entry in entries:
        text = str(entry)
        if not text.endswith((".yaml", ".yml")):
            out.append(Accepted.parse(text))
            continue
        try:
            content = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{text} cannot be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, list):
            raise ValueError(f"{text} holds {content!r}; expected a list of keys, or of {{finding: key, reason: why}}.")
        for item in content:
            if isinstance(item, str):
                out.append(Accepted.parse(item, source=text))
            elif isinstance(item, dict) and isinstance(item.get("finding"), str) and set(item) <= {"finding", "reason"}:
                reason = " ".join(str(item.get("reason", "")).split())
                out.append(Accepted.parse(item["finding"], reason=reason, source=text))
            else:
                raise ValueError(f"{text} holds {item!r}; expected a key, or {{finding: key, reason: why}}.")
    return out


@dataclass
class AuditReport:
    """Everything an audit found and did.

    Attributes:
        dataset: What was audited.
        findings: Leaks, accepted ones too.
        checks: What was looked at, and how much of it: name -> text; what could not be checked says why.
        unused: Keys that were accepted but not found.
    """

    dataset: str
    findings: list[Finding] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    @property
    def open(self) -> list[Finding]:
        """Findings that nobody has accepted."""
        return [finding for finding in self.findings if not finding.accepted]

    def accept(self, accepted: Sequence[Accepted]) -> None:
        """Mark what is accepted; what accepts nothing is kept in `unused`."""
        used: set[str] = set()
        marked = []
        for finding in self.findings:
            covering = next((entry for entry in accepted if entry.covers(finding)), None)
            if covering is None:
                marked.append(finding)
                continue
            used.add(covering.key)
            marked.append(replace(finding, accepted=covering.reason or f"accepted as {covering.key}"))
        order = {kind: k for k, kind in enumerate(KINDS)}
        self.findings = sorted(marked, key=lambda finding: (order[finding.kind], finding.task, -finding.count))
        self.unused = [entry.key for entry in accepted if entry.key not in used]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "dataset": self.dataset,
            "open": len(self.open),
            "findings": [finding.to_dict() for finding in self.findings],
            "checks": self.checks,
            "unused_acceptances": self.unused,
        }

    def __str__(self) -> str:
        lines = [f"Audit of {self.dataset}"]
        lines += [f"  {name}: {text}" for name, text in self.checks.items()]
        for finding in self.findings:
            mark = "accepted" if finding.accepted else "FINDING"
            lines += [f"{mark} {finding.key}", f"  {KINDS[finding.kind]}", f"  {finding.text}"]
            lines += [f"  example: {finding.example}"] if finding.example else []
            lines += [f"  accepted: {finding.accepted}"] if finding.accepted else []
        lines += [f"accepted but not found: {key}" for key in self.unused]
        accepted = len(self.findings) - len(self.open)
        lines.append(
            f"{len(self.open)} finding(s)" + (f", {accepted} accepted" if accepted else "") + "."
            if self.findings
            else "No finding."
        )
        return "\n".join(lines)


def display_path(path: str | Path) -> str:
    """A path as the user would type it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
