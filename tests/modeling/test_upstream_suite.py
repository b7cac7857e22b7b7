"""EhrMamba under transformers' own ModelTesterMixin and ConfigTester.

No test is left out by hand. Those that skip themselves do so for a reason of the table `EXPLAINED`; another one fails.
Upstream's tests of `generate` and of export are not in its source distribution: test_ehrmamba_generation.py stands for
the former.
"""

import unittest

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.modeling_ehrmamba import (
    EhrMambaForCausalLM,
    EhrMambaForSequenceClassification,
    EhrMambaModel,
)
from tests.modeling.upstream import UpstreamSuite, upstream

common = upstream("test_modeling_common")
config_common = upstream("test_configuration_common")

TABLES = {
    "MODEL_MAPPING_NAMES": "EhrMambaModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "EhrMambaForCausalLM",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": "EhrMambaForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "EhrMambaForSequenceClassification",
}

# What upstream's skips say -> why that is right for EhrMamba.
EXPLAINED = {
    r"attentions|sdpa|[Ff]lash Attention|grouped_mm|sliding": "a Mamba has no attention, in any implementation",
    r"RoPE|position embeddings|axial": "EhrMamba has no positional embedding",
    r"sparse experts|output_router_logits": "EhrMamba has no experts",
    r"composite|No subconfigs": "the configuration is a flat one",
    r"sequence-to-sequence": "EhrMamba has no encoder-decoder head",
    r"capture_outputs|Cannot capture hidden states": "EhrMamba collects its hidden states itself, as Mamba does",
    r"No conversion found": "weights are stored under the names they have in the model",
    r"_keep_in_fp32_modules": "a bfloat16 checkpoint is bfloat16 throughout; float32 is cast where it is needed",
    r"TP plan": "tensor parallelism is not offered",
    r"accelerator|deepspeed|kernels library|MPS|test is slow": "needs hardware or a package this machine may lack",
}


class EhrMambaModelTester:
    """Tiny configuration and inputs in the form that the mixin asks for."""

    batch_size, seq_length, num_hidden_layers, hidden_size = 3, 7, 2, 32
    is_training = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return EhrMambaConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            state_size=4,
            time_embeddings_size=8,
            max_num_visits=16,
        )

    def prepare_config_and_inputs_for_common(self):
        config, shape = self.get_config(), (self.batch_size, self.seq_length)
        times = torch.rand(shape).cumsum(1)
        return config, {
            "input_ids": torch.randint(1, config.vocab_size, shape),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "token_type_ids": torch.randint(0, config.type_vocab_size, shape),
            "times": times,
            "ages": 50 + times / 52,
            "visit_orders": torch.randint(0, config.max_num_visits, shape),
            "visit_segments": torch.randint(0, config.visit_segment_size, shape),
        }


class EhrMambaModelTest(UpstreamSuite, common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    model_type, tables, explained = "ehrmamba", TABLES, EXPLAINED
    all_model_classes = (EhrMambaModel, EhrMambaForCausalLM, EhrMambaForSequenceClassification)
    has_attentions = False

    @classmethod
    def setUpClass(cls):
        AutoConfig.register("ehrmamba", EhrMambaConfig, exist_ok=True)
        AutoModel.register(EhrMambaConfig, EhrMambaModel, exist_ok=True)
        AutoModelForCausalLM.register(EhrMambaConfig, EhrMambaForCausalLM, exist_ok=True)
        AutoModelForSequenceClassification.register(EhrMambaConfig, EhrMambaForSequenceClassification, exist_ok=True)
        super().setUpClass()

    def setUp(self):
        self.model_tester = EhrMambaModelTester(self)
        self.config_tester = config_common.ConfigTester(
            self,
            config_class=EhrMambaConfig,
            common_properties=["hidden_size", "num_hidden_layers", "state_size", "vocab_size"],
            hidden_size=32,
        )
