"""Every estimator against exact enumeration: a model of six events, and what it must answer.

Model and enumeration are in benchmarks/tables/markov_model.py.
"""

from functools import cache

import numpy as np
import pytest
import torch

from benchmarks.tables.markov_model import (
    ID,
    TOKENS,
    TRANSITIONS,
    Enumeration,
    bin_logits,
    markov_model,
    markov_prompt,
)
from ehrseq.modeling import trajectory_slots
from ehrseq.modeling.ehr_trajectories import (
    ESTIMATORS,
    Estimator,
    ForecastPrompt,
    OutcomeTokens,
    PatientTrajectories,
    TrajectoryEnd,
    TrajectoryRequest,
)
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.modeling.outcome_estimates import estimate_outcomes, standard_errors

OUTCOMES = {
    "visit": ["[VS]"],
    "union": ["B", "LAB"],
    "death": ["DEATH"],
    "rare": ["RARE"],
    "rarer": ["RARER"],
}
DAYS = (5.0, 20.0, 45.0)
CLOSED = ("[VS]", "A", "[VE]", "[REG]")
SLOTS = 2048


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model this small is read fastest in few large blocks."""
    monkeypatch.setattr(trajectory_slots, "BLOCK_SLOTS", SLOTS)


@cache
def model(*, time_head: bool) -> EhrMambaForCausalLM:
    return markov_model(time_head=time_head)


@cache
def truth(name: str, *, time_head: bool, ends: tuple[str, ...] = ("DEATH",), steps_a_day: int = 4) -> Enumeration:
    return Enumeration(OUTCOMES[name], ends=ends, days=46, time_head=time_head, steps_a_day=steps_a_day)


def outcome(name: str, *, complement: bool = False) -> OutcomeTokens:
    return OutcomeTokens(name, np.array(sorted(ID[token] for token in OUTCOMES[name])), complement)


@cache
def drawn(
    estimator: Estimator, names: tuple[str, ...], num: int, *, time_head: bool, seed: int = 0
) -> tuple[PatientTrajectories, TrajectoryRequest]:
    """Trajectories after a closed visit, asked at its end."""
    request = TrajectoryRequest(
        horizon_days=45.0,
        num=num,
        seed=seed,
        outcomes=tuple(outcome(name) for name in names),
        estimator=estimator,
        grid_days=DAYS,
        death_ids=(ID["DEATH"],),
    )
    return ask(markov_prompt(CLOSED), request, time_head=time_head), request


def ask(prompt: ForecastPrompt, request: TrajectoryRequest, *, time_head: bool) -> PatientTrajectories:
    (answer,) = model(time_head=time_head).trajectories([prompt], request, slots=SLOTS)
    return answer


def off(estimate: tuple[float, ...], exact: list[float], errors: tuple[float, ...]) -> np.ndarray:
    """How many standard errors off."""
    return (np.array(estimate) - exact) / errors


# -- the model and the enumeration -----------------------------------------------------------------------------------


def test_the_next_token_depends_on_the_current_one_alone() -> None:
    tokens = ["[VS]", "A", "B", "[VE]", "[REG]", "[M_1]", "[VS]", "RARE", "LAB", "[VE]", "[REG]", "[W_0]"]
    prompt = markov_prompt(tokens)
    with torch.no_grad():
        logits = model(time_head=False)(**prompt.inputs).logits[0]
    np.testing.assert_allclose(logits.double().softmax(-1), TRANSITIONS[[ID[token] for token in tokens]], atol=2e-6)
    np.testing.assert_allclose(TRANSITIONS.sum(1), 1.0)


def test_the_time_head_says_what_the_enumeration_reads() -> None:
    whole = model(time_head=True)
    tokens = torch.arange(len(TOKENS))
    size = whole.config.hidden_size
    hidden = torch.nn.functional.one_hot(tokens, size).float()
    words = whole.model.embeddings.word_embeddings.weight[tokens]
    with torch.no_grad():
        found = whole.time_head.log_probabilities(hidden[:, None], words[None])
    of_current, of_next = bin_logits()
    expected = torch.tensor(of_current[:, None] + of_next).log_softmax(-1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_enumeration_of_a_visit_is_the_chain_of_its_tokens() -> None:
    """By hand: without time, what comes before [VE] is an absorbing chain; within a week only [W_0] leads on."""
    enumeration = truth("rare", time_head=False, ends=("[VE]", "DEATH"))
    stays = ["[VS]", "A", "B", "LAB"]  # RARER leads to B or out, RARE is the outcome
    inner = [ID[token] for token in [*stays, "RARER"]]
    through = np.linalg.inv(np.eye(len(inner)) - TRANSITIONS[np.ix_(inner, inner)])
    absorbed = through @ TRANSITIONS[inner, ID["RARE"]]
    np.testing.assert_allclose(enumeration.within[inner, 0], absorbed, rtol=1e-6)
    # [REG] -> [W_0] half of the time, then a day even over seven, then [VS] or A.
    by_day_3 = 0.5 * 3 / 7 * (0.9 * absorbed[0] + 0.06 * absorbed[1])
    assert enumeration.at(enumeration.first("[REG]"), 3.0) == pytest.approx(by_day_3, rel=1e-6)
    # After three days of silence four sevenths of [W_0] are left; a day more is a quarter of them.
    left = np.array([0.5 * 4 / 7, 0.35, 0.15])
    later = left[0] / left.sum() * 0.25 * (0.9 * absorbed[0] + 0.06 * absorbed[1])
    assert enumeration.at(enumeration.first("[REG]", elapsed=3.0), 1.0) == pytest.approx(later, rel=1e-6)


# -- estimators ------------------------------------------------------------------------------------------------------

FAST, EXACT = 6_000, 100_000
NAMES = tuple(OUTCOMES)


def check(estimator: Estimator, names: tuple[str, ...], num: int, *, time_head: bool) -> None:
    """The probability within three standard errors, and the cumulative incidence by every day within four."""
    found, request = drawn(estimator, names, num, time_head=time_head)
    for estimate in estimate_outcomes(found, request):
        exact = truth(estimate.name, time_head=time_head, steps_a_day=4 if num <= FAST else 16)
        by_day = exact.first("[REG]")
        z = off(estimate.incidence, [exact.at(by_day, day) for day in DAYS], estimate.incidence_errors)
        assert abs(z[-1]) < 3, (estimator, estimate.name, z)
        assert (np.abs(z) < 4).all(), (estimator, estimate.name, z)
        assert estimate.cut == 0


@pytest.mark.parametrize("time_head", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_are_the_truth(estimator: Estimator, time_head: bool) -> None:
    names = NAMES if estimator != "reach" and not time_head else ("visit", "rare")
    check(estimator, names, FAST // 3 if time_head else FAST, time_head=time_head)


@pytest.mark.slow
@pytest.mark.parametrize("time_head", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_of_a_hundred_thousand_are_the_truth(estimator: Estimator, time_head: bool) -> None:
    """Monte Carlo and SCOPE of one pool, REACH of one an outcome. (With a time head, which takes longer, a third.)"""
    for names in [NAMES] if estimator != "reach" else [("death",), ("rare",)]:
        check(estimator, names, EXACT // 3 if time_head else EXACT, time_head=time_head)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("tokens", "elapsed", "time_head"),
    [
        (CLOSED, 3.0, False),
        (CLOSED, 12.0, False),
        (CLOSED, 40.0, False),
        (CLOSED, 400.0, False),
        (CLOSED, 3.0, True),
        (CLOSED, 40.0, True),
        (("[VS]", "A"), 0.0, False),
        (("[VS]", "A"), 0.0, True),
        (("[VS]", "B"), 0.5, True),
        (("[VS]", "LAB"), 1.0, True),
        (("[VS]", "B"), 20.0, True),
        (("[VS]", "B"), 20.0, False),
    ],
)
def test_silence_before_the_question(
    estimator: Estimator, tokens: tuple[str, ...], elapsed: float, time_head: bool
) -> None:
    request = TrajectoryRequest(
        horizon_days=45.0,
        num=1500,
        seed=5,
        outcomes=(outcome("union"),),
        estimator=estimator,
        grid_days=DAYS,
        death_ids=(ID["DEATH"],),
    )
    (estimate,) = estimate_outcomes(ask(markov_prompt(tokens, elapsed), request, time_head=time_head), request)
    exact = truth("union", time_head=time_head)
    by_day = exact.first(tokens[-1], elapsed)
    z = off(estimate.incidence, [exact.at(by_day, day) for day in DAYS], estimate.incidence_errors)
    assert (np.abs(z) < 3.5).all(), (z, estimate)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_death_and_an_end_compete(estimator: Estimator) -> None:
    """Of the end of a visit, of death, and of neither: each has its own truth, far from those of the others."""
    exact = []
    for ends in (("DEATH",), (), ("DEATH", "[VE]")):
        request = TrajectoryRequest(
            horizon_days=45.0,
            num=3000,
            seed=1,
            outcomes=(outcome("union"),),
            estimator=estimator,
            death_ids=(ID["DEATH"],) if "DEATH" in ends else (),
            until_ids=(ID["[VE]"],) if "[VE]" in ends else (),
        )
        (estimate,) = estimate_outcomes(ask(markov_prompt(CLOSED), request, time_head=False), request)
        enumeration = truth("union", time_head=False, ends=ends)
        exact.append(enumeration.at(enumeration.first("[REG]"), 45.0))
        assert abs(estimate.probability - exact[-1]) < 3 * estimate.standard_error
    assert exact[1] > exact[0] > exact[2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_does_not_come_is_the_rest(estimator: Estimator) -> None:
    request = TrajectoryRequest(
        horizon_days=45.0,
        num=2000,
        outcomes=(outcome("visit", complement=True), outcome("death")),
        estimator=estimator,
        death_ids=(ID["DEATH"],),
    )
    complement, death = estimate_outcomes(ask(markov_prompt(CLOSED), request, time_head=True), request)
    for estimate, name in ((complement, "visit"), (death, "death")):
        enumeration = truth(name, time_head=True)
        value = enumeration.at(enumeration.first("[REG]"), 45.0)
        exact = 1 - value if name == "visit" else value
        assert abs(estimate.probability - exact) < 3 * estimate.standard_error


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("elapsed", [0.0, 1.0])
def test_a_stay_that_goes_on(estimator: Estimator, elapsed: float) -> None:
    """The length of a stay: that neither [VE] nor a death comes within three days of a visit that is open."""
    ends = ("[VE]", "DEATH")
    request = TrajectoryRequest(
        horizon_days=3.0,
        num=2000,
        seed=4,
        outcomes=(OutcomeTokens("long", np.array(sorted(ID[token] for token in ends)), complement=True),),
        estimator=estimator,
        death_ids=(ID["DEATH"],),
    )
    prompt = markov_prompt(("[VS]", "A"), elapsed)
    (estimate,) = estimate_outcomes(ask(prompt, request, time_head=True), request)
    enumeration = Enumeration(ends, days=3, time_head=True, steps_a_day=32)
    exact = 1 - enumeration.at(enumeration.first("A", elapsed), 3.0)
    assert 0.05 < exact < 0.95
    assert abs(estimate.probability - exact) < 3 * estimate.standard_error


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_beyond_a_year(estimator: Estimator) -> None:
    """[LT] reaches from 366 days on, without an end."""
    request = TrajectoryRequest(
        horizon_days=450.0,
        num=400,
        seed=2,
        outcomes=(outcome("rare"),),
        estimator=estimator,
        grid_days=(100.0, 450.0),
        death_ids=(ID["DEATH"],),
    )
    prompt = markov_prompt(CLOSED, 70.0)  # so that nothing but [LT] is left
    (estimate,) = estimate_outcomes(ask(prompt, request, time_head=False), request)
    enumeration = Enumeration(["RARE"], days=450, time_head=False, steps_a_day=1)
    by_day = enumeration.first("[REG]", 70.0)
    assert estimate.incidence[0] < 1e-20  # logits are finite
    assert enumeration.at(by_day, 100.0) == 0.0
    assert abs(estimate.probability - enumeration.at(by_day, 450.0)) < 3 * estimate.standard_error


def test_cut_trajectories_are_told_and_lack_what_would_have_come() -> None:
    request = TrajectoryRequest(
        horizon_days=45.0, num=500, outcomes=(outcome("visit"),), death_ids=(ID["DEATH"],), max_tokens=1
    )
    found = ask(markov_prompt(CLOSED), request, time_head=False)
    (estimate,) = estimate_outcomes(found, request)
    assert estimate.probability == 0.0
    # The first token is an interval: [LT] begins behind the horizon, whatever else is cut there.
    assert estimate.cut == (found.ends == TrajectoryEnd.LENGTH).mean() == pytest.approx(0.85, abs=0.06)


# -- errors and variances --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_intervals_cover_at_their_rate(estimator: Estimator) -> None:
    """Intervals of 95 % from blocks of sixty trajectories of one pool."""
    names = ("visit", "rare") if estimator == "reach" else NAMES
    found, _ = drawn(estimator, names, FAST, time_head=False)
    for column, name in enumerate(names[:2]):
        exact = truth(name, time_head=False)
        values = found.incidence[:, column, -1].reshape(60, -1)
        errors = standard_errors(values, is_binary=estimator == "monte_carlo")
        covered = np.abs(values.mean(0) - exact.at(exact.first("[REG]"), 45.0)) <= 1.96 * errors
        # A hundred blocks, whose rate has a standard error of 0.022. The table forecast_estimators.py takes many more.
        assert 0.9 <= covered.mean() <= 1.0, (name, covered.mean())


@pytest.mark.parametrize("time_head", [False, True])
def test_reach_varies_less_than_monte_carlo(time_head: bool) -> None:
    num = FAST // 3 if time_head else FAST
    found, _ = drawn("reach", ("visit", "rare"), num, time_head=time_head)
    for column, name in enumerate(("visit", "rare")):
        exact = truth(name, time_head=time_head)
        p = exact.at(exact.first("[REG]"), 45.0)
        ratio = found.incidence[:, column, -1].var() / (p * (1 - p))
        assert ratio < 1
        if p <= 0.01:
            assert ratio < 0.2, (name, p, ratio)
