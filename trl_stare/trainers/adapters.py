"""Adapters as TRL's command line asks for them, for policies."""

from __future__ import annotations

from typing import Any

from accelerate.utils import is_peft_model
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import ModelConfig, get_peft_config


def get_policy_peft_config(model_args: ModelConfig) -> PeftConfig | None:
    """TRL's `get_peft_config`, for models that PEFT has no task type for: it would wrap them as text models, which call `generate`.

    Args:
        model_args ([`~trl.ModelConfig`]): `use_peft`, `lora_r`, `lora_target_modules` and the others.

    Example: `get_policy_peft_config(ModelConfig(use_peft=True, lora_r=32)).r` is 32; without `use_peft` it is `None`.
    """
    config = get_peft_config(model_args)
    if config is not None:
        config.task_type = None
    return config


def adapter_settings(model_args: ModelConfig) -> dict[str, Any] | None:
    """What of a new adapter a run that is continued must have in common with its beginning, in plain values; `None` without one.

    PEFT loads an adapter's weights into one of other settings: with another `lora_alpha` they count for more or less.

    Example: of `ModelConfig(use_peft=True, lora_r=32)` `lora_r` is 32, and `lora_alpha` is among them.
    """
    if not model_args.use_peft:
        return None
    return {
        name: value for name, value in vars(model_args).items() if name.startswith(("lora_", "use_rslora", "use_dora"))
    }


def require_trainable(model: Any, peft_config: PeftConfig | None = None) -> None:
    """Refuse a model on which training would be lost.

    Args:
        model (`PreTrainedModel` or `PeftModel`): what is to be trained. peft_config ([`~peft.PeftConfig`], *optional*): of a new adapter.

    Raises:
        ValueError: if an adapter was put into the model itself, where a new one would take its place and a checkpoint would mix its
            weights with the model's, or nothing is trainable.
    """
    loaded = not is_peft_model(model) and any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if loaded or (peft_config is None and not any(parameter.requires_grad for parameter in model.parameters())):
        found = "one that an adapter was put into" if loaded else "one without a trainable weight"
        raise ValueError(
            f"`policy.model` must be trainable, got {found}. Load it from `whole_checkpoint(...)`, or put a new adapter on it."
        )
