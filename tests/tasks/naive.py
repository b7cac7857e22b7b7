"""The slow twin of the labelling engine: one patient at a time, plain Python, written from the definitions alone."""

from collections import Counter
from datetime import datetime, timedelta

from ehrseq.tasks import Task

INPATIENT = {"IMP", "ACUTE", "NONAC"}
FAR = datetime(9999, 12, 31)


def _status(e: dict, later: list, last: datetime) -> str:
    """Without an end a stay goes on where the source says so, or where it is the last and at most 30 days old."""
    if e["end"]:
        return "closed"
    young = e["start"] >= last - timedelta(days=30)
    goes_on = {"in_progress": True, "ended": False, None: young}[e.get("open")]
    return "open" if goes_on and not later else "unknown"


def naive_admissions(encounters: list[dict], last: datetime) -> list[dict]:
    """encounters: dicts of visit_id, encounter_class, start, end (None while open), of one patient whose data end."""
    inpatient = sorted((e for e in encounters if e["encounter_class"] in INPATIENT), key=lambda e: e["start"])
    for e in inpatient:
        later = [
            o
            for o in inpatient
            if o is not e and o["start"] > e["start"] and (o["visit_id"] is None or o["visit_id"] != e["visit_id"])
        ]
        e["status"] = _status(e, later, last)
        e["reach"] = {"closed": e["end"], "unknown": e["start"], "open": FAR}[e["status"]]
    stays = _group(inpatient, lambda start, reach: start.date() <= reach.date())
    for e in encounters:
        if e["encounter_class"] in ("EMER", "ICU"):
            end = e["end"] or e["start"]
            touching = [s for s in stays if s["start"] <= end and s["reach"] >= e["start"]]
            if touching:
                stay = touching[-1]
                stay["ids"] |= {e["visit_id"]} - {None}
                stay["extent"] = [min(stay["extent"][0], e["start"]), max(stay["extent"][1], end)]
    return stays


def naive_icu_stays(encounters: list[dict], admissions: list[dict], last: datetime) -> list[dict]:
    """Stays in intensive care; those at most an hour apart are one."""
    units = sorted((e for e in encounters if e["encounter_class"] == "ICU"), key=lambda e: e["start"])
    for e in units:
        later = [
            o
            for o in units
            if o is not e and o["start"] > e["start"] and (o["visit_id"] is None or o["visit_id"] != e["visit_id"])
        ]
        e["status"] = _status(e, later, last)
        e["reach"] = {"closed": e["end"], "unknown": e["start"], "open": FAR}[e["status"]]
    stays = _group(units, lambda start, reach: reach == FAR or start <= reach + timedelta(hours=1))
    for stay in stays:
        inside = stay_at(admissions, stay["start"])
        if stay["status"] == "open" and inside and inside["status"] != "open":
            stay |= {"status": "unknown", "extent": [stay["start"], stay["start"]]}
    return stays


def naive_visits(encounters: list[dict]) -> list[dict]:
    """Visits as an outpatient, those of one day together."""
    others = [e for e in encounters if e["encounter_class"] not in INPATIENT | {"EMER", "ICU"}]
    for e in others:
        e["status"] = "closed" if e["end"] else "unknown"
        e["reach"] = e["end"] or e["start"]
    return _group(sorted(others, key=lambda e: e["start"]), lambda start, reach: start.date() <= reach.date())


def _group(members: list[dict], joins) -> list[dict]:
    stays: list[dict] = []
    for e in members:
        if stays and joins(e["start"], max(m["reach"] for m in stays[-1]["members"])):
            stays[-1]["members"].append(e)
        else:
            stays.append({"members": [e]})
    for stay in stays:
        members = stay["members"]
        stay["start"] = min(m["start"] for m in members)
        stay["reach"] = max(m["reach"] for m in members)
        lost = [m["start"] for m in members if m["status"] == "unknown"]
        closed = [m["end"] for m in members if m["status"] == "closed"]
        if any(m["status"] == "open" for m in members):
            stay["status"] = "open"
        elif lost and not (closed and max(closed) > max(lost)):
            stay["status"] = "unknown"
        else:
            stay["status"] = "closed"
        stay["end"] = max(closed) if stay["status"] == "closed" else None
        stay["ids"] = {m["visit_id"] for m in members} - {None}
        stay["extent"] = [stay["start"], stay["reach"]]
    return stays


