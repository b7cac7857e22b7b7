"""`generate`: the cached state equals recomputation, and the clock moves as the design says."""

from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS, EhrMambaConfig
from ehrseq.modeling.ehrmamba_clock import TokenEffects, read_clock
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from tests.modeling.common import assert_close, collate

SPECIALS = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[VS]", "[VE]", "[REG]", *INTERVAL_DAYS]
EVENTS = ["LAB", "DRUG", "PROCEDURE", "DIAGNOSIS"]
ID = {token: i for i, token in enumerate(SPECIALS + EVENTS)}
TYPE = {"[CLS]": 1, "[VS]": 2, "[VE]": 3, "[REG]": 8, "LAB": 5, "DRUG": 6, "PROCEDURE": 7, "DIAGNOSIS": 9}
TYPE.update(dict.fromkeys(INTERVAL_DAYS, 4))
TOKENIZER = SimpleNamespace(
    token_types=[TYPE.get(token, 0) for token in ID], get_vocab=lambda: dict(ID), pad_token_id=0
)
CHANNELS = ("token_type_ids", "times", "ages", "visit_orders", "visit_segments")


def model(seed=0):
    torch.manual_seed(seed)
    config = EhrMambaConfig(hidden_size=24, num_hidden_layers=2, state_size=4, time_embeddings_size=6, max_num_visits=6)
    config.update_from_tokenizer(TOKENIZER)
    model = EhrMambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def history(tokens, *, week=10.0, age=50.0, order=1, segment=1):
    """Channels of a short history by the tokenizer's rules, written by hand."""
    rows = {name: [] for name in ("input_ids", *CHANNELS)}
    for token in tokens:
        if token in INTERVAL_DAYS:
            values = (0.0, 0.0, order, 0)
            week, age = week + INTERVAL_DAYS[token] / 7, age + INTERVAL_DAYS[token] / 365.25
        elif token == "[CLS]":
            values = (0.0, 0.0, 0, 0)
        else:
            if token == "[VS]" and rows["input_ids"] and max(rows["visit_orders"]) > 0:
                order, segment = min(order + 1, 5), 3 - segment
            values = (week, age, order, segment)
        rows["input_ids"].append(ID[token])
        rows["token_type_ids"].append(TYPE.get(token, 0))
        for name, value in zip(CHANNELS[1:], values, strict=True):
            rows[name].append(value)
    return {name: torch.tensor(values) for name, values in rows.items()}


class Forced(LogitsProcessor):
    """Makes `generate` write down a given continuation, one for all rows."""

    def __init__(self, tokens, start):
        self.tokens, self.start = [ID[token] for token in tokens], start

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e9)
        forced[:, self.tokens[input_ids.shape[1] - self.start]] = 0.0
        return forced


def channels_seen(model, prompt, continuation, use_cache):
    """The inputs of every forward pass of `generate` along a forced continuation."""
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    length = prompt["input_ids"].shape[1]
    model.generate(
        **prompt,
        max_new_tokens=len(continuation),
        do_sample=False,
        use_cache=use_cache,
        logits_processor=LogitsProcessorList([Forced(continuation, length)]),
    )
    handle.remove()
    return seen


PROMPT = ["[CLS]", "[VS]", "LAB", "DRUG", "[VE]", "[REG]"]
CONTINUATION = [
    *("[W_2]", "[VS]", "LAB", "[VE]", "[REG]", "[M_0]", "[VS]", "DIAGNOSIS", "[VE]", "[REG]"),
    *(
        "[LT]",
        "[VS]",
        "[VE]",
        "[REG]",
        "[M_12]",
        "[VS]",
        "LAB",
        "[VE]",
        "[REG]",
        "[W_0]",
        "[VS]",
        "[VE]",
        "[VS]",
        "LAB",
    ),
]


