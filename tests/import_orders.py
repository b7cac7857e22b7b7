"""Run as a script: many imports of the package, each in a fork of an interpreter that has torch and nothing of ours.

A fork costs what transformers and the package take, not what torch and accelerate take. Prints, as JSON, what went
wrong by case.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import importlib
import json
import logging
import os
import pickle
import random
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

for heavy in (
    *("safetensors.torch", "torch._dynamo", "torch.distributed.tensor", "tokenizers", "huggingface_hub"),
    *("scipy.optimize", "jinja2.ext", "PIL.Image", "yaml", "accelerate", "huggingface_hub.hf_api", "regex", "psutil"),
):
    importlib.import_module(heavy)
assert "transformers" not in sys.modules
ORDERS = {
    "transformers, ehrseq": "import transformers, ehrseq",
    "a class of ours": "from ehrseq import EhrMambaForSequenceClassification",
    "a model's module": "import ehrseq.modeling.modeling_ehrmamba",
    "pipeline, ehrseq": "from transformers import pipeline\nimport ehrseq",
}
THREADED = [
    *("transformers", "transformers.pipelines", "ehrseq", "ehrseq.hub", "ehrseq.pipelines.ehr_risk"),
    *("ehrseq.tokenization.tokenization_ehr", "ehrseq.tokenization.feature_extraction_hymate"),
    *(f"ehrseq.modeling.modeling_{name}" for name in ("ehrmamba", "hymate", "ehr_bigbird", "ehr_lstm")),
    *("ehrseq.modeling.mamba_block", "ehrseq.modeling.event_encoder", "ehrseq.modeling.configuration_ehrmamba"),
]


def check_registered(checkpoint: str | None = None) -> None:
    """Every class of the tables is registered, and wins over a checkpoint's own code without asking for trust."""
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY

    import ehrseq
    from ehrseq.hub.families import FAMILIES
    from ehrseq.hub.registration import registrations

    for model_type, family in FAMILIES.items():
        config = type(transformers.AutoConfig.for_model(model_type))
        for auto, path in family.models.items():
            model = getattr(transformers, auto)._model_mapping[config]
            assert model is getattr(ehrseq, path.split(":")[1]), path
            assert model is getattr(sys.modules[model.__module__], model.__name__), path
    assert PIPELINE_REGISTRY.supported_tasks["ehr-risk"]["impl"] is ehrseq.EhrRiskPipeline
    for name in registrations():  # some are imported only when they are needed
        importlib.import_module(name)
    assert not any(type(finder).__module__ == "ehrseq._on_import" for finder in sys.meta_path), "it still watches"
    assert type(transformers.__spec__.loader).__module__ == "_frozen_importlib_external"
    for trust in (None, False, True) if checkpoint else ():
        options = {} if trust is None else {"trust_remote_code": trust}
        assert type(transformers.AutoConfig.from_pretrained(checkpoint, **options)) is ehrseq.EhrMambaConfig
        assert type(transformers.AutoTokenizer.from_pretrained(checkpoint, **options)) is ehrseq.EhrTokenizer
        model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, **options)
        assert type(model) is ehrseq.EhrMambaForSequenceClassification


def import_in_order(statements: str, checkpoint: str) -> None:
    exec(statements, {})
    check_registered(checkpoint)


