"""What makes a checkpoint folder stand by itself: its own code, the pipeline included.

transformers copies the files of a custom class, and names them in `auto_map`, for the one Auto class that the saved
object was registered under. A checkpoint of this package promises more: whoever has no `ehrseq` installed loads the
same folder with any fitting Auto class, and with `pipeline("ehr-risk", model=folder, trust_remote_code=True)`. Two
mixins keep that promise:

1. `EhrHubMixin.save_pretrained` writes the whole `auto_map`, the pipeline's file, and `custom_pipelines` into
   `config.json`.
2. `EhrConfigMixin.from_dict` leaves `custom_pipelines` out where the class comes from the installed package:
   transformers asks for trust as soon as a loaded config has that field, even when the task is registered. So users of
   the package are never asked, while a class that was itself loaded as remote code keeps the field, which is how its
   pipeline is found.
"""

import os
import shutil
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file, logging

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _ConfigBase
    from transformers import PreTrainedModel as _ModelBase
else:
    _ConfigBase = _ModelBase = object

logger = logging.get_logger(__name__)

# Pipeline task -> what transformers' `pipeline` factory needs to build it from the files of a checkpoint.
CUSTOM_PIPELINES: dict[str, dict[str, Any]] = {
    "ehr-risk": {
        "impl": "ehr_risk.EhrRiskPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "multimodal",
    },
    "ehr-forecast": {
        "impl": "ehr_forecast.EhrForecastPipeline",
        "pt": ["AutoModelForPreTraining"],
        "type": "multimodal",
    },
}
FORECASTING = ("ehrmamba", "hymate")
"""Types of models whose pretrained head foretells what comes next: only their checkpoints carry "ehr-forecast"."""


def is_remote_code() -> bool:
    """Whether this very file was loaded from a checkpoint (`trust_remote_code=True`) and not from the package."""
    return __name__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


class EhrConfigMixin(_ConfigBase):
    """First base of every configuration class of the package; see the module's text for why."""

    _auto_class: ClassVar[str | None] = "AutoConfig"  # so that what saves it carries its code

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)  # makes the dataclass and its `__init__`
        initialise = cls.__init__

        @wraps(initialise)
        def __init__(self: Any, *positional: Any, **arguments: Any) -> None:  # noqa: N807
            initialise(self, *positional, **cls.from_common_names(arguments))

        cls.__init__ = __init__  # type: ignore[method-assign]

    @classmethod
    def from_common_names(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """A config's arguments with names that all models of transformers have replaced by the fields they stand for.

        Raises:
            ValueError: A value that contradicts such a field.
        """
        return arguments

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config as `PreTrainedConfig.from_dict` does, without `custom_pipelines` inside the package."""
        if not is_remote_code():
            config_dict = {key: value for key, value in config_dict.items() if key != "custom_pipelines"}
        return super().from_dict(config_dict, **kwargs)


class EhrHubMixin(_ModelBase):
    """First base of every model class of the package.

    Attributes:
        auto_classes: Auto class -> class name, for every class of the model's file. A checkpoint that was saved by one
            of them can then be loaded as any other (the backbone of a classifier; a classifier on pretrained weights).
    """

    auto_classes: ClassVar[dict[str, str]] = {}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel.save_pretrained` does, with the complete `auto_map` and the pipelines' code."""
        carries_code = self._auto_class is not None and not os.path.isfile(save_directory)
        if carries_code:
            module_name = type(self).__module__.split(".")[-1]
            # The entry of the config class is written by the config itself.
            self.config.auto_map = {auto: f"{module_name}.{name}" for auto, name in self.auto_classes.items()}
            if kwargs.get("is_main_process", args[0] if args else True):
                self.config.custom_pipelines = _copy_pipelines(Path(save_directory), self.config)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if carries_code and not is_remote_code():
                self.config.__dict__.pop("custom_pipelines", None)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does, and remember which weights the checkpoint lacked."""
        kwargs.setdefault("use_safetensors", True)  # a pickle runs what it holds: only where it is asked for
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        absent = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        model._drawn_at_load = {name: _sample(weight) for name, weight in model.named_parameters() if name in absent}
        return (model, info) if output_loading_info else model

    def untrained_weights(self) -> list[str]:
        """Names of weights that the loaded checkpoint lacked and that still hold their random start.

        transformers only warns of such weights. A head among them gives scores that look like risks and mean nothing.
        """
        drawn: dict[str, Tensor] = getattr(self, "_drawn_at_load", {})
        weights = dict(self.named_parameters())
        same = [name for name, start in drawn.items() if name in weights and torch.equal(_sample(weights[name]), start)]
        return same if len(same) == len(drawn) else []

    def _upload_modified_files(  # type: ignore[override]
        self, working_dir: str | os.PathLike[str], repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        # The code may be older than the time at which transformers began to watch the folder for new files.
        watched = {name: at for name, at in files_timestamps.items() if not name.endswith(".py")}
        return super()._upload_modified_files(working_dir, repo_id, watched, **kwargs)


def _sample(weight: Tensor) -> Tensor:
    """A few values, enough to see that a weight was trained."""
    return weight.detach().flatten()[:64].float().cpu().clone()


def _copy_pipelines(folder: Path, config: Any) -> dict[str, dict[str, Any]]:
    """Copy the pipelines' files into `folder`; returns the `custom_pipelines` of those that were found."""
    folder.mkdir(parents=True, exist_ok=True)
    copied = {}
    for task, entry in CUSTOM_PIPELINES.items():
        if task == "ehr-forecast" and config.model_type not in FORECASTING:
            continue
        file_name = entry["impl"].split(".")[0] + ".py"
        source = _find_code(file_name, config)
        if source is None:
            logger.warning(
                f"{file_name} was found neither beside {__file__} nor in {config.name_or_path!r}: the checkpoint in "
                f'{folder} can be loaded by the Auto classes, but not by pipeline("{task}") without ehrseq.'
            )
            continue
        for needed in [source, *map(Path, get_relative_import_files(source))]:
            if needed.parent.resolve() != folder.resolve():
                shutil.copyfile(needed, folder / needed.name)
        copied[task] = dict(entry)
    return copied


def _find_code(file_name: str, config: Any) -> Path | None:
    """A travelling file: in the package, beside this file (remote code), or in the checkpoint that was loaded."""
    here = Path(__file__).parent
    places = [here / file_name] if is_remote_code() else [here.parent / "pipelines" / file_name]
    for place in places:
        if place.is_file():
            return place
    if not config.name_or_path:
        return None
    try:
        found = cached_file(config.name_or_path, file_name, revision=getattr(config, "_commit_hash", None))
    except OSError:
        return None
    return None if found is None else Path(found)
