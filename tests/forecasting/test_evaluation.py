"""Forecasts of next events against counting by hand, with a model whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ehrseq.forecasting.evaluation import evaluate_forecast, token_frequencies
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
    ],
)
def test_bad_input_is_told(change, message):
    given = {"model": fixed(), "rows": [row()], "collator": pad, "frequencies": FREQUENCIES, "progress": False}
    with pytest.raises(ValueError, match=message):
        evaluate_forecast(**{**given, **change})
