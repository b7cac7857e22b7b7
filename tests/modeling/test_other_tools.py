"""Adapters and quantised weights: other libraries find the layers of every family, and what they put there is run.

What a library does is known without it: it looks for `nn.Linear` and puts a module in its place. So much is tested on
any machine, with stand-ins. The libraries themselves (peft, quanto, torchao, bitsandbytes) stand apart from the
environment of the tests (fetch_tools.py): `test_with_the_libraries` runs this file once more where they are seen.
"""

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from ehrseq import (
    CehrBertConfig,
    EhrBigBirdConfig,
    EhrLstmConfig,
    EhrMambaConfig,
    EhrMambaForCausalLM,
    EhrMambaForSequenceClassification,
    HyMaTEConfig,
)
from tests.modeling.common import assert_close
from tests.modeling.fetch_tools import folder
from tests.modeling.hymate_stays import CLASSES, SWITCHES, model_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guides" / "other_tools.md"
PRESENT = all(importlib.util.find_spec(name) for name in ("peft", "torchao", "bitsandbytes", "optimum"))
with_libraries = pytest.mark.skipif(not PRESENT, reason="run by test_with_the_libraries in a process that sees them")

EVENTS = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2}
BERT = {"num_attention_heads": 2, "intermediate_size": 64}
STAYS = {"num_variables": 6, "num_static": 3, "hidden_size": 64, "num_mamba_layers": 1}
BEYOND = {
    "variable_summaries": True,
    "additive_summaries": True,
    "forecast_from_last_value": True,
    "classifier_head": "via_forecast",
}
CONFIGS = {
    "ehrmamba": lambda: EhrMambaConfig(**EVENTS),
    "hymate": lambda: HyMaTEConfig(**STAYS),
    "hymate, beyond the paper": lambda: HyMaTEConfig(**STAYS, embedding_mode="concat", **BEYOND),
    "hymate, binned": lambda: HyMaTEConfig(**STAYS, embedding_mode="binned", num_bins=4),
    "cehrbert": lambda: CehrBertConfig(**EVENTS, **BERT),
    "ehr_bigbird": lambda: EhrBigBirdConfig(**EVENTS, **BERT),
    "ehr_lstm": lambda: EhrLstmConfig(**EVENTS),
}


def classifier(family):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIGS[family]()).eval()


def rows(family):
    generator = torch.Generator().manual_seed(1)
    if not family.startswith("hymate"):
        return {"input_ids": torch.randint(1, 40, (3, 9), generator=generator)}
    return {
        "variable_ids": torch.randint(0, 6, (3, 9), generator=generator),
        "times": torch.rand(3, 9, generator=generator).sort().values * 2 - 1,
        "values": torch.randn(3, 9, generator=generator),
        "attention_mask": torch.ones(3, 9, dtype=torch.int64),
        "static_values": torch.randn(3, 3, generator=generator),
    }


def logits(model, family):
    with torch.no_grad():
        return model(**rows(family)).logits


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# -- without the libraries ---------------------------------------------------------------------------------------------
class Other(nn.Module):
    """What a library puts in a layer's place; it counts its calls."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.weight = layer.weight
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.base_layer(x)


def replace(model):
    """Every `nn.Linear` of the exact type, as bitsandbytes finds them."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Other(module))
    return model


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_linear_layer_of_hymate_is_a_plain_one(kind, switches):
    assert {type(module) for module in linears(model_of(kind, **switches)).values()} <= {nn.Linear}


@pytest.mark.parametrize("family", CONFIGS)
def test_what_stands_in_a_layers_place_is_called_and_gives_the_same(family):
    model = classifier(family)
    assert {type(module) for module in linears(model).values()} == {nn.Linear}
    expected = logits(model, family)
    replaced = replace(copy.deepcopy(model))
    assert_close(logits(replaced, family), expected, 1e-5, family)
    others = {name: module.calls for name, module in replaced.named_modules() if isinstance(module, Other)}
    assert set(others) == set(linears(model))
    assert all(others.values()), others


