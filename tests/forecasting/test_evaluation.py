"""Forecasts of next events against counting by hand, with a model whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ehrseq.forecasting.evaluation import PRIOR, code_groups, evaluate_forecast, token_frequencies
from ehrseq.forecasting.forecast_times import pit_cumulative
from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS

# Ids: 0 pad, 1 CLS, 2 VS, 3 VE, 4 REG, 5.. interval tokens, then events.
INTERVALS = list(INTERVAL_DAYS)
SPECIALS = {"[VS]": 2, "[VE]": 3, "[REG]": 4, **{name: 5 + k for k, name in enumerate(INTERVALS)}}
FIRST = 5 + len(INTERVALS)
A, B, C = FIRST, FIRST + 1, FIRST + 2
VOCABULARY = FIRST + 15
LAB, DIAGNOSIS, INTERVAL = 5, 9, 4


class Fixed(torch.nn.Module):
    """Answers every position with the logits it was made with."""

    def __init__(self, logits):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCABULARY, special_token_ids=SPECIALS)
        self.answer = logits
        self.device = torch.device("cpu")

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.answer.expand(*input_ids.shape, -1))


def row():
    """Two visits, ten days apart: A A B | B A, B a diagnosis."""
    ids = [1, 2, A, A, B, 3, 4, SPECIALS["[W_1]"], 2, B, A, 3, 4]
    types = [1, 2, LAB, LAB, DIAGNOSIS, 3, 8, INTERVAL, 2, DIAGNOSIS, LAB, 3, 8]
    times = [0, 0, 0, 0, 0, 0, 0, 0] + [10 / 7] * 5
    return {
        "input_ids": np.array(ids),
        "token_type_ids": np.array(types),
        "times": np.array(times, np.float32),
        "visit_orders": np.array([0] + [1] * 7 + [2] * 5),
    }


def pad(rows):
    lengths = [len(each["input_ids"]) for each in rows]
    longest = max(lengths)

    def padded(values):
        return torch.nn.functional.pad(torch.as_tensor(values), (0, longest - len(values)))

    batch = {name: torch.stack([padded(each[name]) for each in rows]) for name in rows[0]}
    batch["attention_mask"] = torch.stack([(torch.arange(longest) < length).long() for length in lengths])
    return batch


def fixed(**shares):
    logits = torch.full((VOCABULARY,), -10.0)
    for token, value in shares.items():
        logits[int(token[1:])] = value
    return Fixed(logits)


FREQUENCIES = np.bincount([C] * 5 + [A] * 2 + [B], minlength=VOCABULARY)


def test_events_are_counted_by_kind():
    report = evaluate_forecast(fixed(**{f"t{A}": 0.0}), [row()], pad, FREQUENCIES, progress=False)
    assert {kind: found.events for kind, found in report.kinds.items()} == {"all": 5, "lab": 3, "diagnosis": 2}
    labs, diagnoses = report.kinds["lab"], report.kinds["diagnosis"]
    assert (labs.recall[1], diagnoses.recall[1]) == (1.0, 0.0)  # A is its first answer
    others = np.log1p(np.exp(-10) * (VOCABULARY - 1))
    assert labs.nll == pytest.approx(others, rel=1e-4)
    assert diagnoses.nll == pytest.approx(10 + others, rel=1e-4)
    share = (2 + 0.5) / (8 + 0.5 * VOCABULARY)
    assert labs.nll_of_frequencies == pytest.approx(-np.log(share))


def test_counting_forecasts_know_the_past_alone():
    report = evaluate_forecast(fixed(**{f"t{A}": 0.0}), [row()], pad, FREQUENCIES, progress=False)
    found = report.kinds["all"]
    # Asked: A (nothing seen: C leads), A (A), B (A leads), B (A twice, B once: A leads), A (A and B twice each; A is
    # the more frequent in training).
    assert found.recall_most_frequent[1] == pytest.approx(2 / 5)
    # The visit before: none for the first three (C leads), then A A B: A leads.
    assert found.recall_last_visit[1] == pytest.approx(1 / 5)
    assert found.recall_most_frequent[10] == found.recall_last_visit[10] == 1.0


def test_the_time_of_the_next_visit():
    model = fixed(**{f"t{SPECIALS['[W_0]']}": 0.0, f"t{SPECIALS['[W_2]']}": 0.0})
    report = evaluate_forecast(model, [row()], pad, FREQUENCIES, training_interval=12.0, progress=False)
    assert report.intervals == 1
    expected = (INTERVAL_DAYS["[W_0]"] + INTERVAL_DAYS["[W_2]"]) / 2  # but for e^-10 of the others
    assert report.days_off["model"] == pytest.approx(abs(expected - 10), abs=0.2)
    assert report.days_off["mean so far"] == report.days_off["last"] == pytest.approx(2.0, abs=1e-5)


def three_visits(counts=((A, B), (A, C), (B, A, C))):
    """Visits of laboratory values, thirty days apart."""
    ids, types, times, orders = [1], [1], [0.0], [0]
    for visit, tokens in enumerate(counts):
        mark = [SPECIALS["[M_1]"]] if visit else []
        now = 30 * visit / 7
        ids += [*mark, 2, *tokens, 3, 4]
        types += [INTERVAL] * len(mark) + [2, *[LAB] * len(tokens), 3, 8]
        times += [0.0] * len(mark) + [now] * (len(tokens) + 3)
        orders += [visit] * len(mark) + [visit + 1] * (len(tokens) + 3)
    return {
        "input_ids": np.array(ids),
        "token_type_ids": np.array(types),
        "times": np.array(times, np.float32),
        "visit_orders": np.array(orders),
    }


def test_first_occurrences_are_told_from_repeats():
    """A B | A C | B A C: the first A, B and C are new, the other four are repeats."""
    model = fixed(**{f"t{A}": 0.0})
    report = evaluate_forecast(model, [three_visits()], pad, FREQUENCIES, progress=False)
    assert (report.first["all"].events, report.repeats["all"].events) == (3, 4)
    assert report.kinds["all"].events == 7
    # The model says A: right once of three new ones (the first A), twice of four repeats.
    assert report.first["lab"].recall[1] == pytest.approx(1 / 3)
    assert report.repeats["lab"].recall[1] == pytest.approx(2 / 4)
    # "Last visit" lists nothing in the first visit (C leads in training), then A, B (A is the more frequent in
    # training), then A, C (C leads in training): new A, B: no, no; C: no. Repeats A: yes; B: no; A: no; C: yes.
    assert report.first["lab"].recall_last_visit[1] == 0.0
    assert report.repeats["lab"].recall_last_visit[1] == pytest.approx(2 / 4)
    # "Most frequent" lists C, A | A, A | A, A, A first (of equal counts the more frequent in training).
    assert report.first["lab"].recall_most_frequent[1] == 0.0
    assert report.repeats["lab"].recall_most_frequent[1] == pytest.approx(2 / 4)


def test_probabilities_of_counts_by_hand():
    report = evaluate_forecast(fixed(), [three_visits(((A, B), (A,)))], pad, FREQUENCIES, progress=False)
    smoothed = (FREQUENCIES + 0.5) / (8 + 0.5 * VOCABULARY)
    new_a, new_b = smoothed[A], PRIOR * smoothed[B] / (1 + PRIOR)
    repeated = (1 + PRIOR * smoothed[A]) / (2 + PRIOR)  # A, B have been seen, in all visits and in the last one
    assert report.first["all"].nll_most_frequent == pytest.approx(-np.log([new_a, new_b]).mean())
    assert report.first["all"].nll_last_visit == pytest.approx(-np.log([new_a, smoothed[B]]).mean())
    assert report.repeats["all"].nll_most_frequent == pytest.approx(-np.log(repeated))
    assert report.repeats["all"].nll_last_visit == pytest.approx(-np.log(repeated))


def test_values_of_one_code_are_one_code():
    """B is another value of A: it is no first occurrence after an A."""
    groups = np.arange(VOCABULARY)
    groups[B] = A
    report = evaluate_forecast(fixed(), [three_visits()], pad, FREQUENCIES, groups=groups, progress=False)
    assert (report.first["all"].events, report.repeats["all"].events) == (2, 5)


def test_earlier_rows_of_a_patient_are_known():
    """A record in two rows, and another patient: what the first row held is no first occurrence in the second."""
    rows = [three_visits(((A, B),)), three_visits(((B, C),)), three_visits(((A,),))]
    apart = evaluate_forecast(fixed(), rows, pad, FREQUENCIES, progress=False)
    assert apart.first["all"].events == 5
    together = evaluate_forecast(fixed(), rows, pad, FREQUENCIES, subjects=[3, 3, 9], progress=False)
    assert (together.first["all"].events, together.repeats["all"].events) == (4, 1)
    # For the second row's B, "most frequent" knows the first row: A before B.
    assert together.repeats["all"].recall_most_frequent == {1: 0.0, 10: 1.0}


def test_intervals_are_over_patients():
    """Of two patients, one always right and one never, resamples reach from 0 to 1; of one there is no spread."""
    rows = [three_visits(((A, A, A, A),)), three_visits(((B, B),))]
    forecast = evaluate_forecast(fixed(**{f"t{A}": 0.0}), rows, pad, FREQUENCIES, progress=False).kinds["all"]
    name = "recall at 1: model"
    assert (forecast.low[name], forecast.value(name), forecast.high[name]) == pytest.approx((0, 4 / 6, 1))
    alone = evaluate_forecast(fixed(**{f"t{A}": 0.0}), rows[:1], pad, FREQUENCIES, progress=False).kinds["all"]
    assert alone.low[name] == alone.high[name] == 1.0
    none = evaluate_forecast(fixed(), rows, pad, FREQUENCIES, num_resamples=0, progress=False).kinds["all"]
    assert none.low == none.high == {}


def test_values_of_a_vocabulary_are_grouped_by_code():
    from ehrseq.data.simulate.cohort import simulate
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    tokenizer = EhrTokenizer.train(simulate(8, seed=0, progress=False).events(), tasks=[])
    groups = code_groups(tokenizer.vocabulary, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    potassium = {groups[k] for k, name in enumerate(names) if name.startswith("LAB//LOINC//2823-3")}
    assert len(potassium) == 1
    diagnoses = [groups[k] for k, name in enumerate(names) if name.startswith("DIAGNOSIS//")]
    assert len(set(diagnoses)) == len(diagnoses)


def test_the_distribution_of_the_next_visit():
    """Half of the mass on [W_0], half on [W_2]: ten days are between them, and the median is where W_0 ends."""
    model = fixed(**{f"t{SPECIALS['[W_0]']}": 30.0, f"t{SPECIALS['[W_2]']}": 30.0})
    row_of = three_visits(((A,), (A,)))
    report = evaluate_forecast(model, [row_of], pad, FREQUENCIES, progress=False)
    gaps = report.visit_gaps
    assert report.days_off == gaps.off
    assert gaps.off["model, median"] == pytest.approx(30 - 7, abs=1e-3)
    assert gaps.off["model"] == pytest.approx(30 - (INTERVAL_DAYS["[W_0]"] + INTERVAL_DAYS["[W_2]"]) / 2, abs=1e-3)
    assert gaps.pit == pytest.approx([0.0] * 19 + [1.0])  # longer than all that was expected
    assert gaps.pit_distance == pytest.approx(0.95)


def test_the_pit_within_a_span_is_uniform():
    """All mass on the month that comes: a gap of 30 + 30 q days has the PIT q."""
    model = fixed(**{f"t{SPECIALS['[M_1]']}": 40.0})
    rows = []
    for k in range(20):
        row_of = three_visits(((A,), (A,)))
        row_of["times"] = np.where(row_of["times"] > 0, (30 + 30 * (k + 0.5) / 20) / 7, 0).astype(np.float32)
        rows.append(row_of)
    report = evaluate_forecast(model, rows, pad, FREQUENCIES, progress=False)
    assert report.visit_gaps.pit == pytest.approx([0.05] * 20, abs=1e-6)
    assert report.visit_gaps.pit_distance == pytest.approx(0, abs=1e-6)
    assert report.visit_gaps.off["model, median"] == pytest.approx(7.5, abs=1e-4)  # means of |30 (q - 1/2)|


def test_the_pit_spreads_a_step_over_its_height():
    # A step from 0 to 0.4 for half of the gaps, and values without a step at 0.9 for the others.
    cumulative = pit_cumulative([0.0, 0.9], [0.4, 0.9])
    edges = np.arange(1, 21) / 20
    assert cumulative == pytest.approx((np.minimum(edges / 0.4, 1) + (edges >= 0.9 - 1e-9)) / 2)
    # Of a right forecast of a coin, heads and tails as often as foretold, the PIT is uniform.
    assert pit_cumulative([0.0] * 3 + [0.3] * 7, [0.3] * 3 + [1.0] * 7) == pytest.approx(edges)
    assert np.isnan(pit_cumulative([], [])).all()


def test_batches_and_padding_change_nothing():
    torch.manual_seed(0)
    model = Fixed(torch.randn(VOCABULARY))
    short = {name: values[:6] for name, values in row().items()}
    rows = [row(), short, row(), short]
    one = evaluate_forecast(model, rows, pad, FREQUENCIES, batch_size=1, progress=False).to_dict()
    all_of_them = evaluate_forecast(model, rows, pad, FREQUENCIES, batch_size=4, progress=False).to_dict()
    for kind, found in one["kinds"].items():
        for name, value in found.items():
            assert all_of_them["kinds"][kind][name] == pytest.approx(value)


def test_a_trained_model_is_asked_on_real_rows(tmp_path):
    from ehrseq.batches.collation import DataCollatorForNextToken
    from ehrseq.data.simulate.cohort import simulate
    from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
    from ehrseq.training.trainer import model_config

    events = simulate(8, seed=0, progress=False).events()
    tokenizer = EhrTokenizer.train(events, tasks=[])
    rows = tokenizer.encode_histories(events).windows(64)
    config = model_config(tokenizer, tasks=[], hidden_size=16, num_hidden_layers=1, max_position_embeddings=64)
    model = EhrMambaForCausalLM(config)
    counts = token_frequencies(rows, len(tokenizer))
    assert counts.sum() == sum(len(rows[i]["input_ids"]) for i in range(len(rows)))
    report = evaluate_forecast(model, rows, DataCollatorForNextToken(tokenizer), counts, progress=False)
    assert report.kinds["all"].events == sum(found.events for kind, found in report.kinds.items() if kind != "all")
    assert report.kinds["all"].nll > report.kinds["all"].nll_of_frequencies  # it has learnt nothing
    assert report.intervals > 0
    assert "| lab |" in report.to_markdown()
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "no rows"),
        ({"frequencies": np.ones(3)}, r"frequencies got shape \(3,\)"),
        ({"frequencies": np.zeros(VOCABULARY)}, "with the sum 0"),
        ({"subjects": [1, 2]}, r"subjects got shape \(2,\)"),
        ({"groups": [1, 2]}, r"groups got shape \(2,\)"),
        ({"rows": [row()] * 3, "subjects": [1, 2, 1]}, "subjects are not in order"),
    ],
)
def test_bad_input_is_told(change, message):
    given = {"model": fixed(), "rows": [row()], "collator": pad, "frequencies": FREQUENCIES, "progress": False}
    with pytest.raises(ValueError, match=message):
        evaluate_forecast(**{**given, **change})
