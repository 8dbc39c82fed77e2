"""Adapters as TRL's command line asks for them, for policies."""

from __future__ import annotations

from peft import PeftConfig
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
