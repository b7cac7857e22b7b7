"""From a clinical task to what a forecast is asked for: outcome, horizon and end, and where the two differ.

A task (`ehrseq.tasks.schema`, or a file of ACES) is asked at moments that the labelling engine finds, of patients whom
it excludes or not. A forecast takes moments and patients from its labels, or from the caller, and answers the rest: how
probable is it that the outcome comes within the time that is left of the horizon.

| outcome | tokens | ends at |
|---|---|---|
| `death` | deaths, and discharges that say so | - |
| `death_in_stay` | the same | the end of the visit |
| `admission`, `icu_admission` | starts of encounters of these classes | - |
| `first_code` | the codes | a death (competing) |
| `code_at_admission` | the codes, wherever they are recorded | a death (competing) |
| `value` with limits | value bins that lie within the limits | a death (competing) |
| `length_of_stay` | that no end of the stay comes; needs a time head | - |

The rest looks at what no trajectory holds: a code anywhere in the record, and everything retrospective, looks back; a
change of a value is more than its bin. Those are errors that say so.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from ehrseq.data.units import canonical_unit
from ehrseq.forecasting.aces_outcomes import read_aces_outcome
from ehrseq.forecasting.task_forecast import LONGEST_STAY_DAYS, TaskForecast, codes_that_match
from ehrseq.modeling.ehr_trajectories import OutcomeTokens
from ehrseq.tasks.aces import is_aces_file
from ehrseq.tasks.measures import LIMITS, Measure
from ehrseq.tasks.registry import load_task
from ehrseq.tasks.schema import Task
from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES
from ehrseq.tokenization.ehr_outcomes import (
    codes_of_tokens,
    death_ids,
    token_array,
    value_ids,
    visit_end_ids,
    visit_start_ids,
)
from ehrseq.tokenization.ehr_vocabulary import LONG_TERM, MONTHS, VE, WEEKS, EventVocabulary

_STAY_CLASSES = {"admission": INPATIENT_CLASSES, "icu": frozenset({"ICU"})}
_IN_STAY = "the model has no time within visits: what it foretells for the rest of the visit counts whenever it comes"


def task_outcome(task: Task | str | Path, vocabulary: EventVocabulary, *, time_head: bool) -> TaskForecast:
    """What a task asks of a forecast.

    Args:
        task: A task, the name of a packaged one, or a YAML file of ours or of ACES.
        vocabulary: Of the model's tokenizer.
        time_head: Whether the model has a time of its own for the events of a visit.

    Raises:
        ValueError: A task that cannot be forecast, or not by this model, and why; or a file that is none.
    """
    if isinstance(task, (str, Path)) and is_aces_file(task):
        return read_aces_outcome(task, vocabulary, time_head=time_head)
    task = task if isinstance(task, Task) else load_task(task)
    return _OutcomeReader(task, vocabulary, time_head=time_head).read()


class _OutcomeReader:
    """Reads one task against one vocabulary."""

    def __init__(self, task: Task, vocabulary: EventVocabulary, *, time_head: bool) -> None:
        self.task, self.vocabulary, self.time_head = task, vocabulary, time_head
        self.notes: list[str] = []
        self.deaths = death_ids(vocabulary)

    def read(self) -> TaskForecast:
        """See `task_outcome`."""
        task = self.task
        if task.retrospective or task.outcome == "code_ever":
            raise self.error(
                "it is retrospective: its rows or its outcome use what is not known at the prediction time. A forecast "
                "only looks ahead; take the variant that can be predicted (list_tasks())"
            )
        in_stay = task.side == "start"
        horizon = self.horizon_days()
        complement = task.outcome == "length_of_stay"
        if complement and not self.time_head:
            raise self.error(
                "the length of a stay is a time within a visit, and this model has none: to it every visit is over at "
                "once. Train one with a time head (`time_edges`)"
            )
        ids = self.ids()
        until = self.until_ids()
        # To the end of the stay the order of tokens tells enough; any earlier horizon asks for their time.
        needs_time_head = complement or (in_stay and not task.to_stay_end)
        if needs_time_head and not self.time_head:
            self.notes.append(_IN_STAY)
        if not self.deaths:
            self.notes.append("the vocabulary has no token of a death: no trajectory ends in one")
        return TaskForecast(
            name=task.name,
            horizon_days=horizon,
            outcome=OutcomeTokens(task.name, token_array(ids), complement),
            until_ids=until,
            death_ids=self.deaths,
            needs_time_head=needs_time_head,
            moments=self.moments(),
            notes=tuple(self.notes),
        )

    def error(self, why: str) -> ValueError:
        """An error that names the task."""
        return ValueError(f"The task {self.task.name!r} cannot be forecast: {why}.")

    def horizon_days(self) -> float:
        """What is left of the horizon at the prediction time."""
        task = self.task
        if task.to_stay_end:
            self.notes.append(f"the end of the stay is looked for up to {LONGEST_STAY_DAYS:g} days")
            return LONGEST_STAY_DAYS
        left = task.horizon - (task.offset if task.horizon_from == "anchor" else timedelta(0))
        if left <= timedelta(0):
            raise self.error(f"its horizon of {task.horizon_text} from the {task.anchor} ends before the question")
        return left / timedelta(days=1)

    def moments(self) -> str:
        """When the task is asked, in words."""
        task = self.task
        after = f"{task.offset / timedelta(hours=1):g} hours after" if task.offset else "at"
        excluded = f", except: {', '.join(task.exclude)}" if task.exclude else ""
        return f"{after} every {task.anchor.replace('_', ' ')}{excluded}; the task's labels name these moments"

    def ids(self) -> set[int]:
        """Tokens of the outcome."""
        match self.task.outcome:
            case "death":
                return self.of_deaths()
            case "death_in_stay":
                return self.of_deaths()
            case "admission":
                self.notes.append(
                    "every start of an inpatient encounter counts; to the labels one on the day of a discharge is a "
                    "transfer"
                )
                return self.of_starts("admission")
            case "icu_admission":
                self.notes.append(
                    "every start of an encounter in intensive care counts; to the labels one within an hour is a "
                    "transfer"
                )
                return self.of_starts("icu")
            case "first_code":
                return self.of_codes()
            case "code_at_admission":
                self.notes.append(
                    "the codes count wherever they are recorded by the horizon; to the labels only at an admission "
                    "that starts by then"
                )
                return self.of_codes()
            case "value":
                return self.of_values()
            case _:
                return self.of_stay_ends() | self.of_deaths()

    def until_ids(self) -> tuple[int, ...]:
        """Tokens after which nothing counts: the end of the stay where the outcome must come before it."""
        if self.task.outcome != "death_in_stay" and not self.task.to_stay_end:
            return ()
        token_ids = self.vocabulary.token_ids
        says_death = set(visit_end_ids(self.vocabulary)) & set(self.deaths)
        if self.task.outcome != "death_in_stay" or says_death:
            return tuple(sorted(self.of_stay_ends()))
        # A death at the end of a stay is a row behind it, in a visit of its own that begins within the same week.
        self.notes.append("no discharge in the vocabulary says that the patient died: deaths within a week of it count")
        starts = visit_start_ids(self.vocabulary, [*INPATIENT_CLASSES, "EMER", "AMB", "OBSENC", "SS", "HH", "VR"])
        return tuple(sorted({*(token_ids[name] for name in [*WEEKS[1:], *MONTHS, LONG_TERM]), *starts}))

    def of_deaths(self) -> set[int]:
        if not self.deaths:
            raise self.error("the vocabulary has no token of a death (the model was trained without, see input_kinds)")
        return set(self.deaths)

    def of_starts(self, stays: str) -> set[int]:
        found = visit_start_ids(self.vocabulary, _STAY_CLASSES[stays])
        if not found:
            raise self.error(
                f"the vocabulary has no start of an encounter of the classes {sorted(_STAY_CLASSES[stays])}: the model "
                "never saw one, or was trained without (input_kinds)"
            )
        return set(found)

    def of_stay_ends(self) -> set[int]:
        """Tokens by which the task's stay has ended.

        A visit of the tokenizer is what an admission is to the tasks: [VE] ends it. Intensive care ends within one.
        """
        ends = {self.vocabulary.token_ids[VE]}
        if self.task.stays != "icu":
            self.notes.append("a stay ends with the last event of its visit")
            return ends
        if set(visit_end_ids(self.vocabulary, ["ICU"])) == ends:
            raise self.error("the vocabulary has no token of the end of a stay in intensive care")
        return set(visit_end_ids(self.vocabulary, ["ICU", "*"]))

    def of_codes(self) -> set[int]:
        """Tokens of the codes that the task's expressions find, in Rust's syntax as the labels read them."""
        codes = codes_of_tokens(self.vocabulary)
        found = codes_that_match(codes, self.task.codes)
        if not found:
            raise self.error(
                f"no token of the vocabulary matches its codes {[pattern[:80] for pattern in self.task.codes[:3]]}: "
                "the model never saw one often enough to have a token for it"
            )
        return {number for code in found for number in codes[code]}

    def of_values(self) -> set[int]:
        task = self.task
        changes = [rule.kind for rule in task.rules if rule.kind not in LIMITS]
        if changes:
            raise self.error(
                f"its outcome is a change of a value ({', '.join(changes)}); of a value a model knows the bin, and not "
                "by how much it has changed. Limits (at_least, at_most, above, below) can be forecast"
            )
        ids: set[int] = set()
        said: list[str] = []
        read: set[tuple[str, str]] = set()  # the first measure that fits reads the values of a code in a unit
        for measure in task.measures:
            for pair in self.measured(measure):
                bins = self.vocabulary.bins(*pair)
                if pair in read or bins is None:
                    continue
                read.add(pair)
                for rule in task.rules:
                    found, words = value_ids(pair[0], bins, rule.kind, rule.amount / measure.times)
                    ids |= found
                    said += [words] if words else []
        if not read:
            wanted = [(measure.codes[0], measure.unit) for measure in task.measures[:2]]
            raise self.error(f"no code with value bins fits what it measures, like {wanted}")
        if not ids:
            raise self.error("; ".join(said[:3]))
        self.notes += said
        if task.unmeasured == "drop":
            self.notes.append(
                "what is estimated is that the value is measured and within the limit; the labels leave out whoever is "
                "not measured"
            )
        return ids

    def measured(self, measure: Measure) -> list[tuple[str, str]]:
        """(code, unit) of the value bins that a measure reads, as `ehrseq.tasks.measures` reads rows."""
        pairs = [(code, unit) for code, units in self.vocabulary.value_bins.items() for unit in units]
        if measure.unit is None:
            found = codes_that_match({code for code, _ in pairs}, measure.codes)
            return [(code, unit) for code, unit in pairs if code in found]
        wanted = canonical_unit(measure.unit)
        named = {}
        for code, unit in pairs:
            base, _, in_code = code.rpartition("//")
            # A unit of its own, or, without one, what stands behind the code.
            named[code, unit] = (base, in_code) if not unit and "//" in base else (code, unit)
        found = codes_that_match({base for base, _ in named.values()}, measure.codes)
        return [
            pair for pair, (base, unit) in named.items() if base in found and unit and canonical_unit(unit) == wanted
        ]


__all__ = ["task_outcome"]