def naive_change(rule, value: float, reference: float) -> bool:
    """Whether a value has changed so much from an earlier one."""
    slack = 1e-6 * abs(value)
    return {
        "rise": value - reference >= rule.amount - slack,
        "fall": reference - value >= rule.amount - slack,
        "rise_to": value >= rule.amount * reference - slack,
        "fall_to": value <= rule.amount * reference + slack,
    }[rule.kind]


def naive_holds(rule, time: datetime, value: float, values: list[tuple[datetime, float]]) -> bool:
    """Whether a value makes the outcome, whatever the prediction time."""
    slack = 1e-6 * abs(value)
    if rule.kind in ("above", "below", "at_least", "at_most"):
        return {
            "above": value > rule.amount + slack,
            "below": value < rule.amount - slack,
            "at_least": value >= rule.amount - slack,
            "at_most": value <= rule.amount + slack,
        }[rule.kind]
    if rule.since == "prediction":
        return False
    before = [v for t, v in values if time - rule.within <= t < time]
    extreme = max if rule.kind.startswith("fall") else min
    return bool(before) and naive_change(rule, value, extreme(before))


def stay_at(stays: list[dict], time: datetime) -> dict | None:
    started = [s for s in stays if s["extent"][0] <= time]
    return (
        max(started, key=lambda s: s["extent"][0])
        if started and time <= max(started, key=lambda s: s["extent"][0])["extent"][1]
        else None
    )