def test_the_clock_moves_as_in_a_history_of_the_same_tokens():
    network = model()
    whole = history(PROMPT + CONTINUATION)
    assert whole["times"][-1] == pytest.approx(10 + (17.5 + 29 + 547 + 375 + 3.5) / 7)
    assert whole["visit_orders"][-1] == 5  # clamped to max_num_visits - 1
    prompt = collate([history(PROMPT)])
    seen = channels_seen(network, prompt, CONTINUATION, use_cache=False)[-1]
    for name in ("input_ids", *CHANNELS):
        torch.testing.assert_close(
            seen[name][0].double(), whole[name][:-1].double(), rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_with_a_state_only_the_newest_token_is_read():
    network, prompt = model(), collate([history(PROMPT)])
    whole = history(PROMPT + CONTINUATION)
    seen = channels_seen(network, prompt, CONTINUATION, use_cache=True)
    assert seen[0]["input_ids"].shape == (1, len(PROMPT))
    for step, inputs in enumerate(seen[1:]):
        position = len(PROMPT) + step
        assert inputs["input_ids"].shape == (1, 1)
        for name in ("input_ids", *CHANNELS):
            assert inputs[name].item() == pytest.approx(whole[name][position].item(), rel=1e-5, abs=1e-4), name


@pytest.mark.parametrize(
    ("prompt", "continuation", "order", "segment", "days"),
    [
        (["[CLS]"], ["[VS]", "LAB"], 1, 1, 0.0),  # nothing known yet: the first visit opens at 0
        ([*PROMPT, "[M_3]"], ["[VS]", "LAB"], 2, 2, 105.0),  # the prompt ends on an interval
        (["[CLS]", "[VS]", "LAB"], ["DRUG", "LAB"], 1, 1, 0.0),  # within an open visit
    ],
)
def test_the_clock_starts_where_the_prompt_ends(prompt, continuation, order, segment, days):
    seen = channels_seen(model(), collate([history(prompt)]), [*continuation, "[VE]"], use_cache=True)[-1]
    start = 0.0 if prompt == ["[CLS]"] else 10.0
    assert seen["visit_orders"].item() == order
    assert seen["visit_segments"].item() == segment
    assert seen["times"].item() == pytest.approx(start + days / 7, rel=1e-5)


def test_rows_of_a_left_padded_batch_forecast_as_they_do_alone():
    network = model()
    patients = [history(PROMPT), history(["[CLS]", "[VS]", "LAB"], week=3.0, age=70.0), history([*PROMPT, "[LT]"])]
    together = network.generate(**collate(patients, "left"), max_new_tokens=12, do_sample=False)
    for row, patient in enumerate(patients):
        alone = network.generate(**collate([patient]), max_new_tokens=12, do_sample=False)
        assert together[row, -12:].tolist() == alone[0, -12:].tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cached_state_gives_what_recomputation_gives(options, seed):
    network = model(seed)
    batch = collate([history(PROMPT), history(["[CLS]", "[VS]", "LAB", "[VE]", "[REG]", "[W_1]"])], "left")
    settings = {"max_new_tokens": 15, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    cached = network.generate(**batch, **settings, **options)
    recomputed = network.generate(**batch, **settings, **options, use_cache=False)
    assert cached.sequences.tolist() == recomputed.sequences.tolist()
    for step, (a, b) in enumerate(zip(cached.scores, recomputed.scores, strict=True)):
        finite = torch.isfinite(b)
        assert_close(a[finite], b[finite], 1e-4, f"scores of step {step}")
    assert len(set(cached.sequences.flatten().tolist())) > 4  # not one token over and over


def test_a_forecast_goes_on_from_a_state():
    """Prefill the history once, forecast from its state and the newest token."""
    network, patient = model(), history([*PROMPT, "[W_1]", "[VS]", "LAB"])
    expected = network.generate(**collate([patient]), max_new_tokens=8, do_sample=False)
    past = collate([{name: values[:-1] for name, values in patient.items()}])
    with torch.no_grad():
        cache = network(**past, use_cache=True).cache_params
    newest = collate([{name: values[-1:] for name, values in patient.items()}])
    tokens = network.generate(**newest, cache_params=cache, max_new_tokens=8, do_sample=False)
    assert tokens[0, 1:].tolist() == expected[0, -8:].tolist()


def test_sampling_and_stopping_work():
    network, batch = model(), collate([history(PROMPT)] * 2)
    tokens = network.generate(**batch, max_new_tokens=10, do_sample=True, eos_token_id=ID["[REG]"], pad_token_id=0)
    assert tokens.shape[0] == 2
    assert tokens.shape[1] <= len(PROMPT) + 10


def test_an_unknown_age_stays_unknown():
    prompt = history(PROMPT)
    prompt["ages"] = torch.zeros_like(prompt["ages"])
    seen = channels_seen(model(), collate([prompt]), ["[LT]", "[VS]", "LAB", "[VE]"], use_cache=True)
    assert [inputs["ages"].max().item() for inputs in seen] == [0.0] * 4


def test_tokens_alone_are_enough():
    tokens = model().generate(torch.tensor([[ID["[CLS]"]]]), max_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, 6)


def test_update_from_tokenizer_fills_what_generate_needs():
    config = EhrMambaConfig()
    config.update_from_tokenizer(TOKENIZER)
    assert config.vocab_size == len(ID)
    assert config.token_types() == TOKENIZER.token_types
    assert config.special_token_ids["[M_12]"] == ID["[M_12]"]
    assert set(config.special_token_ids) == {"[VS]", "[VE]", "[REG]", *INTERVAL_DAYS}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (SimpleNamespace(get_vocab=dict, pad_token_id=0), "SimpleNamespace has no token_types"),
        (SimpleNamespace(token_types=[0], get_vocab=lambda: {"a": 0}, pad_token_id=0), r"no \[VS\] and no \[VE\]"),
    ],
)
def test_update_from_tokenizer_refuses(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        EhrMambaConfig().update_from_tokenizer(tokenizer)


def test_generate_refuses_right_padding_packing_and_half_a_vocabulary():
    network, patients = model(), [history(PROMPT), history(PROMPT[:3])]
    with pytest.raises(ValueError, match="padded on the right"):
        network.generate(**collate(patients, "right"), max_new_tokens=2)
    with pytest.raises(ValueError, match="must not be packed"):
        network.generate(**collate(patients[:1]), segment_ids=torch.ones(1, 6, dtype=torch.long), max_new_tokens=2)
    network.config.special_token_ids = {"[VE]": 5}
    with pytest.raises(ValueError, match=r"lacks \['\[VS\]'\]"):
        network.generate(**collate(patients[:1]), max_new_tokens=2)


def test_replaying_a_patients_tokens_gives_the_tokenizers_channels():
    """Types, orders and segments are the tokenizer's own; times differ by what an interval token leaves open."""
    polars = pytest.importorskip("polars")
    tokenization = pytest.importorskip("ehrseq.tokenization.tokenization_ehr")
    birth = {"subject_id": 1, "time": datetime(2100, 5, 5), "code": "MEDS_BIRTH", "numeric_value": None}
    days = [0, 0, 9, 9, 9, 50, 50, 600, 600, 603]
    start = datetime(2150, 1, 1, 8)
    rows = [
        {"subject_id": 1, "time": start + timedelta(days=day, hours=i), "code": code, "numeric_value": float(i)}
        for i, (day, code) in enumerate(zip(days, ["LAB//LOINC//2345-7", "DIAGNOSIS//ICD10CM//I10"] * 5, strict=True))
    ]
    events = polars.DataFrame([birth, *rows], infer_schema_length=None)
    tokenizer = tokenization.EhrTokenizer.train(events, min_count=1)
    network = model()
    network.config.update_from_tokenizer(tokenizer)
    network = EhrMambaForCausalLM(network.config).eval()
    row = {name: torch.tensor(values) for name, values in tokenizer(events).items() if name != "attention_mask"}
    row = {name: values.reshape(-1) for name, values in row.items()}
    length = 3
    prompt = {name: values[None, :length] for name, values in row.items()}
    real = torch.ones(1, length, dtype=torch.bool)
    clock = read_clock(TokenEffects.of(network.config), prompt["input_ids"], prompt, real)
    replayed = clock.follow(row["input_ids"][None, length:])
    assert int(row["visit_orders"].max()) == 5
    for name in ("token_type_ids", "visit_orders", "visit_segments"):
        assert replayed[name][0].tolist() == row[name][length:].tolist(), name
    for name, per_day in (("times", 1 / 7), ("ages", 1 / 365.25)):
        gap = (replayed[name][0] - row[name][length:]).abs() / per_day
        assert float(gap.max()) < 4 * 16 + 182 + 4, name  # four intervals of up to 30 days, one of a year, a few hours
        zero = row["token_type_ids"][length:] == 4
        assert not replayed[name][0][zero].any()
