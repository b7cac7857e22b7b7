"""A classifier asked after each prefix of a row: against whole rows, one at a time."""

import pytest
import torch

from ehrseq.modeling import ehrmamba_branches, risk_prefixes
from ehrseq.modeling.configuration_cehrbert import CehrBertConfig
from ehrseq.modeling.configuration_ehr_bigbird import EhrBigBirdConfig
from ehrseq.modeling.configuration_ehr_lstm import EhrLstmConfig
from ehrseq.modeling.modeling_cehrbert import CehrBertForSequenceClassification
from ehrseq.modeling.modeling_ehr_bigbird import EhrBigBirdForSequenceClassification
from ehrseq.modeling.modeling_ehr_lstm import EhrLstmForSequenceClassification
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForSequenceClassification
from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification
from ehrseq.modeling.risk_tasks import RiskScoresMixin
from tests.modeling import hymate_stays
from tests.modeling.test_modeling_ehrmamba import random_patient, tiny_config
from tests.modeling.test_modeling_transformers import FIELDS

FAMILIES = {
    "ehrmamba": lambda: EhrMambaForSequenceClassification(tiny_config()),
    "ehr_lstm": lambda: EhrLstmForSequenceClassification(
        EhrLstmConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, time_embeddings_size=6, max_num_visits=16)
    ),
    "cehrbert": lambda: CehrBertForSequenceClassification(CehrBertConfig(**FIELDS)),
    "ehr_bigbird": lambda: EhrBigBirdForSequenceClassification(EhrBigBirdConfig(**FIELDS, block_size=4)),
}


def away_from_the_start(model, dtype=torch.float64):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().to(dtype)


def row_and_tails(length, ends, seed=3):
    """A row, its prefixes, and tails of one or two tokens that differ from it."""
    row = {name: channel[None] for name, channel in random_patient(length, seed).items()}
    others = random_patient(2 * len(ends), seed + 1)
    tails = {name: channel.view(len(ends), 2) for name, channel in others.items()}
    lengths = torch.tensor([1 + (k % 3 == 1) for k in range(len(ends))])
    return row, torch.tensor(ends), tails, lengths


def one_by_one(model, row, ends, tails, lengths):
    """Each prefix as a row of its own."""
    logits = []
    for k, end in enumerate(ends.tolist()):
        made = {name: torch.cat([row[name][:, :end], tails[name][k : k + 1, : lengths[k]]], 1) for name in row}
        logits.append(model(**made).logits)
    return torch.cat(logits)


