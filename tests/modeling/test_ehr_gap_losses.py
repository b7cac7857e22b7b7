"""What a causal model learns beside the next token: gaps and silences, against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch

from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.ehr_gap_losses import event_gaps, gap_loss, silence_loss
from ehrseq.modeling.ehr_intervals import INTERVAL_SPANS
from ehrseq.modeling.ehr_time_head import EhrTimeHead
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from tests.modeling.common import assert_close, assert_same_gradients, collate, gradients, pack

CLS, VS, VE, REG = 1, 2, 3, 4
SPECIALS = {"[VS]": VS, "[VE]": VE, "[REG]": REG, **{token: 5 + k for k, token in enumerate(INTERVAL_SPANS)}}
W0, W1, LT = SPECIALS["[W_0]"], SPECIALS["[W_1]"], SPECIALS["[LT]"]
A, B, C = 23, 24, 25
EDGES = [0.0, 1.0, 3.0, 7.0, 14.0]
DAY = 1 / 7  # of a week


def tiny_config(**changes):
    sizes = {"vocab_size": 26, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2, "max_num_visits": 8}
    off = {"hidden_dropout_prob": 0.0, "special_token_ids": SPECIALS, "time_edges": EDGES}
    return EhrMambaConfig(**(sizes | off | changes))


def tiny_model(**changes):
    torch.manual_seed(0)
    return EhrMambaForCausalLM(tiny_config(**changes))


def record(*tokens, silent=0.0):
    """A sequence of (id, days, segment); no times outside visits."""
    ids, days, segments = zip(*tokens, strict=True)
    return {
        "input_ids": torch.tensor(ids),
        "times": torch.tensor(days, dtype=torch.float32) * DAY,
        "visit_segments": torch.tensor(segments),
        "silent_days": torch.tensor([0.0] * (len(ids) - 1) + [silent]),
    }


RECORDS = [
    record(
        *((CLS, 0, 0), (B, 0, 0), (VS, 0, 1), (A, 0, 1), (B, 2, 1), (VE, 2.5, 1), (REG, 2.5, 1)),
        *((W1, 0, 0), (VS, 12, 2), (C, 12, 2), (VE, 13.5, 2), (REG, 13.5, 2)),
        silent=400.0,
    ),
    record((CLS, 0, 0), (VS, 0, 1), (A, 0.5, 1)),
    record((CLS, 0, 0), (VS, 0, 1), (C, 0, 1), (VE, 0, 1), (REG, 0, 1), silent=3.0),
]


def gaps_of(batch, **changes):
    labels = batch.get("labels", batch["input_ids"])
    arguments = {"labels": labels, "real": None, "starts": None} | changes
    gaps = event_gaps(tiny_config(), batch["input_ids"], batch["times"], batch["visit_segments"], **arguments)
    columns = (gaps.rows, gaps.positions, gaps.days.round(decimals=4), gaps.low, gaps.high)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def with_labels(batch):
    mask = batch.get("attention_mask", batch["segment_ids"] > 0 if "segment_ids" in batch else None)
    labels = batch["input_ids"].clone()
    return {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}


# -- which gaps there are ----------------------------------------------------------------------------------------------


def test_gaps_of_a_record_by_hand():
    batch = {name: values[None] for name, values in RECORDS[0].items()}
    endless = math.inf
    assert gaps_of(batch) == [
        # not after the first [VS], which may have been put back where a history was cut
        (0, 3, 2.0, 0.0, endless),  # A -> B
        (0, 4, 0.5, 0.0, endless),  # B -> [VE]; [REG] comes with it
        (0, 7, 9.5, 7.0, 14.0),  # at the interval: from the visit's last row to the next [VS]
        (0, 8, 0.0, 0.0, endless),  # [VS] -> C
        (0, 9, 1.5, 0.0, endless),  # C -> [VE]
    ]


def test_tokens_that_are_no_targets_have_no_gap():
    batch = {name: values[None] for name, values in RECORDS[0].items()}
    labels = batch["input_ids"].clone()
    labels[0, [4, 8]] = -100
    assert [gap[1] for gap in gaps_of(batch, labels=labels)] == [4, 8, 9]


def test_what_the_token_says_of_the_day_holds_against_rounded_times():
    for days, expected in ((6.99999, 7.0), (14.00001, 14.0)):
        tokens = ((CLS, 0, 0), (VS, 0, 1), (VE, 0, 1), (REG, 0, 1), (W1, 0, 0), (VS, days, 2))
        gap = gaps_of({name: values[None] for name, values in record(*tokens).items()})[0]
        assert gap[2] == pytest.approx(expected)
        assert 7.0 <= gap[2] <= 14.0


# -- the terms by hand -------------------------------------------------------------------------------------------------


def constant_head(config, probabilities):
    head = EhrTimeHead(config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.out.bias.copy_(torch.tensor(probabilities).log())
    return head


def test_loss_of_gaps_by_hand():
    config = tiny_config()
    head = constant_head(config, [0.1, 0.2, 0.1, 0.2, 0.1, 0.3])  # 0, [0, 1), [1, 3), [3, 7), [7, 14), [14, inf)
    batch = {name: values[None] for name, values in RECORDS[0].items()}
    gaps = event_gaps(
        config, batch["input_ids"], batch["times"], batch["visit_segments"], batch["input_ids"], None, None
    )
    states = torch.randn(5, 8)
    loss = gap_loss(config, head, states, states, gaps)
    # 2 days, 0.5, the only bin of [W_1], 0 exactly, 1.5 days
    assert loss.item() == pytest.approx(-sum(math.log(p) for p in (0.1, 0.2, 1.0, 0.1, 0.1)), rel=1e-6)
    # [M_0] covers [28, 30): a part of the last bin, and of no other
    last = {name: values.clone() for name, values in batch.items()}
    last["input_ids"][0, 7] = SPECIALS["[LT]"]
    gaps = event_gaps(config, last["input_ids"], last["times"], last["visit_segments"], last["input_ids"], None, None)
    assert gaps.days[2] == 366.0
    assert gap_loss(config, head, states, states, gaps).item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_span_over_several_bins_is_normalised_over_them():
    config = tiny_config(time_edges=[0.0, 8.0, 10.0, 20.0])
    head = constant_head(config, [0.1, 0.4, 0.2, 0.2, 0.1])
    batch = {name: values[None] for name, values in RECORDS[0].items()}
    gaps = event_gaps(
        config, batch["input_ids"], batch["times"], batch["visit_segments"], batch["input_ids"], None, None
    )
    keep = slice(2, 3)  # the 9.5 days of [W_1]: [7, 8) is an eighth of 0.4, then 0.2, and [10, 14) of 0.2
    only = type(gaps)(*(getattr(gaps, name)[keep] for name in ("rows", "positions", "days", "low", "high")))
    loss = gap_loss(config, head, torch.randn(1, 8), torch.randn(1, 8), only)
    assert loss.item() == pytest.approx(-math.log(0.2 / (0.4 / 8 + 0.2 + 0.2 * 0.4)), rel=1e-6)


def test_loss_of_silences_by_hand():
    probabilities = torch.full((2, 26), 0.4 / 23)
    probabilities[:, W0], probabilities[:, W1], probabilities[:, LT] = 0.1, 0.2, 0.3
    others = sum(
        probabilities[0, SPECIALS[token]].item() for token in INTERVAL_SPANS if token not in ("[W_0]", "[W_1]")
    )
    loss = silence_loss(tiny_config(), probabilities.log(), torch.tensor([10.5, 366.0 + 181.0]))
    assert loss.item() == pytest.approx(-math.log(0.2 * 0.5 + others) - math.log(0.3 * math.exp(-1)), rel=1e-6)
    # A life of silence still has a finite loss, and says that the interval was the longest.
    assert math.isfinite(silence_loss(tiny_config(), probabilities.log(), torch.tensor([30_000.0, 1.0])).item())


# -- in the model ------------------------------------------------------------------------------------------------------


def losses(model, batch):
    out = model(**with_labels(batch))
    return {name: out[name] for name in ("loss", "token_loss", "time_loss", "silence_loss")}


def expected_losses(model):
    """Each record in a row of its own, weighed by its targets."""
    sums = dict.fromkeys(("token_loss", "time_loss", "silence_loss"), 0.0)
    targets = sum(len(patient["input_ids"]) - 1 for patient in RECORDS)
    for patient in RECORDS:
        parts = losses(model, {name: values[None] for name, values in patient.items()})
        for name in sums:
            sums[name] = sums[name] + parts[name] * (len(patient["input_ids"]) - 1) / targets
    return {**sums, "loss": sum(sums.values())}


@pytest.mark.parametrize("layout", ["right", "left", "long", "packed"])
def test_padding_and_packing_change_nothing(layout):
    model = tiny_model()
    expected = expected_losses(model)
    wanted = gradients(model, expected["loss"])
    if layout == "packed":
        batch = pack(RECORDS)
    else:
        batch = collate(RECORDS, side="left" if layout == "left" else "right", length=20 if layout == "long" else None)
    got = losses(model, batch)
    for name, value in expected.items():
        assert_close(got[name], value, 1e-5, name)
    assert_same_gradients(gradients(model, got["loss"]), wanted, 1e-4)


def test_trainers_number_of_items_divides_every_part():
    model = tiny_model()
    batch = with_labels(collate(RECORDS))
    whole, doubled = model(**batch), model(**batch, num_items_in_batch=34)
    targets = sum(len(patient["input_ids"]) - 1 for patient in RECORDS)
    for name in ("loss", "token_loss", "time_loss", "silence_loss"):
        assert_close(doubled[name], whole[name] * targets / 34, 1e-6, name)


def test_without_head_and_silence_the_loss_is_that_of_tokens_alone():
    model = tiny_model(time_edges=None)
    batch = with_labels(collate(RECORDS))
    silent = batch.pop("silent_days")
    plain = model(**batch)
    assert plain.time_loss is plain.token_loss is plain.silence_loss is None
    assert not [name for name in model.state_dict() if name.startswith("time_head")]
    with_silence = model(**batch, silent_days=silent)
    assert with_silence.time_loss is None
    assert_close(with_silence.token_loss, plain.loss, 1e-6, "token_loss")
    assert with_silence.loss > plain.loss
    nothing = model(**batch, silent_days=torch.zeros_like(silent))
    assert_close(nothing.loss, plain.loss, 1e-7, "loss")


def test_a_model_with_a_head_is_saved_and_one_without_gets_a_new_one(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "with")
    again = EhrMambaForCausalLM.from_pretrained(tmp_path / "with")
    assert again.config.time_edges == EDGES
    for name, values in model.time_head.state_dict().items():
        assert torch.equal(again.time_head.state_dict()[name], values)
    tiny_model(time_edges=None).save_pretrained(tmp_path / "without")
    assert EhrMambaForCausalLM.from_pretrained(tmp_path / "without").time_head is None


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({}, {"silent_days": torch.full((3, 12), -1.0)}, "negative"),
        ({}, {"silent_days": torch.full((3, 12), math.nan)}, "negative, NaN"),
        ({}, {"silent_days": torch.zeros(3)}, r"silent_days has shape \[3\]"),
        ({}, {"silent_days": torch.ones(3, 12)}, r"expected days only at the \[REG\]"),
        ({}, {"times": None}, r"needs \['times'\]"),
        ({}, {"visit_segments": None}, r"needs \['visit_segments'\]"),
        ({"special_token_ids": None}, {}, "update_from_tokenizer"),
        ({"special_token_ids": {"[VS]": 2}}, {}, r"lacks \['\[VE\]'\]"),
    ],
)
def test_bad_input(changes, inputs, message):
    batch = with_labels(collate(RECORDS)) | inputs
    with pytest.raises(ValueError, match=message):
        tiny_model(**changes)(**batch)


# -- what is learnt ----------------------------------------------------------------------------------------------------


def planted_world():
    """A third comes back after 10 days, a third after 100, a third never; the data end after 200 days."""
    seen = [(CLS, 0, 0), (VS, 0, 1), (A, 0, 1), (VE, 0, 1), (REG, 0, 1)]
    m3 = SPECIALS["[M_3]"]
    return [
        record(*seen, (W1, 0, 0), (VS, 10, 2)),
        record(*seen, (m3, 0, 0), (VS, 100, 2)),
        record(*seen, silent=200.0),
    ]


@pytest.mark.parametrize(("silence", "share_of_short", "tolerance"), [(True, 1 / 3, 0.03), (False, 1 / 2, 0.03)])
def test_who_never_comes_back_is_learnt_from_silence(silence, share_of_short, tolerance):
    model = tiny_model(hidden_size=16)
    batch = with_labels(collate(planted_world()))
    silent = batch.pop("silent_days")
    batch |= {"silent_days": silent} if silence else {}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.0)
    for _ in range(120):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    model.eval()
    end = {name: values[2:, :5] for name, values in batch.items() if name in ("input_ids", "times", "visit_segments")}
    with torch.no_grad():
        share = model(**end).logits[0, -1].softmax(-1)
    by_token = np.asarray([share[SPECIALS[token]].item() for token in INTERVAL_SPANS])
    names = list(INTERVAL_SPANS)
    assert by_token[names.index("[W_1]")] == pytest.approx(share_of_short, abs=tolerance)
    assert by_token[names.index("[M_3]")] == pytest.approx(share_of_short, abs=tolerance)
    beyond = by_token[[INTERVAL_SPANS[name][1] > 200 for name in names]].sum()
    assert beyond == pytest.approx(1 - 2 * share_of_short, abs=2 * tolerance)