def naive_labels(
    encounters: list[dict],
    deaths: list[datetime],
    expired: list[datetime],
    codes: list[tuple[datetime, str | None]],
    task: Task,
    end_of_data: datetime,
    values: list[tuple[datetime, float]] = (),
    birth: datetime | None = None,
) -> tuple[list[tuple[datetime, bool]], Counter, Counter]:
    """Labels of one patient, the reasons of what was dropped, and the competing events.

    Everything handed in happened at or before the end of the data.
    """
    known_ids = {e["visit_id"] for e in encounters} - {None}
    death = min(deaths) if deaths else min(expired) if expired else None
    last = min(death, end_of_data) if death else end_of_data
    admissions = stays = naive_admissions(encounters, last)
    icu_stays = naive_icu_stays(encounters, admissions, last)
    first = min((time for time, _ in codes), default=None)
    first_starts = []
    for time, visit_id in codes:
        if time == first:
            if visit_id in known_ids:  # of several admissions with this visit_id the latest that had started
                own = [s for s in stays if visit_id in s["ids"]]
                started = [s for s in own if s["start"] <= time]
                stay = started[-1] if started else own[0] if own else None
            else:
                stay = stay_at(stays, time)
            first_starts += [stay["start"]] if stay else []
    first_start = max(first_starts, default=None)
    stays = {"admission": admissions, "icu": icu_stays, "visit": naive_visits(encounters)}[task.stays]
    expired_stays = [stay_at(stays, time) for time in expired]
    at_start = task.anchor in ("admission", "icu_admission")
    labels, dropped, competing = [], Counter(), Counter()
    for number, stay in enumerate(stays):
        following = stays[number + 1]["start"] if number + 1 < len(stays) else None
        end = stay["end"]
        died_in = any(s is stay for s in expired_stays)
        if death is not None:
            died_in = died_in or (stay["status"] == "open") or (stay["status"] == "closed" and death <= end)
        stay_end = min(t for t in (end, death) if t is not None) if died_in else end
        anchor = stay["start"] if at_start else end
        prediction = anchor + task.offset if anchor else None
        horizon = None
        if prediction:
            horizon = (prediction if task.horizon_from == "prediction" else anchor) + task.horizon
            horizon = stay_end if task.horizon_text == "stay" else horizon
        until = horizon or end_of_data
        measured, baselines = [], {}
        label = False
        if prediction:
            if task.outcome == "death":
                label = death is not None and death <= horizon
            elif task.outcome == "death_in_stay":
                label = died_in and stay_end <= horizon
            elif task.outcome in ("admission", "icu_admission"):
                other = admissions if task.outcome == "admission" else icu_stays
                starts = [s["start"] for s in other if s is not stay and s["start"] > prediction]
                if other is stays:
                    starts = [following] if following is not None and following > prediction else []
                label = bool(starts) and min(starts) <= horizon
            elif task.outcome == "first_code":
                label = first is not None and prediction < first <= until
            elif task.outcome == "value":
                measured = [(t, v) for t, v in values if prediction < t <= until]
                label = any(naive_holds(rule, t, v, values) for t, v in measured for rule in task.rules)
                for rule in task.rules:
                    if rule.since == "prediction":
                        known = [(t, v) for t, v in values if prediction - rule.within <= t <= prediction]
                        baselines[rule] = max(known)[1] if known else None
                        if known:
                            label = label or any(naive_change(rule, v, baselines[rule]) for _, v in measured)
            elif task.outcome == "length_of_stay":
                label = stay_end > horizon if stay_end else horizon <= end_of_data
            elif task.outcome == "code_at_admission":
                label = first_start is not None and prediction < first_start <= horizon
            else:
                label = first is not None

        if not prediction or label:
            dies = elsewhere = False
        else:
            dies = death is not None and prediction < death <= until
            if task.outcome == "length_of_stay" or task.horizon_text == "stay":
                dies = bool(died_in and stay_end <= (horizon or stay_end))
            elsewhere = (
                first is not None and prediction < first <= until and (first_start is None or first_start <= prediction)
            )
        competes = {"death": dies, "code_elsewhere": elsewhere}

        def reason(
            measured=measured,
            baselines=baselines,
            competes=competes,
            stay=stay,
            following=following,
            number=number,
            end=end,
            died_in=died_in,
            stay_end=stay_end,
            prediction=prediction,
            horizon=horizon,
            label=label,
        ):
            if task.admissions == "last" and following:
                return "other_admission"
            if task.admissions == "last_followed" and number != len(stays) - 2:
                return "other_admission"
            if death and stay["start"].date() > death.date():
                return "admitted_after_death"
            if "dead" in task.exclude and not at_start and died_in:
                return "died_before_prediction"
            if (
                "dead" in task.exclude
                and prediction
                and ((death and death <= prediction) or (died_in and stay_end <= prediction))
            ):
                return "died_before_prediction"
            if not at_start and end is None:
                return "no_discharge"
            whole = task.outcome in ("length_of_stay", "death_in_stay") or task.horizon_text == "stay"
            if whole and stay["status"] == "unknown":
                return "no_discharge"
            if "stay_ended" in task.exclude and stay_end and stay_end <= prediction:
                return "stay_ended"
            if task.ages != (None, None):
                age = (prediction - birth) / timedelta(days=365.25) if birth else None
                low, high = task.ages
                if age is None or (low is not None and age < low) or (high is not None and age >= high):
                    return "outside_age"
            if "earlier_code" in task.exclude and first and first <= prediction:
                return "earlier_code"
            if "earlier_value" in task.exclude and any(
                naive_holds(rule, t, v, values)
                for t, v in values
                for rule in task.rules
                if stay["start"] <= t <= prediction
            ):
                return "earlier_value"
            if None in baselines.values():
                return "no_baseline"
            if prediction > end_of_data:
                return "follow_up_ends"
            beyond = horizon is None if task.horizon_text == "stay" else horizon > end_of_data
            dead_by_then = death is not None and horizon is not None and prediction < death <= horizon
            if beyond and not dead_by_then and (task.censoring or (whole and not stay_end)):
                return "follow_up_ends"
            pending = [s for s in stays if s["status"] == "open" and prediction < s["start"] <= horizon]
            if task.outcome == "code_at_admission" and pending:
                return "outcome_pending"
            unseen = task.outcome == "value" and task.unmeasured == "drop" and not measured
            if unseen and not label and not any(competes[event] for event in task.competing):
                return "not_measured"
            return None

        why = reason()
        if why:
            dropped[why] += 1
            continue
        labels.append((prediction, label))
        for event, happened in competes.items():
            competing[event] += event in task.competing and happened
    return sorted(labels), dropped, +competing