CUTS = {
    "every token": list(range(1, 41)),
    "far apart": [2, 14, 29, 40],
    "runs": [1, 1, 2, 9, 10, 10, 11, 30, 38, 38],
    "one": [17],
    "the whole row again and again": [40, 40, 40],
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefixes_answer_as_rows_of_their_own(family, cuts):
    model = away_from_the_start(FAMILIES[family]())
    asked = row_and_tails(40, CUTS[cuts])
    torch.testing.assert_close(model.prefix_logits(*asked), one_by_one(model, *asked), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "naive", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_every_backend_gives_the_same_branches(monkeypatch, backend, dtype):
    model = away_from_the_start(FAMILIES["ehrmamba"](), dtype)
    asked = row_and_tails(40, CUTS["runs"])
    expected = one_by_one(model, *asked)
    monkeypatch.setenv("EHRSEQ_BACKEND", backend)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(model.prefix_logits(*asked), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
@pytest.mark.parametrize("branches", [1, 3, 100])
@pytest.mark.parametrize("again", [1, 4, 50])
@torch.no_grad()
def test_chunks_change_nothing(monkeypatch, tokens, branches, again):
    model = away_from_the_start(FAMILIES["ehrmamba"]())
    asked = row_and_tails(40, CUTS["runs"])
    expected = one_by_one(model, *asked)
    monkeypatch.setattr(ehrmamba_branches, "CHUNK_TOKENS", tokens)
    monkeypatch.setattr(ehrmamba_branches, "CHUNK_BRANCHES", branches)
    monkeypatch.setattr(ehrmamba_branches, "STEPS_AGAIN", again)
    torch.testing.assert_close(model.prefix_logits(*asked), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{"residual_in_fp32": False}, {"conv_kernel": 2}, {"use_conv_bias": False}])
@torch.no_grad()
def test_other_blocks(changes):
    model = away_from_the_start(EhrMambaForSequenceClassification(tiny_config(**changes)))
    asked = row_and_tails(23, list(range(1, 24)))
    torch.testing.assert_close(model.prefix_logits(*asked), one_by_one(model, *asked), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    model = away_from_the_start(FAMILIES["ehrmamba"](), dtype)
    asked = row_and_tails(40, CUTS["runs"])
    logits = model.prefix_logits(*asked)
    assert logits.dtype == torch.float32
    expected = RiskScoresMixin.prefix_logits(model, *asked)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@torch.no_grad()
def test_whole_rows_go_in_passes_of_bounded_size(monkeypatch):
    model = away_from_the_start(FAMILIES["cehrbert"]())
    asked = row_and_tails(40, CUTS["every token"])
    expected = one_by_one(model, *asked)
    monkeypatch.setattr(risk_prefixes, "TOKENS", 90)
    sizes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **rows: sizes.append(rows["input_ids"].numel()) or forward(**rows))
    torch.testing.assert_close(model.prefix_logits(*asked), expected, rtol=1e-9, atol=1e-9)
    assert max(sizes) <= 90


@torch.no_grad()
def test_a_stay_is_read_triplet_by_triplet():
    model = away_from_the_start(HyMaTEForSequenceClassification(hymate_stays.tiny_config()))
    stay = hymate_stays.collate(hymate_stays.random_stays((9,), hymate_stays.STATIC))
    stay = {name: value.double() if value.is_floating_point() else value for name, value in stay.items()}
    ends = torch.arange(1, 10)
    expected = []
    for end in ends.tolist():
        rows = {name: value if name == "static_values" else value[:, :end] for name, value in stay.items()}
        expected.append(model(**rows).logits)
    logits = model.prefix_logits(stay, ends, {}, torch.zeros(9, dtype=torch.int64))
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-9, atol=1e-9)


def test_no_gradients():
    model = away_from_the_start(FAMILIES["ehrmamba"]())
    assert not model.prefix_logits(*row_and_tails(9, [3, 9])).requires_grad
    assert not RiskScoresMixin.prefix_logits(model, *row_and_tails(9, [3, 9])).requires_grad


BAD = {
    "two rows": ({"rows": 2}, "prefixes are of one row, got 2"),
    "padding": ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "without padding and packing"),
    "packed": ({"segment_ids": torch.ones(1, 9, dtype=torch.int64)}, "without padding and packing"),
    "no prefix": ({"ends": torch.tensor([], dtype=torch.int64)}, "a flat list of numbers from 1 to 9"),
    "an empty prefix": ({"ends": torch.tensor([0, 3])}, r"numbers from 1 to 9, got \[0, 3\]"),
    "beyond the row": ({"ends": torch.tensor([3, 10])}, r"numbers from 1 to 9, got \[3, 10\]"),
    "descending": ({"ends": torch.tensor([3, 2])}, "ends must ascend"),
    "tails of others": ({"ends": torch.tensor([3, 4, 5])}, r"must be of 3 prefixes, \[k, 2\]"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("family", ["ehrmamba", "cehrbert"])
def test_what_are_no_prefixes_is_refused(family, case):
    changes, message = BAD[case]
    row, ends, tails, lengths = row_and_tails(9, [3, 9])
    changes = dict(changes)
    ends = changes.pop("ends", ends)
    row = {name: channel.expand(changes.get("rows", 1), -1) for name, channel in row.items()}
    row |= {name: value for name, value in changes.items() if name != "rows"}
    with pytest.raises(ValueError, match=message):
        FAMILIES[family]().prefix_logits(row, ends, tails, lengths)
