"""Tiny HyMaTE configurations and random stays, padded and packed, for the tests of its modules."""

import torch

from ehrseq.modeling.configuration_hymate import HyMaTEConfig
from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining, HyMaTEForSequenceClassification, HyMaTEModel

CLASSES = {"base": HyMaTEModel, "forecast": HyMaTEForPreTraining, "classifier": HyMaTEForSequenceClassification}
LENGTHS = (7, 1, 13, 4, 2)
VARIABLES, STATIC = 6, 3

# Every switch that changes the layers, away from its default.
SWITCHES = {
    "paper": {},
    "no attention": {"num_attention_layers": 0},
    "no Mamba": {"num_mamba_layers": 0},
    "neither": {"num_attention_layers": 0, "num_mamba_layers": 0},
    "two attention layers": {"num_attention_layers": 2, "num_attention_heads": 2},
    "concatenated": {"embedding_mode": "concat"},
    "value alone": {"embedding_mode": "value"},
    "binned": {"embedding_mode": "binned", "num_bins": 5},
    "shared weights": {"share_layer_weights": True, "num_attention_layers": 2},
    "change and gap": {"value_change_embedding": True, "time_gap_embedding": True},
    "change, concatenated": {"value_change_embedding": True, "embedding_mode": "concat"},
    "no static values": {"num_static": 0},
    "history first": {"initialization": "history_first"},
    "narrow residual": {"residual_in_fp32": False},
    "summaries": {"variable_summaries": True},
    "summaries, binned": {"variable_summaries": True, "embedding_mode": "binned", "num_bins": 5},
    "summaries alone": {"variable_summaries": True, "num_static": 0, "num_attention_layers": 0, "num_mamba_layers": 0},
    "from the last value": {"forecast_from_last_value": True, "classifier_head": "via_forecast"},
    "additive": {"additive_summaries": True},
    "additive, no static values": {"additive_summaries": True, "num_static": 0},
    "beyond the paper": {
        "variable_summaries": True,
        "additive_summaries": True,
        "forecast_from_last_value": True,
        "classifier_head": "via_forecast",
        "value_change_embedding": True,
        "time_gap_embedding": True,
    },
}
BEYOND = SWITCHES["beyond the paper"]


def tiny_config(**changes):
    fields = {
        "num_variables": VARIABLES,
        "num_static": STATIC,
        "hidden_size": 24,
        "num_mamba_layers": 2,
        "state_size": 5,
        "hidden_dropout_prob": 0.0,
        "additive_dropout": 0.0,
    }
    return HyMaTEConfig(**{**fields, **changes})


def model_of(kind="base", seed=0, **changes):
    torch.manual_seed(seed)
    model = CLASSES[kind](tiny_config(**changes)).eval()
    with torch.no_grad():  # leave the symmetric start, where wrong biases and norms would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def random_stay(length, seed, static=STATIC):
    generator = torch.Generator().manual_seed(seed)
    stay = {
        "variable_ids": torch.randint(0, VARIABLES, (length,), generator=generator),
        "times": (torch.rand(length, generator=generator) * 2 - 1).sort().values,
        "values": torch.randn(length, generator=generator),
        "static_values": torch.randn(static, generator=generator),
    }
    return stay if static else {name: v for name, v in stay.items() if name != "static_values"}


def random_stays(lengths=LENGTHS, static=STATIC):
    return [random_stay(length, seed, static) for seed, length in enumerate(lengths)]


def lists(stay):
    return {name: v.double().tolist() if v.is_floating_point() else v.tolist() for name, v in stay.items()}


def collate(stays, side="right", length=None, filler=0):
    """Batch of stays, padded on one side; `filler` stands in the padding."""
    longest = length or max(len(stay["values"]) for stay in stays)
    batch = {}
    for name in ("variable_ids", "times", "values", "attention_mask"):
        rows = []
        for stay in stays:
            values = stay.get(name, torch.ones_like(stay["variable_ids"]))
            pad = values.new_full((longest - len(values),), 0 if name == "attention_mask" else filler)
            rows.append(torch.cat([values, pad] if side == "right" else [pad, values]))
        batch[name] = torch.stack(rows)
    if "static_values" in stays[0]:
        batch["static_values"] = torch.stack([stay["static_values"] for stay in stays])
    return batch


def pack(rows, padding=2):
    """Rows of several stays each, padded to the longest and `padding` further triplets."""
    segments = max(map(len, rows))
    length = max(sum(len(stay["values"]) for stay in row) for row in rows) + padding
    batch = {}
    for name in ("variable_ids", "times", "values"):
        joined = [torch.cat([stay[name] for stay in row]) for row in rows]
        batch[name] = torch.stack([torch.nn.functional.pad(part, (0, length - len(part))) for part in joined])
    ids = [torch.cat([torch.full_like(stay["variable_ids"], i + 1) for i, stay in enumerate(row)]) for row in rows]
    batch["segment_ids"] = torch.stack([torch.nn.functional.pad(part, (0, length - len(part))) for part in ids])
    if "static_values" in rows[0][0]:
        static = [torch.stack([stay["static_values"] for stay in row]) for row in rows]
        batch["static_values"] = torch.stack(
            [torch.nn.functional.pad(part, (0, 0, 0, segments - len(part))) for part in static]
        )
    return batch