def test_a_replaced_projection_of_the_step_size_has_the_gradients_of_the_plain_one():
    gradients = []
    for change in (lambda model: model, replace):
        model = change(classifier("ehrmamba"))
        model(**rows("ehrmamba")).logits.square().sum().backward()
        gradients.append({n.replace(".base_layer", ""): p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        if expected is not None and expected.abs().max() > 0:
            assert_close(gradients[1][name], expected, 1e-4, name)


def test_streaming_and_padding_are_the_same_with_replaced_layers():
    torch.manual_seed(0)
    model = EhrMambaForCausalLM(EhrMambaConfig(**EVENTS)).eval()
    ids = torch.randint(1, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = model(input_ids=ids, attention_mask=mask, use_cache=True)
    next_ids = torch.tensor([[3], [4]])
    step = {"input_ids": next_ids, "use_cache": True}
    with torch.no_grad():
        expected_step = model(**step, cache_params=copy.deepcopy(expected.cache_params)).logits
        replaced = replace(model)
        actual = replaced(input_ids=ids, attention_mask=mask, use_cache=True)
        assert_close(actual.logits[0], expected.logits[0], 1e-5, "prefix")
        assert_close(replaced(**step, cache_params=actual.cache_params).logits, expected_step, 1e-5, "step")


def test_in_half_precision_a_bare_layer_adds_the_bias_of_the_step_size_in_float32():
    """As before: only what stands in its place adds it in its own dtype."""
    model = classifier("ehrmamba").bfloat16()
    assert_close(logits(replace(copy.deepcopy(model)), "ehrmamba").float(), logits(model, "ehrmamba").float(), 0.05, "")


# -- with the libraries ------------------------------------------------------------------------------------------------
@pytest.mark.skipif(PRESENT, reason="the tests run in this process")
def test_with_the_libraries():
    if not folder().is_dir():
        pytest.skip("peft and the libraries of quantised weights are not there: python tests/modeling/fetch_tools.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder()}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += ["-k", "lora or adapter or bits or guides"]  # the others have run
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def adapted(family, target="all-linear"):
    from peft import LoraConfig, get_peft_model

    # The task type names the inputs of language models; HyMaTE's are others.
    task_type = None if family.startswith("hymate") else "SEQ_CLS"
    head = ["classifier"] if task_type is None else None
    exclude = ["classifier"] if task_type is None and target == "all-linear" else None
    config = LoraConfig(target_modules=target, task_type=task_type, modules_to_save=head, exclude_modules=exclude)
    return get_peft_model(classifier(family), config)


@with_libraries
@pytest.mark.parametrize("family", CONFIGS)
def test_lora_on_every_linear_layer_starts_as_the_model_learns_and_merges(family):
    expected = logits(classifier(family), family)
    model = adapted(family).eval()
    assert torch.equal(logits(model, family), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # B starts at zero, so that A learns from the second step on
        optimizer.zero_grad()
        model(**rows(family), labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
    silent = [n for n, p in model.named_parameters() if "lora_A" in n and not (p.grad is not None and p.grad.any())]
    assert silent == []
    frozen = [
        n for n, p in model.named_parameters() if p.grad is not None and "lora" not in n and "modules_to_save" not in n
    ]
    assert frozen == []
    learned = logits(model, family)
    assert not torch.allclose(learned, expected)
    assert_close(logits(model.merge_and_unload(), family), learned, 1e-4, family)


@with_libraries
@pytest.mark.parametrize("family", ["ehrmamba", "hymate"])
def test_lora_on_the_step_size_alone(family):
    model = adapted(family, ["dt_proj"]).eval()
    names = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert names == {"dt_proj"}
    assert torch.equal(logits(model, family), logits(classifier(family), family))


@with_libraries
def test_an_adapter_is_saved_and_loaded(tmp_path):
    from peft import PeftModel

    model = adapted("ehrmamba").eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier("ehrmamba"), tmp_path).eval()
    assert torch.equal(logits(again, "ehrmamba"), logits(model, "ehrmamba"))


def quanto(model, tmp_path):
    from optimum.quanto import QLinear, freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)
    return model, lambda layer: type(layer) is QLinear


def torchao(model, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model, lambda layer: type(layer.weight) is not nn.Parameter and type(layer.weight.data) is not torch.Tensor


def bitsandbytes(model, tmp_path, **options):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig

    model.save_pretrained(tmp_path)
    options = options or {"load_in_8bit": True}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    return loaded.eval(), lambda layer: type(layer) in (Linear4bit, Linear8bitLt)


@with_libraries
@pytest.mark.parametrize("quantise", [quanto, torchao, bitsandbytes])
@pytest.mark.parametrize("family", CONFIGS)
def test_eight_bits_are_in_every_linear_layer_and_change_little(family, quantise, tmp_path):
    model = classifier(family)
    names, expected = set(linears(model)), logits(model, family)
    quantised, is_quantised = quantise(model, tmp_path)
    assert {name for name, layer in linears(quantised).items() if is_quantised(layer)} == names
    assert_close(logits(quantised, family), expected, 0.1, family)  # a step of 8 bits is 1/127 of the largest weight


@with_libraries
def test_four_bits_where_the_library_has_them(tmp_path):
    """On some CPUs bitsandbytes takes only layers of round sizes: the page says which to leave out."""
    left = ["classifier", "projection", "x_proj", "dt_proj"]
    model = classifier("ehrmamba")
    expected = logits(model, "ehrmamba")
    quantised, is_quantised = bitsandbytes(model, tmp_path, load_in_4bit=True, llm_int8_skip_modules=left)
    assert {n.rsplit(".", 1)[-1] for n, layer in linears(quantised).items() if is_quantised(layer)} == {
        "in_proj",
        "out_proj",
    }
    assert_close(logits(quantised, "ehrmamba"), expected, 0.6, "four bits")


@with_libraries
def test_the_guides_examples_run(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "checkpoints" / "ehrmamba", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python norun: [^\n]*\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    namespace = {"__name__": "page"}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), namespace)
    assert len(examples) == 4
    assert isinstance(namespace["merged"], EhrMambaForSequenceClassification)
    before, *quantised = (namespace[name] for name in ("risk_before", "risk_quanto", "risk_torchao", "risk_8bit"))
    assert all(abs(risk - before) < 0.05 for risk in quantised)
