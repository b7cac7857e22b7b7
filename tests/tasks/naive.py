"""The slow twin of the labelling engine: one patient at a time, plain Python, written from the definitions alone."""

from collections import Counter
from datetime import datetime

from ehrseq.tasks import Task

INPATIENT = {"IMP", "ACUTE", "NONAC"}
FAR = datetime(9999, 12, 31)


def naive_admissions(encounters: list[dict]) -> list[dict]:
    """encounters: dicts of visit_id, encounter_class, start, end (None while open), of one patient."""
    inpatient = sorted((e for e in encounters if e["encounter_class"] in INPATIENT), key=lambda e: e["start"])
    for e in inpatient:
        later = [
            o
            for o in inpatient
            if o is not e and o["start"] > e["start"] and (o["visit_id"] is None or o["visit_id"] != e["visit_id"])
        ]
        e["status"] = "closed" if e["end"] else ("unknown" if later else "open")
        e["reach"] = {"closed": e["end"], "unknown": e["start"], "open": FAR}[e["status"]]
    stays: list[dict] = []
    for e in inpatient:
        if stays and e["start"].date() <= max(m["reach"] for m in stays[-1]["members"]).date():
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
    for e in encounters:
        if e["encounter_class"] in ("EMER", "ICU"):
            end = e["end"] or e["start"]
            touching = [s for s in stays if s["start"] <= end and s["reach"] >= e["start"]]
            if touching:
                stay = touching[-1]
                stay["ids"] |= {e["visit_id"]} - {None}
                stay["extent"] = [min(stay["extent"][0], e["start"]), max(stay["extent"][1], end)]
    return stays


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
) -> tuple[list[tuple[datetime, bool]], Counter, Counter]:
    """Labels of one patient, the reasons of what was dropped, and the competing events.

    Everything handed in happened at or before the end of the data.
    """
    stays = naive_admissions(encounters)
    known_ids = {e["visit_id"] for e in encounters} - {None}
    expired_stays = [stay_at(stays, time) for time in expired]
    death = min(deaths) if deaths else min(expired) if expired else None
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
    labels, dropped, competing = [], Counter(), Counter()
    for number, stay in enumerate(stays):
        following = stays[number + 1]["start"] if number + 1 < len(stays) else None
        end = stay["end"]
        died_in = any(s is stay for s in expired_stays)
        if death is not None:
            died_in = died_in or (stay["status"] == "open") or (stay["status"] == "closed" and death <= end)
        stay_end = min(t for t in (end, death) if t is not None) if died_in else end
        anchor = stay["start"] if task.anchor == "admission" else end
        prediction = anchor + task.offset if anchor else None
        horizon = None
        if prediction:
            horizon = (prediction if task.horizon_from == "prediction" else anchor) + task.horizon
        label = False
        if prediction:
            if task.outcome == "death":
                label = death is not None and death <= horizon
            elif task.outcome == "admission":
                label = following is not None and prediction < following <= horizon
            elif task.outcome == "length_of_stay":
                label = stay_end > horizon if stay_end else horizon <= end_of_data
            elif task.outcome == "code_at_admission":
                label = first_start is not None and prediction < first_start <= horizon
            else:
                label = first is not None

        def reason(
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
            if "dead" in task.exclude and task.anchor == "discharge" and died_in:
                return "died_before_prediction"
            if (
                "dead" in task.exclude
                and prediction
                and ((death and death <= prediction) or (died_in and stay_end <= prediction))
            ):
                return "died_before_prediction"
            if task.anchor == "discharge" and end is None:
                return "no_discharge"
            if task.outcome == "length_of_stay" and stay["status"] == "unknown":
                return "no_discharge"
            if "stay_ended" in task.exclude and stay_end and stay_end <= prediction:
                return "stay_ended"
            if "earlier_code" in task.exclude and first and first <= prediction:
                return "earlier_code"
            if prediction > end_of_data:
                return "follow_up_ends"
            if (
                not label
                and horizon > end_of_data
                and (task.censoring or (task.outcome == "length_of_stay" and not stay_end))
            ):
                return "follow_up_ends"
            pending = [s for s in stays if s["status"] == "open" and prediction < s["start"] <= horizon]
            if task.outcome == "code_at_admission" and not label and pending:
                return "outcome_pending"
            return None

        why = reason()
        if why:
            dropped[why] += 1
            continue
        labels.append((prediction, label))
        if not label:
            if task.outcome == "length_of_stay":
                dies = died_in and stay_end <= horizon
            else:
                dies = death is not None and prediction < death <= horizon
            elsewhere = (
                first is not None
                and prediction < first <= horizon
                and (first_start is None or first_start <= prediction)
            )
            for event, happened in (("death", dies), ("code_elsewhere", elsewhere)):
                competing[event] += event in task.competing and happened
    return sorted(labels), dropped, +competing
