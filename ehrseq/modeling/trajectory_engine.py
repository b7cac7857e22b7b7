"""Futures of many patients at once: each record is read once, its state copied for every trajectory.

A trajectory lives in a *slot*: a row of the model's state and of the arrays here, its clock among them. All slots go on
by one token together. One that ended makes room for the next trajectory, of the same patient or the one after, so that
the memory depends on the number of slots and not on that of patients or trajectories.

Everything that is drawn comes from random numbers of its own (trajectory_draws.py), and each row is computed alike
whatever stands beside it: who shares the slots changes nothing.

Glossary: r rows (slots at work), s slots, n trajectories of a prompt, m outcomes, g days of the grid, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils import logging

from .ehr_trajectories import ForecastPrompt, PatientTrajectories, TrajectoryEnd, TrajectoryRequest
from .ehrmamba_clock import DAYS_PER_WEEK, DAYS_PER_YEAR, TokenEffects
from .fast_forecast import FastSlots, why_not_fast
from .fast_linear import plain_products
from .trajectory_checks import check_forecast_prompt
from .trajectory_draws import DRAWS_OF_A_STEP, pool_of, trajectory_keys, uniforms
from .trajectory_gaps import GapLaw, Windows
from .trajectory_prompts import RecordEnd, read_record
from .trajectory_slots import DenseTokens, NewTokens, Sampling, Slots, TorchSlots
from .trajectory_tokens import NextTokens, TokenSets

if TYPE_CHECKING:
    from .modeling_ehrmamba import EhrMambaForCausalLM

logger = logging.get_logger(__name__)

DEFAULT_SLOTS = 64
WAITING_PATIENTS = 4
"""Patients at work, times the slots, at most: those that are done wait for the ones before them."""

_COMMON_POOL = 0


@dataclass
class _Patient:
    """A prompt at work.

    Attributes:
        end: Where its record stands.
        weights: Of its first token, float64 [V], summing to 1.
        result: What is filled.
        open: Trajectories that have not ended.
        pending: (number, outcome of the pool or -1) of those that have not begun, the next one last.
    """

    end: RecordEnd
    weights: np.ndarray
    result: PatientTrajectories
    open: int
    pending: list[tuple[int, int]]


class TrajectoryEngine:
    """Draws the trajectories of a request, prompt after prompt.

    Args:
        model: In evaluation mode.
        request: What is drawn, checked.
        slots: Rows at once.
    """

    def __init__(self, model: EhrMambaForCausalLM, request: TrajectoryRequest, slots: int):
        config = model.config
        self._model, self._request = model, request
        self._effects = TokenEffects.of(config)
        self._gaps = GapLaw(model)
        self._sampling = Sampling(request.temperature, request.top_k, request.top_p)
        self._grid = np.asarray(request.grid, dtype=np.float64)
        self._sets = TokenSets.of([outcome.ids for outcome in request.outcomes])
        self._avoids = request.estimator == "reach"
        self._pools = [pool_of(outcome.ids) for outcome in request.outcomes] if self._avoids else [_COMMON_POOL]
        self._stops = request.stop_at_outcomes and not request.keep_tokens and not self._avoids and len(self._sets) > 0
        # What a token is, [V] each.
        self._types, self._opens = self._effects.types.numpy(), self._effects.visits.numpy() > 0
        self._death, self._until = (np.zeros(config.vocab_size, dtype=bool) for _ in range(2))
        self._death[list(request.death_ids)] = True
        self._until[list(request.until_ids)] = True
        self._member = np.zeros((config.vocab_size, len(self._sets)), dtype=bool)
        for number, outcome in enumerate(request.outcomes):
            self._member[outcome.ids, number] = True
        # The slots.
        self._without_torch = False  # whether a step multiplies no matrix in torch
        self._slots: Slots
        if self._sampling.is_plain and why_not_fast(model) is None:
            self._slots = FastSlots(model, slots, self._sets, torch.get_num_threads())
            self._without_torch = model.time_head is None
        else:
            self._slots = TorchSlots(model, slots, self._sets, self._sampling)
        m, g = len(self._sets), len(self._grid)
        self._live = np.zeros(slots, dtype=bool)
        self._owner = np.full(slots, None, dtype=object)  # the `_Patient` of each
        self._number, self._pool, self._steps, self._kept = (np.zeros(slots, dtype=np.int64) for _ in range(4))
        self._keys = np.zeros((slots, 2), dtype=np.uint64)
        self._clock, self._weeks, self._age = (np.zeros(slots) for _ in range(3))  # the latter two at prediction time
        self._windows = Windows(np.zeros(slots), np.zeros(slots), np.zeros(slots, dtype=bool))
        self._orders, self._segments, self._token = (np.zeros(slots, dtype=np.int64) for _ in range(3))
        self._times, self._ages, self._before = (np.zeros(slots, dtype=np.float32) for _ in range(3))
        self._shown = np.zeros(slots, dtype=np.int64)  # segment of the latest token
        self._avoided = np.ones(slots)  # product of 1 - h(H)
        self._sums = np.zeros((slots, m, g))
        self._first_days = np.full((slots, m), np.inf)
        room = 64 if request.keep_tokens else 0
        self._kept_tokens, self._kept_days = np.zeros((slots, room), dtype=np.int64), np.zeros((slots, room))
        self._patients: deque[_Patient] = deque()

    def run(self, prompts: Iterable[ForecastPrompt]) -> Iterator[PatientTrajectories]:
        """The trajectories of each prompt, in order."""
        waiting = iter(prompts)
        more = True
        while True:
            more = more and self._fill(waiting)
            while self._patients and not self._patients[0].open:
                yield self._patients.popleft().result
                self._slots.refresh()
            if self._live.any():
                self._step()
            elif not more and not self._patients:
                return

    # -- slots ---------------------------------------------------------------------------------------------------------
    def _fill(self, prompts: Iterator[ForecastPrompt]) -> bool:
        """Give every free slot a trajectory; False once there are no more prompts."""
        most = WAITING_PATIENTS * len(self._live)
        while not self._live.all():
            patient = self._patients[-1] if self._patients else None
            if patient is None or not patient.pending:
                if len(self._patients) >= most:
                    return True
                prompt = next(prompts, None)
                if prompt is None:
                    return False
                check_forecast_prompt(self._model.config, prompt, self._request.death_ids)
                self._slots.refresh()
                with _alike():
                    patient = self._begin(read_record(self._model, self._effects, prompt))
                self._patients.append(patient)
            with _alike():
                self._start(patient)
        return True

    def _begin(self, end: RecordEnd) -> _Patient:
        """A patient whose trajectories have not begun."""
        request, n, m, g = self._request, self._request.num, len(self._sets), len(self._grid)
        shape = (n, m) if self._avoids else (n,)
        result = PatientTrajectories(
            incidence=np.zeros((n, m, g)),
            first_days=np.full((n, m), np.inf),
            ends=np.zeros(shape, dtype=np.int8),
            end_days=np.zeros(shape),
            lengths=np.zeros(shape, dtype=np.int64),
            tokens=[np.zeros(0, dtype=np.int64)] * n if request.keep_tokens else None,
            days=[np.zeros(0)] * n if request.keep_tokens else None,
        )
        pools = range(m) if self._avoids else [-1]
        pending = [(number, pool) for number in range(n) for pool in pools][::-1]
        return _Patient(end, self._first_weights(end), result, len(pending), pending)

    def _first_weights(self, end: RecordEnd) -> np.ndarray:
        """Probabilities of the first token, given that nothing happened in the elapsed days, float64 [V]."""
        weights: np.ndarray = self._sampling.probabilities(end.logits[None])[0].cpu().numpy()
        later = weights * end.waiting
        total = later.sum()
        if total > 0:
            return later / total
        logger.warning_once(
            "A record has been silent for longer than the model finds possible: what comes next is drawn as if its "
            "last event had been just now."
        )
        return weights

    def _start(self, patient: _Patient) -> None:
        """As many of a patient's trajectories as there are free slots, with their first token."""
        rows = np.flatnonzero(~self._live)[: len(patient.pending)]
        begun = [patient.pending.pop() for _ in rows]
        numbers, pools = (np.array(part, dtype=np.int64) for part in zip(*begun, strict=True))
        end, request = patient.end, self._request
        self._owner[rows] = patient
        self._live[rows] = True
        self._number[rows], self._pool[rows] = numbers, pools
        for pool in np.unique(pools):
            mine = pools == pool
            name = self._pools[pool] if self._avoids else _COMMON_POOL
            self._keys[rows[mine]] = trajectory_keys(request.seed, end.key, request.first + numbers[mine], name)
        self._steps[rows] = self._kept[rows] = 0
        self._clock[rows] = -end.elapsed_days
        self._weeks[rows] = end.weeks + end.elapsed_days / DAYS_PER_WEEK
        self._age[rows] = end.age + end.elapsed_days / DAYS_PER_YEAR if end.age else 0.0
        # What happened at the time of an open visit's last event stands in the record.
        silent = max(end.elapsed_days, np.finfo(np.float64).tiny) if end.inside_visit else end.elapsed_days
        self._windows.low[rows], self._windows.high[rows] = silent, np.inf
        self._windows.waiting[rows] = False
        self._orders[rows], self._segments[rows] = end.order, end.segment
        self._times[rows] = end.last_time
        self._avoided[rows], self._sums[rows], self._first_days[rows] = 1.0, 0.0, np.inf
        self._slots.put(rows, end.state)
        hidden = end.hidden[None].expand(len(rows), -1)
        self._draw(rows, DenseTokens(hidden, patient.weights, self._sets))

    # -- one token -----------------------------------------------------------------------------------------------------
    def _step(self) -> None:
        """One token of every slot at work."""
        rows = np.flatnonzero(self._live)
        new = NewTokens(
            ids=self._token[rows],
            types=self._types[self._token[rows]],
            times=self._times[rows],
            ages=self._ages[rows],
            orders=self._orders[rows],
            segments=self._shown[rows],
            before=self._before[rows],
        )
        with nullcontext() if self._without_torch else _alike():
            self._draw(rows, self._slots.step(rows, new))

    def _draw(self, rows: np.ndarray, following: NextTokens) -> None:
        """The next token of these rows and its time; what ends there makes room."""
        request, horizon = self._request, self._request.horizon_days
        clock, windows = self._clock[rows], self._windows.of(rows)
        keys, counters = self._keys[rows], DRAWS_OF_A_STEP * self._steps[rows]
        # 1. What the distribution says of the outcomes.
        avoided = kept = None
        if request.estimator != "monte_carlo" and len(self._sets):
            kept = self._count(rows, following, clock, windows)
            avoided = self._pool[rows] if self._avoids else None
        # 2. The token, and how long until it.
        tokens = following.draw(uniforms(keys, counters), avoided, kept)
        none = tokens < 0
        if avoided is not None:
            none |= self._avoided[rows] == 0  # certain: there is no way around the outcome
        tokens[none] = 0
        clock = clock + self._gaps.draw(
            following.hidden, tokens, lambda some: uniforms(keys[some], counters[some] + 1), windows
        )
        interval = self._gaps.is_interval[tokens]
        days = np.maximum(clock, 0.0)
        clock = np.where(interval, clock, days)  # an event that could have come in the silent days comes now
        low = np.where(windows.waiting, 0.0, windows.low)
        low = np.where(interval, np.maximum(self._gaps.spans[tokens, 0], low), 0.0)
        # 3. Why a trajectory ends here; the last word counts.
        beyond = clock + low > horizon
        if avoided is not None:
            beyond |= self._member[tokens, avoided]  # one that comes too late
        counts = ~(beyond | none)
        lengths = self._kept[rows] + counts
        self._kept[rows] = lengths
        ended = np.where(lengths >= request.max_tokens, int(TrajectoryEnd.LENGTH), -1)
        if not self._avoids and len(self._sets):
            happens = self._member[tokens] & counts[:, None]
            if happens.any():
                before = self._first_days[rows]
                self._first_days[rows] = np.where(happens & np.isinf(before), days[:, None], before)
                if self._stops:
                    ended[np.isfinite(self._first_days[rows]).all(axis=1)] = TrajectoryEnd.OUTCOME
        ended[self._until[tokens]] = TrajectoryEnd.UNTIL
        ended[self._death[tokens]] = TrajectoryEnd.DEATH
        ended[beyond] = TrajectoryEnd.HORIZON
        ended[none] = TrajectoryEnd.OUTCOME
        if request.keep_tokens:
            self._keep(rows[counts], tokens[counts], np.where(interval, np.nan, days)[counts])
        # 4. The clock, and the token's channels.
        self._clock[rows] = clock
        self._steps[rows] += 1
        self._windows.low[rows] = low
        self._windows.high[rows] = np.where(interval, self._gaps.spans[tokens, 1], np.inf)
        self._windows.waiting[rows] = interval
        opens, segments, times, ages = self._opens[tokens], self._segments[rows], self._times[rows], self._age[rows]
        if opens.any():
            self._orders[rows] = np.minimum(self._orders[rows] + opens, self._effects.last_order)
            segments = np.where(opens, 1 + (segments == 1), segments)
            self._segments[rows] = segments
        self._token[rows], self._before[rows] = tokens, times
        self._times[rows] = np.where(interval, 0.0, self._weeks[rows] + clock / DAYS_PER_WEEK)
        self._ages[rows] = np.where(interval | (ages == 0), 0.0, ages + clock / DAYS_PER_YEAR)
        self._shown[rows] = np.where(interval, 0, segments)
        if (ended >= 0).any():
            for place in np.flatnonzero(ended >= 0):
                end = TrajectoryEnd(ended[place])
                self._finish(rows[place], end, horizon if end == TrajectoryEnd.HORIZON else days[place])

    def _count(self, rows: np.ndarray, following: NextTokens, clock: np.ndarray, windows: Windows) -> np.ndarray | None:
        """Add what the next token's distribution says of each outcome; what is left of the avoided ones, [r, most]."""
        later = self._grid - clock[:, None]  # [r, g]
        probabilities = following.probabilities[..., None]  # [r, k, 1]
        reached = self._gaps.reached(following.hidden, self._sets.ids, windows, later)  # [r, k or 1, g]
        h = np.add.reduceat(probabilities * reached, self._sets.starts[:-1], axis=1)  # [r, m, g]
        if not self._avoids:
            self._sums[rows] += np.where(np.isinf(self._first_days[rows])[..., None], h, 0.0)
            return None
        everyone, pool = np.arange(len(rows)), self._pool[rows]
        own = h[everyone, pool]  # [r, g]
        self._sums[rows, pool] += self._avoided[rows, None] * own
        self._avoided[rows] *= np.maximum(1.0 - own[:, -1], 0.0)
        by_horizon = np.broadcast_to(reached[..., -1], (len(rows), len(self._sets.ids)))
        most = int(np.diff(self._sets.starts).max())
        places = np.minimum(self._sets.starts[pool][:, None] + np.arange(most), len(self._sets.ids) - 1)
        return 1.0 - np.take_along_axis(by_horizon, places, axis=1)

    # -- results -------------------------------------------------------------------------------------------------------
    def _keep(self, rows: np.ndarray, tokens: np.ndarray, days: np.ndarray) -> None:
        """Write down tokens that came within the horizon."""
        if len(rows) and int(self._kept[rows].max()) > self._kept_tokens.shape[1]:
            self._kept_tokens, self._kept_days = (
                np.concatenate([kept, np.zeros_like(kept)], axis=1) for kept in (self._kept_tokens, self._kept_days)
            )
        self._kept_tokens[rows, self._kept[rows] - 1] = tokens
        self._kept_days[rows, self._kept[rows] - 1] = days

    def _finish(self, row: int, end: TrajectoryEnd, day: float) -> None:
        """Write a trajectory's outcome where it belongs, and free its slot."""
        patient: _Patient = self._owner[row]
        number, pool, length = self._number[row], self._pool[row], self._kept[row]
        result = patient.result
        place = (number, pool) if self._avoids else number
        result.ends[place], result.end_days[place], result.lengths[place] = end, day, length
        if self._avoids:
            result.incidence[number, pool] = self._sums[row, pool]
        else:
            result.first_days[number] = self._first_days[row]
            happened = (self._first_days[row][:, None] <= self._grid).astype(np.float64)
            result.incidence[number] = happened if self._request.estimator == "monte_carlo" else self._sums[row]
        if result.tokens is not None and result.days is not None and pool <= 0:
            result.tokens[number] = self._kept_tokens[row, :length].copy()
            result.days[number] = self._kept_days[row, :length].copy()
        patient.open -= 1
        if not patient.open:
            for outcome, asked in enumerate(self._request.outcomes):
                if asked.complement:
                    result.incidence[:, outcome] = 1.0 - result.incidence[:, outcome]
        self._owner[row], self._live[row] = None, False


@contextmanager
def _alike() -> Iterator[None]:
    """Products of matrices sum in another order on more threads, or by another library: here by one of each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with plain_products():
            yield
    finally:
        torch.set_num_threads(threads)


__all__ = ["DEFAULT_SLOTS", "TrajectoryEngine"]
