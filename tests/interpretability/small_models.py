"""Small random classifiers of every family with some patients, for the tests of explanations."""

import torch

from ehrseq.modeling.configuration_cehrbert import CehrBertConfig
from ehrseq.modeling.configuration_ehr_bigbird import EhrBigBirdConfig
from ehrseq.modeling.modeling_cehrbert import CehrBertForSequenceClassification
from ehrseq.modeling.modeling_ehr_bigbird import EhrBigBirdForSequenceClassification
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForSequenceClassification
from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification
from tests.modeling import common, hymate_stays
from tests.modeling.test_modeling_ehrmamba import random_patient, tiny_config
from tests.modeling.test_modeling_transformers import FIELDS

FAMILIES = ("ehrmamba", "hymate", "cehrbert", "ehr_bigbird")
LENGTHS = (7, 1, 23, 4)


def small_model(family, dtype=torch.float64, **changes):
    """A classifier in evaluation mode whose weights are away from the symmetric start."""
    torch.manual_seed(0)
    if family == "ehrmamba":
        model = EhrMambaForSequenceClassification(tiny_config(**changes))
    elif family == "hymate":
        model = HyMaTEForSequenceClassification(hymate_stays.tiny_config(**changes))
    elif family == "cehrbert":
        model = CehrBertForSequenceClassification(CehrBertConfig(**{**FIELDS, **changes}))
    else:
        model = EhrBigBirdForSequenceClassification(EhrBigBirdConfig(**{**FIELDS, "block_size": 4, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().to(dtype)


def without_biases(model):
    """Every bias of what lies above the embedding layer set to 0, in place.

    That of the step sizes stays: the rules hold step sizes constant.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not name.endswith("dt_proj.bias"):
                parameter.zero_()
    return model


def patients(family, lengths=LENGTHS, static=hymate_stays.STATIC):
    if family == "hymate":
        return hymate_stays.random_stays(lengths, static)
    return [random_patient(length, seed) for seed, length in enumerate(lengths)]


def batch(family, rows, side="right", length=None, dtype=torch.float64):
    """Padded rows of patients."""
    made = hymate_stays.collate(rows, side, length) if family == "hymate" else common.collate(rows, side, length)
    return in_dtype(made, dtype)


def packed(family, rows, dtype=torch.float64):
    """One row of all patients, then padding."""
    return in_dtype(hymate_stays.pack([rows]) if family == "hymate" else common.pack(rows), dtype)


def in_dtype(inputs, dtype):
    return {name: values.to(dtype) if values.is_floating_point() else values for name, values in inputs.items()}


def lengths_of(rows):
    return [len(next(iter(row.values()))) for row in rows]


def real_parts(values, rows, side="right"):
    """Each patient's numbers of padded rows [b, l]."""
    lengths = lengths_of(rows)
    return [row[:n] if side == "right" else row[len(row) - n :] for row, n in zip(values, lengths, strict=True)]


def packed_parts(values, rows):
    """Each patient's numbers of one packed row [1, l]."""
    lengths = lengths_of(rows)
    return list(values[0, : sum(lengths)].split(lengths))
