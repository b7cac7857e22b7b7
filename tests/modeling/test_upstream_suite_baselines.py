"""The baselines under transformers' own ModelTesterMixin and ConfigTester.

Tests that skip themselves do so for a reason of the table `EXPLAINED`, another one fails. CEHR-BERT stands for the
three, which share a base class; the other two are slow.
"""

import unittest

import pytest

import ehrseq  # noqa: F401  (registers the classes)
from ehrseq.modeling.configuration_cehrbert import CehrBertConfig
from ehrseq.modeling.configuration_ehr_bigbird import EhrBigBirdConfig
from ehrseq.modeling.configuration_ehr_lstm import EhrLstmConfig
from ehrseq.modeling.modeling_cehrbert import CehrBertForMaskedLM, CehrBertForSequenceClassification, CehrBertModel
from ehrseq.modeling.modeling_ehr_bigbird import (
    EhrBigBirdForMaskedLM,
    EhrBigBirdForSequenceClassification,
    EhrBigBirdModel,
)
from ehrseq.modeling.modeling_ehr_lstm import EhrLstmForSequenceClassification, EhrLstmModel
from tests.modeling.test_upstream_suite import EhrMambaModelTester
from tests.modeling.upstream import UpstreamSuite, upstream

common = upstream("test_modeling_common")
config_common = upstream("test_configuration_common")

# What upstream's skips say -> why that is right for the baselines.
EXPLAINED = {
    r"attentions|sdpa|SDPA|[Ff]lash[ _][Aa]ttention|flex|grouped_mm|sliding": "an LSTM has no attention; BigBird's is "
    "sparse, and transformers copies its weights out; flash attention takes no padding mask",
    r"[Gg]radient checkpointing|supports_gradient_checkpointing": "LSTM layers are single operators",
    r"RoPE|position embeddings|axial": "time is embedded, not the position",
    r"sparse experts|output_router_logits": "there are no experts",
    r"composite|No subconfigs": "the configuration is a flat one",
    r"sequence-to-sequence|encoder-decoder|decoder-only": "there is no decoder",
    r"capture_outputs|Cannot capture hidden states": "hidden states are collected by the model itself",
    r"No conversion found": "weights are stored under the names they have in the model",
    r"_keep_in_fp32_modules": "a bfloat16 checkpoint is bfloat16 throughout",
    r"TP plan": "tensor parallelism is not offered",
    r"accelerator|deepspeed|kernels library|MPS|test is slow": "needs hardware or a package this machine may lack",
}


class BaselineTester(EhrMambaModelTester):
    """The inputs are EhrMamba's; the configuration is the family's."""

    config_class: type
    options: dict = {}

    def get_config(self):
        return self.config_class(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            time_embeddings_size=8,
            max_num_visits=16,
            **self.options,
        )


class LstmTester(BaselineTester):
    config_class = EhrLstmConfig


class CehrBertTester(BaselineTester):
    config_class = CehrBertConfig
    num_attention_heads = 4
    options = {"num_attention_heads": 4, "intermediate_size": 37, "max_position_embeddings": 64}


class BigBirdTester(CehrBertTester):
    config_class = EhrBigBirdConfig
    options = {**CehrBertTester.options, "block_size": 4, "num_random_blocks": 1}


class BaselineSuite(UpstreamSuite, common.ModelTesterMixin):
    """What the suites of all baselines do alike."""

    case: type
    explained = EXPLAINED

    def setUp(self):
        self.model_tester = self.case(self)
        self.config_tester = config_common.ConfigTester(
            self,
            config_class=self.case.config_class,
            common_properties=["hidden_size", "num_hidden_layers", "vocab_size"],
            hidden_size=48,
        )


@pytest.mark.slow
class EhrLstmTest(BaselineSuite, unittest.TestCase):
    case, model_type = LstmTester, "ehr_lstm"
    tables = {
        "MODEL_MAPPING_NAMES": "EhrLstmModel",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "EhrLstmForSequenceClassification",
    }
    all_model_classes = (EhrLstmModel, EhrLstmForSequenceClassification)
    has_attentions = False


class CehrBertTest(BaselineSuite, unittest.TestCase):
    case, model_type = CehrBertTester, "cehrbert"
    tables = {
        "MODEL_MAPPING_NAMES": "CehrBertModel",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "CehrBertForMaskedLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "CehrBertForSequenceClassification",
    }
    all_model_classes = (CehrBertModel, CehrBertForMaskedLM, CehrBertForSequenceClassification)


@pytest.mark.slow
class EhrBigBirdTest(BaselineSuite, unittest.TestCase):
    case, model_type = BigBirdTester, "ehr_bigbird"
    tables = {
        "MODEL_MAPPING_NAMES": "EhrBigBirdModel",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "EhrBigBirdForMaskedLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "EhrBigBirdForSequenceClassification",
    }
    test_retain_grad_hidden_states_attentions = unittest.skip("sparse attentions are a copy, off the gradient's path")(
        common.ModelTesterMixin.test_retain_grad_hidden_states_attentions
    )
    all_model_classes = (EhrBigBirdModel, EhrBigBirdForMaskedLM, EhrBigBirdForSequenceClassification)
