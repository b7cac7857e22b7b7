"""The registry of models: one table, and everything that follows from it."""

import ast
import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from transformers.pipelines import PIPELINE_REGISTRY

import ehrseq
from ehrseq.hub.families import FAMILIES, PIPELINES, load_class, registered_classes
from ehrseq.hub.registration import LazyItems, register_all, registrations
from ehrseq.modeling.hub_mixin import CUSTOM_PIPELINES


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_class_of_a_family_is_registered(model_type: str) -> None:
    family = FAMILIES[model_type]
    config_class = load_class(family.config)
    assert type(transformers.AutoConfig.for_model(model_type)) is config_class
    for auto_name, path in family.models.items():
        assert getattr(transformers, auto_name)._model_mapping[config_class] is load_class(path)
    models = {auto: path.split(":")[1] for auto, path in family.models.items()}
    assert load_class(next(iter(family.models.values()))).auto_classes == models


def test_every_class_is_born_with_the_auto_class_that_it_is_saved_under() -> None:
    expected = {}
    for family in FAMILIES.values():
        expected[family.config] = "AutoConfig"
        for auto, path in family.models.items():
            expected.setdefault(path, auto)
        expected |= {} if family.tokenizer is None else {family.tokenizer: "AutoTokenizer"}
        expected |= {} if family.feature_extractor is None else {family.feature_extractor: "AutoFeatureExtractor"}
    assert {path: load_class(path)._auto_class for path in expected} == expected


def test_the_pipelines_that_travel_are_those_of_the_table() -> None:
    for task, entry in PIPELINES.items():
        module, name = entry.pipeline.split(":")
        assert CUSTOM_PIPELINES[task]["impl"] == f"{module.split('.')[-1]}.{name}"
        assert CUSTOM_PIPELINES[task]["pt"] == list(entry.auto_models)
        registered = PIPELINE_REGISTRY.supported_tasks[task]
        assert registered["impl"] is load_class(entry.pipeline)
        assert registered["type"] == CUSTOM_PIPELINES[task]["type"]
    assert set(CUSTOM_PIPELINES) == set(PIPELINES)


def test_what_type_checkers_see_of_the_package_is_what_it_exports() -> None:
    """The block under `TYPE_CHECKING` of `ehrseq/__init__.py`, `__all__` and the table of lazy exports agree."""
    tree = ast.parse(Path(ehrseq.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.name: str(node.module).removeprefix("ehrseq.") for alias in node.names}
    assert seen == ehrseq._EXPORTS
    assert sorted(ehrseq.__all__) == sorted([*seen, "__version__"])
    assert {path.split(":")[1]: path.split(":")[0] for path in registered_classes()}.items() <= seen.items()


def test_registering_twice_changes_nothing() -> None:
    before = dict(PIPELINE_REGISTRY.supported_tasks["ehr-risk"])
    register_all()
    assert PIPELINE_REGISTRY.supported_tasks["ehr-risk"] == before
    assert not hasattr(ehrseq.EhrRiskPipeline, "_registered_impl")


def test_a_class_is_imported_when_it_is_asked_for_and_what_a_user_registered_stays() -> None:
    config, model = "modeling.configuration_ehr_lstm:EhrLstmConfig", "modeling.modeling_ehr_lstm:EhrLstmModel"
    items = LazyItems({"bert": str}, {"absent": "modeling.nowhere:NoConfig", "lstm": config, config: model})
    assert items["bert"] is items.get("bert") is str
    assert items.get("gpt2") is None
    assert "gpt2" not in items
    assert str not in items
    assert "lstm" in items
    assert items["lstm"] is ehrseq.EhrLstmConfig
    items[ehrseq.EhrLstmConfig] = dict
    assert items[ehrseq.EhrLstmConfig] is dict
    with pytest.raises(ModuleNotFoundError, match=r"ehrseq\.modeling\.nowhere"):
        items["absent"]
    with pytest.raises(KeyError, match="gpt2"):
        items["gpt2"]
    whole = LazyItems({"bert": str}, {"lstm": config, config: model})
    expected = {"bert": str, "lstm": ehrseq.EhrLstmConfig, ehrseq.EhrLstmConfig: ehrseq.EhrLstmModel}
    assert len(whole) == 3
    assert dict(whole) == expected
    assert list(whole) == list(expected)
    assert LazyItems({"bert": str}, {"lstm": config, config: model}).copy() == expected
    assert pickle.loads(pickle.dumps(LazyItems({}, {"lstm": config}))) == {"lstm": ehrseq.EhrLstmConfig}


def test_a_class_that_cannot_be_imported_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "broken", FAMILIES["ehr_lstm"].__class__("modeling.nowhere:NoConfig", models={}))
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    monkeypatch.setattr(mapping, "_extra_content", {})
    registrations()["transformers.models.auto.configuration_auto"](transformers.models.auto.configuration_auto)
    with pytest.raises(ModuleNotFoundError, match=r"ehrseq\.modeling\.nowhere"):
        transformers.AutoConfig.for_model("broken")
    assert type(transformers.AutoConfig.for_model("hymate")) is ehrseq.HyMaTEConfig


@pytest.mark.parametrize("name", ehrseq.__all__)
def test_every_export_loads(name: str) -> None:
    assert getattr(ehrseq, name) is not None
    assert name in dir(ehrseq)


def test_an_unknown_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'EhrMamba3'"):
        _ = ehrseq.EhrMamba3


def test_nothing_waits_once_everything_is_imported() -> None:
    for name in registrations():
        import_module(name)
    assert not any(type(finder).__module__ == "ehrseq._on_import" for finder in sys.meta_path)


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if before is None else {"OMP_WAIT_POLICY": before}
    code = "import os, ehrseq; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == after
