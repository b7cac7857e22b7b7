"""`import ehrseq`: what it registers, what it leaves unloaded, and how long it takes."""

import pytest
import transformers
from transformers.pipelines import PIPELINE_REGISTRY

import ehrseq
from ehrseq.hub.registration import FAMILIES, load, register_all
from tests.hub.bare_interpreter import run_python

LIGHT = """
import sys
from transformers import AutoModel, PreTrainedModel, pipeline
before = set(sys.modules)
import time
start = time.process_time()
import ehrseq
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in set(sys.modules) - before})}))
"""
HEAVY = {"polars", "pyarrow", "pandas", "sklearn", "scipy", "matplotlib", "datasets", "meds", "typer", "evaluate"}


def test_import_is_light() -> None:
    run = run_python(LIGHT, {}, {})
    assert HEAVY.isdisjoint(run["modules"])
    # The goal is 0.3 s, and 0.1 s was measured (benchmarks/speed/bench_import.py); CPU seconds of a busy machine vary.
    assert run["seconds"] < 0.6


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_class_of_a_family_is_registered(model_type: str) -> None:
    family = FAMILIES[model_type]
    config_class = load(family.config)
    assert type(transformers.AutoConfig.for_model(model_type)) is config_class
    for auto_name, path in family.models.items():
        assert getattr(transformers, auto_name)._model_mapping[config_class] is load(path)
    models = {auto: path.split(":")[1] for auto, path in family.models.items()}
    assert load(next(iter(family.models.values()))).auto_classes == models


def test_registering_twice_changes_nothing() -> None:
    before = dict(PIPELINE_REGISTRY.supported_tasks["ehr-risk"])
    register_all()
    assert PIPELINE_REGISTRY.supported_tasks["ehr-risk"] == before
    assert not hasattr(ehrseq.EhrRiskPipeline, "_registered_impl")


@pytest.mark.parametrize("name", ehrseq.__all__)
def test_every_export_loads(name: str) -> None:
    assert getattr(ehrseq, name) is not None
    assert name in dir(ehrseq)


def test_an_unknown_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'EhrMamba3'"):
        _ = ehrseq.EhrMamba3