def import_in_threads(seed: int) -> None:
    """Several threads import at once, behind one of the two packages or with nothing imported yet.

    Where nothing watches transformers yet, threads import the two packages alone: of two threads that import
    transformers itself at once, Python 3.11 gives one a module without content.
    """
    draw = random.Random(seed)
    sys.setswitchinterval(draw.choice([5e-6, 1e-4, 5e-3]))
    first = draw.choice(["ehrseq", "ehrseq", "transformers", None])
    names = [draw.choice(THREADED if first else ["transformers", "ehrseq"]) for _ in range(draw.choice([2, 4, 7]))]
    if first:
        __import__(first)
    else:
        names = ["transformers", *["ehrseq"] * (len(names) - 1)]
    barrier, failures = threading.Barrier(len(names)), []

    def work(name: str, delay: float) -> None:
        barrier.wait()
        time.sleep(delay)
        try:
            __import__(name)
        except BaseException:
            failures.append(f"{name}: {traceback.format_exc()}")

    delays = [draw.choice([0.0, 0.0, draw.random() * 0.05, draw.random()]) for _ in names]
    threads = [threading.Thread(target=work, args=pair) for pair in zip(names, delays, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, f"first {first}, then {list(zip(names, delays, strict=True))}: " + "\n".join(failures)
    check_registered()


def look_before_importing(checkpoint: str) -> None:
    """ehrseq, transformers. In between, asking where transformers is imports nothing and gives an ordinary spec."""
    import ehrseq  # noqa: F401

    before = set(sys.modules)
    spec = find_spec("transformers")
    assert spec is not None
    assert set(sys.modules) - before <= {"importlib.machinery"}
    loader: Any = spec.loader
    assert "_LazyModule" in loader.get_source("transformers")
    assert loader.path == spec.origin
    for twin in (pickle.loads(pickle.dumps(spec)), copy.copy(spec), copy.deepcopy(spec)):
        assert (twin.name, twin.origin) == (spec.name, spec.origin)
    assert type(pickle.loads(pickle.dumps(spec)).loader).__name__ == "SourceFileLoader"
    assert "transformers" not in sys.modules
    import transformers  # noqa: F401

    check_registered(checkpoint)
    assert find_spec("transformers") is not None


def save_without_registration(checkpoints: Path) -> None:
    """A class carries its code whoever imported it: here nothing was registered."""
    import ehrseq  # noqa: F401

    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "ehrseq._on_import"]
    from ehrseq.modeling.configuration_hymate import HyMaTEConfig
    from ehrseq.modeling.modeling_hymate import HyMaTEModel
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    with tempfile.TemporaryDirectory() as folder:
        HyMaTEModel(HyMaTEConfig(hidden_size=8)).save_pretrained(folder)
        HyMaTEFeatureExtractor.from_pretrained(checkpoints / "hymate").save_pretrained(folder)
        auto_maps = [read_json(folder, name)["auto_map"] for name in ("config.json", "preprocessor_config.json")]
        assert auto_maps[0]["AutoConfig"] == "configuration_hymate.HyMaTEConfig"
        assert auto_maps[0]["AutoModel"] == "modeling_hymate.HyMaTEModel"
        assert auto_maps[1]["AutoFeatureExtractor"] == "feature_extraction_hymate.HyMaTEFeatureExtractor"
        files = ("configuration_hymate.py", "modeling_hymate.py", "feature_extraction_hymate.py", "ehr_risk.py")
        assert all(Path(folder, name).is_file() for name in files)
    with tempfile.TemporaryDirectory() as folder:
        EhrTokenizer.from_pretrained(checkpoints / "ehrmamba").save_pretrained(folder)
        assert (
            "tokenization_ehr.EhrTokenizer" in read_json(folder, "tokenizer_config.json")["auto_map"]["AutoTokenizer"]
        )
        assert Path(folder, "tokenization_ehr.py").is_file()


def read_json(folder: str, name: str) -> dict[str, Any]:
    return json.loads(Path(folder, name).read_text())


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def fork(run: Callable[[], None]) -> str:
    """Run something in a fork; returns "" or what went wrong."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        status = os.waitpid(child, 0)[1]
        return text or ("" if status == 0 else f"ended with status {status}")
    gc.disable()  # a collection would go through all of torch, and copy its pages
    faulthandler.dump_traceback_later(150, exit=True)  # a deadlock
    warnings, text = _Warnings(), ""
    logging.getLogger("transformers").addHandler(warnings)
    try:
        run()
        text = "\n".join(warning for warning in warnings.texts if "registered" in warning)
    except BaseException:
        text = traceback.format_exc()
    with os.fdopen(writer, "w") as pipe:
        pipe.write(text)
    os._exit(0)


def main(checkpoints: Path, seeds: list[int], orders: bool) -> None:
    cases: dict[str, Callable[[], None]] = {f"threads {seed}": partial(import_in_threads, seed) for seed in seeds}
    if orders:
        checkpoint = str(checkpoints / "ehrmamba")
        cases |= {name: partial(import_in_order, code, checkpoint) for name, code in ORDERS.items()}
        cases["ehrseq, transformers"] = partial(look_before_importing, checkpoint)
        cases["no registration"] = partial(save_without_registration, checkpoints)
    problems = {name: fork(run) for name, run in cases.items()}
    print(json.dumps({name: text for name, text in problems.items() if text}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
