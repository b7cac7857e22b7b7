"""The methods: which model has which, and the one call that explains a patient by name of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ehrseq.interpretability.explanation import Explanation
from ehrseq.interpretability.questions import read_question

if TYPE_CHECKING:
    from ehrseq.hub.checkpoints import Checkpoint

EVENT_FAMILIES = ("ehrmamba", "ehr_lstm", "cehrbert", "ehr_bigbird")
ALL_FAMILIES = (*EVENT_FAMILIES, "hymate")


@dataclass(frozen=True)
class Method:
    """A way to explain.

    Attributes:
        path: The function, written `module:function` in this package; it takes a question and its settings.
        families: `model_type`s that have it.
        summary: What it does, in one line.
        explains: Whether it gives an `Explanation`; else it shows weights, which sum to nothing.
        needs: What must be installed for it; None = nothing.
    """

    path: str
    families: tuple[str, ...]
    summary: str
    explains: bool = True
    needs: str | None = None

    def load(self) -> Callable[..., Any]:
        """The function."""
        module, name = self.path.split(":")
        function: Callable[..., Any] = getattr(import_module(f"ehrseq.interpretability.{module}"), name)
        return function


METHODS: dict[str, Method] = {
    "prefix_deltas": Method(
        "record_prefixes:prefix_deltas",
        ALL_FAMILIES,
        "The change of the risk with each event, visit or day: exact sums.",
    ),
    "occlusion": Method(
        "counterfactuals:occlusion",
        ALL_FAMILIES,
        "The risk of the same record without some of its events.",
    ),
    "relevance": Method(
        "relevance_propagation:relevance",
        ("ehrmamba", "cehrbert", "ehr_bigbird", "hymate"),
        "Relevance propagation (MambaLRP; attention weights constant): one backward pass.",
    ),
    "integrated_gradients": Method(
        "gradient_integrals:integrated_gradients",
        ALL_FAMILIES,
        "Gradients along the way from a baseline to the record.",
        needs="captum",
    ),
    "gradient_times_input": Method(
        "gradients:gradient_times_input", ALL_FAMILIES, "One gradient: fast, and no sum to rely on."
    ),
    "random_contributions": Method(
        "gradients:random_contributions", ALL_FAMILIES, "Noise that sums to the risk: what a method must beat."
    ),
    "hidden_attention": Method(
        "mamba_attention:hidden_attention",
        ("ehrmamba", "hymate"),
        "Weights with which the selective scan reads earlier tokens.",
        explains=False,
    ),
    "attentions": Method(
        "attention_weights:attentions", ("cehrbert", "ehr_bigbird", "hymate"), "Attention weights.", explains=False
    ),
    "fusion_weights": Method(
        "attention_weights:fusion_weights", ("hymate",), "Weights with which HyMaTE pools a stay.", explains=False
    ),
}
"""Name -> method."""


def methods_of(model: Any) -> dict[str, Method]:
    """The methods that a model has.

    Args:
        model: A risk model, or the name of its family (`config.model_type`).
    """
    family = model if isinstance(model, str) else model.config.model_type
    return {name: method for name, method in METHODS.items() if family in method.families}


def default_method(model: Any) -> str:
    """The method that a model is explained by where nobody says which.

    Prefix deltas, which one pass gives, of EhrMamba; of the others integrated gradients where captum is installed.
    """
    family = model if isinstance(model, str) else model.config.model_type
    if family == "ehrmamba" or find_spec("captum") is None:
        return "prefix_deltas"
    return "integrated_gradients"


def choose_method(model: Any, name: str | None = None) -> Method:
    """A model's method of this name.

    Raises:
        ValueError: The model has no such method, or what it needs is not installed.
    """
    name = default_method(model) if name is None else name
    available = methods_of(model)
    if name not in available:
        family = model if isinstance(model, str) else model.config.model_type
        raise ValueError(f"method got {name!r}; a model of the family {family!r} has {list(available)}.")
    method = available[name]
    if method.needs is not None and find_spec(method.needs) is None:
        raise ValueError(f'{name} needs {method.needs}, which is not installed: pip install "ehrseq[explain]".')
    return method


def explain(
    checkpoint: Checkpoint | tuple[Any, Any],
    patient: Any,
    task: str,
    method: str | None = None,
    prediction_time: Any = None,
    max_length: int | None = None,
    **settings: Any,
) -> Explanation:
    """Explain the risk of one patient.

    Args:
        checkpoint: `load_checkpoint(...)`, or a model and its encoder.
        patient: As in `read_question`.
        task: Name of a task of the model.
        method: Name of a method; default: the model's recommended one.
        prediction_time: Nothing later is read; default: the patient's own, else the last event's.
        max_length: Context length, the model's by default.
        settings: Of the method.

    Returns:
        The explanation; with a reason and without contributions where the task does not apply. Methods that show
        weights (attentions) give `AttentionWeights`.

    Raises:
        ValueError: A method that the model lacks, a setting that the method lacks, and what `read_question` refuses.
    """
    function = choose_method(checkpoint[0], method).load()
    question = read_question(checkpoint, patient, task, prediction_time, max_length)
    result: Explanation = function(question, **settings)
    return result
