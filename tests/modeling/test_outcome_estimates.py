"""Probabilities and their errors from trajectories: hand-computed cases, and how often the intervals cover."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from ehrseq.modeling.ehr_trajectories import (
    ForecastPrompt,
    OutcomeTokens,
    PatientTrajectories,
    TrajectoryEnd,
    TrajectoryRequest,
)
from ehrseq.modeling.outcome_estimates import (
    OutcomeEstimate,
    check_outcomes,
    effective_number,
    estimate_outcomes,
    estimate_to_error,
    standard_errors,
)

DEATH = OutcomeTokens("death", np.array([3]))
STAYS = OutcomeTokens("stays", np.array([4]), complement=True)


def trajectories(incidence: object, ends: object = None) -> PatientTrajectories:
    values = np.asarray(incidence, dtype=np.float64)
    shape = values.shape[:1]
    return PatientTrajectories(
        incidence=values,
        first_days=np.full(values.shape[:2], np.inf),
        ends=np.zeros(shape, np.int8) if ends is None else np.asarray(ends, np.int8),
        end_days=np.zeros(shape),
        lengths=np.zeros(shape, np.int64),
    )


def request(**more: object) -> TrajectoryRequest:
    return TrajectoryRequest(**{"horizon_days": 30.0, "outcomes": (DEATH,), **more})  # type: ignore[arg-type]


def shrunk_error(k: int, n: int) -> float:
    """By hand: two successes and two failures more, nearly (1.96 squared, halved)."""
    shrunk = (k + 1.9207294) / (n + 3.8414588)
    return float(np.sqrt(shrunk * (1 - shrunk) / n))


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 20), (20, 20), (7, 20), (1, 1000), (500, 1000)])
def test_shares_of_monte_carlo(k: int, n: int) -> None:
    values = np.zeros((n, 1, 1))
    values[:k] = 1
    (estimate,) = estimate_outcomes(trajectories(values), request(num=n))
    assert estimate.probability == k / n
    assert estimate.standard_error == pytest.approx(shrunk_error(k, n), rel=1e-6)
    assert estimate.standard_error > 0
    assert estimate.effective_number == n == estimate.num
    assert estimate.incidence == (estimate.probability,)
    assert estimate.grid_days == (30.0,) == (estimate.horizon_days,)


def test_nothing_of_twenty_may_still_be_fourteen_percent() -> None:
    (estimate,) = estimate_outcomes(trajectories(np.zeros((20, 1, 1))), request(num=20))
    # The rule of three: 3 / 20 is the upper bound of 95 %.
    assert estimate.probability + 1.96 * estimate.standard_error > 0.1


def test_the_error_of_a_sample_takes_in_two_more() -> None:
    values = np.array([0.01, 0.05, 0.02, 0.04])  # mean 0.03: two more at 0 and 0.06
    (estimate,) = estimate_outcomes(trajectories(values[:, None, None]), request(estimator="scope", num=4))
    squares = ((np.append(values, [0.0, 0.06]) - 0.03) ** 2).sum()
    assert estimate.probability == pytest.approx(0.03)
    assert estimate.standard_error == pytest.approx(np.sqrt(squares / 3 / 4), rel=1e-9)
    near_one = standard_errors(1 - values[:, None], is_binary=False)
    assert near_one[0] == pytest.approx(estimate.standard_error, rel=1e-9)


def test_the_error_of_many_is_that_of_the_sample() -> None:
    values = np.random.default_rng(0).beta(1, 30, 20_000)
    (error,) = standard_errors(values[:, None], is_binary=False)
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)), rel=2e-2)


@pytest.mark.parametrize("n", [1, 5])
def test_trajectories_that_agree_say_no_more_than_monte_carlo(n: int) -> None:
    (estimate,) = estimate_outcomes(trajectories(np.full((n, 1, 1), 0.25)), request(estimator="reach", num=n))
    shrunk = (0.25 * n + 1.9207294) / (n + 3.8414588)
    assert estimate.standard_error == pytest.approx(np.sqrt(shrunk * (1 - shrunk) / n), rel=1e-6)
    assert estimate.effective_number == pytest.approx(n)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 20, 5000])
def test_the_effective_number_turns_an_error_back_into_a_number(p: float, n: int) -> None:
    shrunk = (p * n + 1.9207294) / (n + 3.8414588)
    error = float(np.sqrt(shrunk * (1 - shrunk) / n))
    assert effective_number(p, error) == pytest.approx(n, rel=1e-6)


def test_the_effective_number_of_many_is_the_variance_over_the_squared_error() -> None:
    assert effective_number(0.2, 0.001) == pytest.approx(0.16 / 1e-6, rel=1e-3)


def test_a_grid_of_days_is_a_cumulative_incidence_with_errors() -> None:
    values = np.zeros((10, 1, 3))
    values[:2, 0, 0], values[:3, 0, 1], values[:5, 0, 2] = 1, 1, 1
    (estimate,) = estimate_outcomes(trajectories(values), request(num=10, grid_days=(1.0, 7.0, 30.0)))
    assert estimate.incidence == (0.2, 0.3, 0.5)
    assert estimate.probability == 0.5
    assert estimate.incidence_errors == pytest.approx([shrunk_error(k, 10) for k in (2, 3, 5)], rel=1e-6)


def test_a_complement_has_no_incidence_before_the_horizon() -> None:
    values = np.ones((4, 2, 3))
    asked = request(num=4, outcomes=(DEATH, STAYS), grid_days=(1.0, 7.0, 30.0))
    whole, complement = estimate_outcomes(trajectories(values), asked)
    assert len(whole.incidence) == 3
    assert complement.grid_days == (30.0,)
    assert complement.incidence == (1.0,)


def test_what_scope_adds_up_beyond_one_is_one() -> None:
    (estimate,) = estimate_outcomes(trajectories([[[1.3]], [[0.9]]]), request(estimator="scope", num=2))
    assert estimate.probability == 1.0
    assert estimate.standard_error >= np.std([1.3, 0.9]) / np.sqrt(2)


def test_what_was_cut_is_told_by_pool() -> None:
    values = np.zeros((4, 2, 1))
    asked = request(num=4, outcomes=(DEATH, OutcomeTokens("b", np.array([5]))), estimator="reach")
    horizon, cut = int(TrajectoryEnd.HORIZON), int(TrajectoryEnd.LENGTH)
    ends = [[horizon, cut], [horizon, cut], [cut, cut], [horizon, horizon]]
    assert [each.cut for each in estimate_outcomes(trajectories(values, ends), asked)] == [0.25, 0.75]


def test_an_estimate_is_ready_for_json() -> None:
    (estimate,) = estimate_outcomes(trajectories(np.zeros((20, 1, 1))), request(num=20))
    told = estimate.to_dict()
    assert told["grid_days"] == [30.0]
    assert OutcomeEstimate(**told).name == "death"


@pytest.mark.parametrize("p", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("n", [20, 60])
def test_intervals_of_monte_carlo_cover(p: float, n: int) -> None:
    counts = np.random.default_rng(1).binomial(n, p, 4000)
    errors = np.array([shrunk_error(k, n) for k in range(n + 1)])[counts]
    ours = standard_errors((np.arange(n)[:, None] < counts).astype(float), is_binary=True)
    np.testing.assert_allclose(ours, errors, rtol=1e-6)
    covered = (np.abs(counts / n - p) <= 1.96 * ours).mean()
    # A share of n has few values: the rate jumps, to the safe side where the outcome is rare.
    assert 0.92 <= covered <= (1.0 if n * p < 5 else 0.975)


@pytest.mark.parametrize(("n", "least"), [(3, 0.85), (5, 0.87), (20, 0.9), (60, 0.92), (200, 0.935)])
def test_intervals_of_a_skewed_sample_cover(n: int, least: float) -> None:
    """Of a rare outcome, whose numbers are exponential: most near 0. Without the two more, 3 would cover 73 %."""
    values = np.random.default_rng(2).exponential(0.004, (n, 4000))
    covered = (np.abs(values.mean(0) - 0.004) <= 1.96 * standard_errors(values, is_binary=False)).mean()
    assert least <= covered <= 0.97


@pytest.mark.parametrize("n", [3, 5, 20, 60])
def test_intervals_of_an_even_sample_cover(n: int) -> None:
    values = np.random.default_rng(2).beta(2, 3, (n, 4000))
    covered = (np.abs(values.mean(0) - 0.4) <= 1.96 * standard_errors(values, is_binary=False)).mean()
    assert 0.94 <= covered <= (0.99 if n < 20 else 0.975)


class Coins:
    """Trajectories of patients who die with the probability of their key, in hundredths; counts what was drawn."""

    def __init__(self) -> None:
        self.drawn: dict[int, list[int]] = {}

    def __call__(self, prompts: Sequence[ForecastPrompt], asked: TrajectoryRequest) -> Iterator[PatientTrajectories]:
        for prompt in prompts:
            numbers = range(asked.first, asked.first + asked.num)
            self.drawn.setdefault(prompt.key, []).extend(numbers)
            values = [np.random.default_rng([prompt.key, k]).random() < prompt.key / 100 for k in numbers]
            yield trajectories(np.array(values, float)[:, None, None])


def prompts(*keys: int) -> list[ForecastPrompt]:
    return [ForecastPrompt({"input_ids": torch.zeros(1, 1, dtype=torch.int64)}, 0.0, key) for key in keys]


def test_rounds_double_for_those_who_need_more() -> None:
    coins = Coins()
    answers = estimate_to_error(coins, prompts(1, 50), request(num=16), standard_error=0.06, max_num=1000)
    numbers = {key: len(drawn) for key, drawn in coins.drawn.items()}
    for (estimate,), key in zip(answers, (1, 50), strict=True):
        assert coins.drawn[key] == list(range(numbers[key]))  # each once
        assert estimate.num == numbers[key]
        assert estimate.standard_error <= 0.06
    assert numbers[50] == 128  # 0.5 / sqrt(n) <= 0.06 from n = 70 on, so 16, 32, 64, 128
    assert numbers[1] <= 32


def test_an_answer_does_not_depend_on_the_others() -> None:
    alone = [estimate_to_error(Coins(), prompts(key), request(num=4), standard_error=0.1)[0] for key in (5, 30, 60)]
    assert estimate_to_error(Coins(), prompts(5, 30, 60), request(num=4), standard_error=0.1) == alone


@pytest.mark.parametrize(("estimator", "expected"), [("reach", 128), ("scope", 128), ("monte_carlo", 16)])
def test_a_few_that_agree_are_not_taken_for_certain(estimator: str, expected: int) -> None:
    """All trajectories say nearly 0: the turn that matters is in none of them."""

    def draw(prompts: object, step: TrajectoryRequest) -> Iterator[PatientTrajectories]:
        for _ in prompts:  # type: ignore[attr-defined]
            yield trajectories(np.full((step.num, 1, 1), 1e-4) * (1 + 1e-3 * np.arange(step.num)[:, None, None]))

    few = request(num=16, estimator=estimator)
    ((estimate,),) = estimate_to_error(draw, prompts(1), few, standard_error=0.1)
    assert estimate.num == expected


def test_the_largest_number_is_kept_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    coins, said = Coins(), []
    monkeypatch.setattr("ehrseq.modeling.outcome_estimates.logger.warning", said.append)
    ((estimate,), (other,)) = estimate_to_error(coins, prompts(50, 1), request(num=10), standard_error=0.04, max_num=70)
    assert estimate.num == 70
    assert estimate.standard_error > 0.04
    assert other.num <= 70
    assert said == [
        "1 of 2 patients have a standard error above 0.04 after 70 trajectories; allow more by max_num, or a larger "
        "error."
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"standard_error": 0.0}, "standard_error got 0.0; expected a number above 0 and below 0.5"),
        ({"standard_error": 0.7}, "standard_error got 0.7"),
        ({"standard_error": float("nan")}, "standard_error got nan"),
        ({"standard_error": "small"}, "standard_error got 'small'"),
        ({"max_num": 8}, "max_num=8 is less than the first round's num=32"),
        ({"request": request(outcomes=())}, "names no outcome"),
    ],
)
def test_errors_that_cannot_be_waited_for(change: dict[str, object], message: str) -> None:
    asked = {"request": request(), "standard_error": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        estimate_to_error(Coins(), prompts(1), **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("incidence", "message"),
    [
        (np.zeros((0, 1, 1)), "no trajectory"),
        (np.zeros((5, 2, 1)), r"is \[5, 2, 1\]; expected \[n, 1, 1\]"),
        (np.zeros((5, 1)), r"is \[5, 1\]"),
        (np.full((5, 1, 1), np.nan), "NaN or infinite"),
    ],
)
def test_trajectories_that_say_nothing(incidence: np.ndarray, message: str) -> None:
    found = trajectories(np.zeros((1, 1, 1)))
    found.incidence = incidence
    with pytest.raises(ValueError, match=message):
        estimate_outcomes(found, request())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "guess"}, r"estimator got 'guess'; expected one of \['monte_carlo', 'scope', 'reach'\]"),
        ({"num": 0}, "num got 0; expected at least 1"),
        ({"num": 2.5}, "num got 2.5"),
        ({"num": True}, "num got True"),
        ({"outcomes": ()}, "no outcome is asked for"),
        ({"outcomes": (DEATH, DEATH)}, "'death' stands twice"),
        ({"outcomes": (OutcomeTokens("none", np.array([], dtype=np.int64)),)}, "'none' has no token"),
        ({"outcomes": (STAYS,), "grid_days": (1.0, 30.0)}, "no incidence before it"),
    ],
)
def test_what_no_estimator_answers(change: dict[str, object], message: str) -> None:
    asked = request(**change)
    with pytest.raises(ValueError, match=message):
        check_outcomes(asked.outcomes, asked)
    check_outcomes((DEATH,), request(num=1))
