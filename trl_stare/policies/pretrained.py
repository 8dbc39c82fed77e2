"""What every policy with a Hugging Face checkpoint shares: loading by the model's type, and saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from trl_stare.checkpoints import require_checkpoint
from trl_stare.interfaces import ADAPTER_CONFIG_NAME
from trl_stare.policies.normalization import select_statistics

WHERE = ("revision", "token", "cache_dir", "local_files_only")
"""What says where on the Hub files are: of the model, its config and the processor alike."""


class PretrainedPolicy:
    """A policy around a `PreTrainedModel` and its processor; [`from_pretrained`] of any subclass loads all of them.

    Attributes:
        model (`PreTrainedModel`), processor (`ProcessorMixin`): saved together.
        processor_class (`type`): what loads the processor.
        num_cameras (`int` or `None`): what it looks through; `None` for any number.
        statistics_file (`str` or `None`): beside a checkpoint's config, its entries take the place of `norm_stats`.
    """

    processor_class: ClassVar[Any] = AutoProcessor
    statistics_file: ClassVar[str | None] = None
    model: Any
    processor: Any
    unnorm_key: str
    num_cameras: int | None = 1

    _classes: ClassVar[dict[str, type[PretrainedPolicy]]] = {}

    def __init_subclass__(cls, model_type: str | None = None, **kwargs: Any):
        """`model_type`: checkpoints of this type become this policy when they are loaded."""
        super().__init_subclass__(**kwargs)
        if model_type is not None:
            PretrainedPolicy._classes[model_type] = cls

    @classmethod
    def from_pretrained(cls, folder: str | Path, unnorm_key: str | None = None, **kwargs: Any) -> PretrainedPolicy:
        """Load model and processor from a folder or a Hub id, as the policy that fits the checkpoint's `model_type`.

        Args:
            folder (`str`): saved by [`save_pretrained`], with or without a PEFT adapter, or published, such as `openvla/openvla-7b`.
            unnorm_key (`str`, *optional*): which statistics to use; may be left out where the checkpoint has only one.
            kwargs: for `from_pretrained` of the model, e.g. `dtype`; fields of its config, and entries of its `config.vla`, are
                changed. The processor comes from the same `revision`.

        Raises:
            ValueError: the checkpoint is not a VLA, its `model_type` is registered nowhere, or `unnorm_key` is unknown (lists the
                known ones).
        """
        if Path(folder).is_dir():
            require_checkpoint(Path(folder))
            folder = Path(folder).resolve()  # an adapter notes where its base is, and may be loaded from elsewhere
        try:
            model = load_model(folder, **kwargs)
        except ValueError as error:
            if "does not recognize this architecture" not in str(error):
                raise
            raise ValueError(
                f"`{folder}` must hold a model whose `model_type` is registered, got one that is not. If it is your own, import its "
                "module first, in recipes by `--task_module`: see docs/own_vla.md."
            ) from error
        policy_class = _policy_class(model.config)
        if policy_class is None:
            raise ValueError(
                f"`{folder}` must hold a VLA, one of {sorted(cls._classes)}, got {model.config.model_type!r}. A "
                "vision-language model becomes one by `HFVLMPolicy.create`: see docs/own_vla.md."
            )
        processor = policy_class.processor_class.from_pretrained(folder, **_where(kwargs))
        return policy_class(model, processor, unnorm_key=unnorm_key)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write model and processor; [`from_pretrained`] reads them back exactly.

        Of a PEFT model only the active adapter is written, and with it the model's config: statistics and conventions may not be the base's.
        A `statistics_file` that was there is removed: the config holds the statistics in use, and the file would take their place.
        """
        if is_peft_model(self.model):  # a trainer may have put its frozen reference beside it
            kwargs = {"selected_adapters": self.model.active_adapters} | kwargs
        self.model.save_pretrained(folder, **kwargs)
        if hasattr(self.model, "peft_config"):
            self.model.config.to_json_file(Path(folder) / ADAPTER_CONFIG_NAME)
        self.processor.save_pretrained(folder)
        if self.statistics_file is not None:
            (Path(folder) / self.statistics_file).unlink(missing_ok=True)

    def keep_statistics(self) -> None:
        """Forget all statistics but those in use: what is then saved loads without an `unnorm_key`."""
        settings = vla_settings(self.model.config)
        key = select_statistics(settings["norm_stats"], self.unnorm_key)
        settings["norm_stats"] = {key: settings["norm_stats"][key]}

    @property
    def image_size(self) -> int | None:
        """Pixels of a side of the pictures that the model reads; `None` if its configuration does not say."""
        config = self.model.config
        size = getattr(config, "image_size", None) or getattr(
            getattr(config, "vision_config", None), "image_size", None
        )
        return max(size) if isinstance(size, (list, tuple)) else size

    @property
    def state_size(self) -> int | None:
        """Values of proprioception that the policy reads; `None` if its configuration does not say."""
        return getattr(self.model.config, "state_size", None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def vla_settings(config: Any) -> dict[str, Any]:
    """What makes a VLA of a model, by name, e.g. `norm_stats`; what is changed here is changed in `config`.

    Args:
        config (`PreTrainedConfig`): has it among its own fields, or in `vla` where any vision-language model was made a VLA.
    """
    return getattr(config, "vla", None) or vars(config)


def load_model(folder: str | Path, **kwargs: Any) -> Any:
    """`AutoModelForImageTextToText.from_pretrained`, but an adapter that came with a config of its own keeps it.

    Entries of `config.vla` are changed by their names, as fields of a config are. A `revision` is that of the repository `folder`: the
    base of an adapter is of the one that the adapter names, `main` where it names none. Of an adapter in a local folder it is the base's.
    The policy's `statistics_file` takes the place of the config's `norm_stats`, unless `norm_stats` are given.
    """
    where = _where(kwargs)
    places = [(folder, where)]
    stored = [name for name in (ADAPTER_CONFIG_NAME, CONFIG_NAME) if _find(folder, name, where)]
    adapter = find_adapter_config_file(folder, **where)
    if adapter is not None:
        kwargs["adapter_kwargs"] = {"revision": None} | where
        settings = json.loads(Path(adapter).read_text())
        if not (Path(folder).is_dir() and where.get("revision")):
            # transformers would demand the adapter's revision of the base too
            kwargs["revision"] = settings.get("revision")
        if not stored:  # an adapter of somebody else's has the config of its base
            places.append((settings["base_model_name_or_path"], _where(kwargs)))
    home, of_home = places[-1]
    config = AutoConfig.from_pretrained(home, _configuration_file=(stored or [CONFIG_NAME])[0], **of_home)
    vla = getattr(config, "vla", None) or {}
    if changes := {name: kwargs.pop(name) for name in vla.keys() & kwargs.keys()}:
        kwargs["vla"] = vla | changes
    name = getattr(_policy_class(config), "statistics_file", None)
    files = [_find(place, name, of_place) for place, of_place in places if name and "norm_stats" not in kwargs]
    if path := next(filter(None, files), None):
        kwargs["norm_stats"] = _read_statistics(path)
    if ADAPTER_CONFIG_NAME in stored:
        for name in [name for name in kwargs if name != "dtype" and hasattr(config, name)]:
            setattr(config, name, kwargs.pop(name))
        kwargs["config"] = config
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def _policy_class(config: Any) -> type[PretrainedPolicy] | None:
    """Of the model with this `config`."""
    kind = "hf_vlm" if getattr(config, "vla", None) else getattr(config, "policy_type", config.model_type)
    return PretrainedPolicy._classes.get(kind)


def _read_statistics(path: str) -> dict[str, Any]:
    """The content of a policy's `statistics_file`.

    Raises:
        ValueError: it is not a map.
    """
    text = Path(path).read_text()
    try:
        statistics = json.loads(text)
    except json.JSONDecodeError:
        statistics = None
    if not isinstance(statistics, dict):
        raise ValueError(f"`{path}` must hold statistics by their keys, got {text[:60]!r}. Copy the file again.")
    return statistics


def _find(folder: str | Path, name: str, where: dict[str, Any]) -> str | None:
    """Path of a checkpoint's file, downloaded where that is needed; `None` if there is none."""
    return cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **where)


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in WHERE}
