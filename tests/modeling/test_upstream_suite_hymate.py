"""HyMaTE under transformers' own ModelTesterMixin and ConfigTester.

One switch is thrown by hand (`test_resize_embeddings`); tests that skip themselves do so for a reason of the table
`EXPLAINED`, another one fails.
"""

import tempfile
import unittest

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import ehrseq  # noqa: F401  (registers the classes)
from ehrseq.modeling.configuration_hymate import HyMaTEConfig
from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining, HyMaTEForSequenceClassification, HyMaTEModel
from tests.modeling.upstream import UpstreamSuite, upstream

common = upstream("test_modeling_common")
config_common = upstream("test_configuration_common")

TABLES = {
    "MODEL_MAPPING_NAMES": "HyMaTEModel",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": "HyMaTEForPreTraining",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HyMaTEForSequenceClassification",
}

# What upstream's skips say -> why that is right for HyMaTE.
EXPLAINED = {
    r"resize|`False`|test_resize_embeddings": "a variable is no token: forecasts have one entry each as well",
    r"[Ff]lash[ _][Aa]ttention|flex|grouped_mm|sliding|sdpa kernel": "sdpa and eager are offered, and nothing else",
    r"RoPE|position embeddings|axial": "HyMaTE has no positional embedding: time is embedded as a number",
    r"inputs_embeds|input_embeds": "a triplet is three channels: its gradient is taken for values and times themselves",
    r"sparse experts|output_router_logits": "HyMaTE has no experts",
    r"composite|No subconfigs": "the configuration is a flat one",
    r"sequence-to-sequence|encoder-decoder|decoder-only": "HyMaTE has no decoder",
    r"does not support SDPA": "upstream's words for a model that is not composite",
    r"capture_outputs|Cannot capture hidden states": "HyMaTE collects its hidden states itself, as EhrMamba does",
    r"No conversion found": "weights are stored under the names they have in the model",
    r"_keep_in_fp32_modules": "a bfloat16 checkpoint is bfloat16 throughout; float32 is cast where it is needed",
    r"TP plan": "tensor parallelism is not offered",
    r"accelerator|deepspeed|kernels library|MPS|test is slow": "needs hardware or a package this machine may lack",
}


class HyMaTEModelTester:
    """Tiny configuration and inputs in the form that the mixin asks for."""

    batch_size, seq_length, hidden_size, num_attention_heads = 3, 7, 32, 4
    num_variables, num_static = 11, 5
    num_hidden_layers = 1  # those that have attentions, of which upstream wants as many
    expected_num_hidden_layers = 2 + 1 + 1  # embeddings, Mamba and attention blocks
    is_training = True
    options: dict = {}

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return HyMaTEConfig(
            num_variables=self.num_variables,
            num_static=self.num_static,
            hidden_size=self.hidden_size,
            num_mamba_layers=2,
            num_attention_layers=1,
            num_attention_heads=self.num_attention_heads,
            state_size=4,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        return self.get_config(), {
            "variable_ids": torch.randint(0, self.num_variables, shape),
            "times": (torch.rand(shape) * 2 - 1).sort(dim=1).values,
            "values": torch.randn(shape),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "static_values": torch.randn(self.batch_size, self.num_static),
        }


class HyMaTEBeyondThePaperTester(HyMaTEModelTester):
    """The same with all that is not in the paper."""

    options = {
        "variable_summaries": True,
        "additive_summaries": True,
        "forecast_from_last_value": True,
        "value_change_embedding": True,
        "time_gap_embedding": True,
        "classifier_head": "via_forecast",
    }


class HyMaTEModelTest(UpstreamSuite, common.ModelTesterMixin, unittest.TestCase):
    model_type, tables, explained = "hymate", TABLES, EXPLAINED
    case_class = HyMaTEModelTester
    all_model_classes = (HyMaTEModel, HyMaTEForPreTraining, HyMaTEForSequenceClassification)
    additional_model_inputs = ("times", "values", "static_values")
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = self.case_class(self)
        self.config_tester = config_common.ConfigTester(
            self,
            config_class=HyMaTEConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_attention_heads", "num_hidden_layers"],
            hidden_size=32,
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is HyMaTEForPreTraining:  # upstream knows no forecasting of values
            tester = self.model_tester
            inputs["labels"] = torch.ones(tester.batch_size, tester.num_variables)
            inputs["label_mask"] = torch.ones(tester.batch_size, tester.num_variables)
        return inputs

    def test_load_with_mismatched_shapes(self):
        """Upstream's test changes `vocab_size`, which HyMaTE has not; the same with its number of variables."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        with tempfile.TemporaryDirectory() as folder:
            HyMaTEForSequenceClassification(config).save_pretrained(folder)
            config.num_variables = 20
            for auto, changes in ((AutoModelForSequenceClassification, {"num_labels": 42}), (AutoModel, {})):
                given = changes or {"config": config}
                with pytest.raises(RuntimeError):
                    auto.from_pretrained(folder, **given)
                model = auto.from_pretrained(folder, ignore_mismatched_sizes=True, **given)
                assert all(torch.isfinite(weight).all() for weight in model.parameters())
                answer = model(**inputs)
                assert not changes or answer.logits.shape[1] == 42


class HyMaTEBeyondThePaperTest(HyMaTEModelTest):
    case_class = HyMaTEBeyondThePaperTester

    def test_can_load_ignoring_mismatched_shapes(self):
        """Upstream's test takes all heads for `nn.Linear`, which the additive one is not: here, what else stays."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        with tempfile.TemporaryDirectory() as folder:
            old = HyMaTEForSequenceClassification(config)
            old.save_pretrained(folder)
            new = HyMaTEForSequenceClassification.from_pretrained(folder, num_labels=42, ignore_mismatched_sizes=True)
        weights = dict(new.named_parameters())
        heads = {name for name, weight in old.named_parameters() if weight.shape != weights[name].shape}
        assert heads == {"classifier.weight", "classifier.bias", "additive_head.weight"}
        assert new.additive_head.weight.shape[0] == 42
        assert not new.additive_head.weight.any()
        for name, weight in old.named_parameters():
            if name not in heads:
                torch.testing.assert_close(weight, weights[name])
