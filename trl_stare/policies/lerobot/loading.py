"""From a checkpoint that LeRobot wrote to a policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from trl_stare.policies.flow import FlowPolicy
from trl_stare.policies.flow.lerobot import load_lerobot_pi0
from trl_stare.policies.lerobot.configuration import NUM_STEPS, LeRobotFlowConfig
from trl_stare.policies.lerobot.modeling import LeRobotFlowModel
from trl_stare.policies.lerobot.policy import LeRobotFlowPolicy
from trl_stare.policies.lerobot.processing import LeRobotFlowProcessor


def load_lerobot_policy(
    folder: str | Path,
    *,
    tokenizer: Any,
    norm_stats: dict[str, Any],
    settings: Mapping[str, Any] | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> FlowPolicy:
    """A [`FlowPolicy`] from a checkpoint that LeRobot wrote: pi0, or, where LeRobot is installed, SmolVLA or pi0.5.

    LeRobot keeps neither tokenizer nor, in older versions, statistics in the checkpoint; save the policy, and both are.

    Args:
        folder (`str`): a folder or a Hub id with LeRobot's `config.json` and `model.safetensors`, such as `lerobot/pi0_base`.
        tokenizer (`PreTrainedTokenizerBase`): PaliGemma's (`google/paligemma-3b-pt-224`) for pi0 and pi0.5, SmolVLM2's
            (`HuggingFaceTB/SmolVLM2-500M-Video-Instruct`) for SmolVLA.
        norm_stats (`dict`): `{key: {"action": {"mean": [A], "std": [A]}, "state": {"mean": [P], "std": [P]}}}`, of the data that the
            checkpoint was trained on or that it will be; pi0.5 has `q01` and `q99` in place of `mean` and `std`.
        settings (`Mapping`, *optional*): of pi0, fields of `PI0Config` that are not the checkpoint's or the published architecture's; of the
            others, fields of [`LeRobotFlowConfig`]. E.g. `{"chunk_size": 10, "flow": {"action_convention": "bridge"}}`.
        revision (`str`, *optional*): of the checkpoint on the Hub. kwargs: for `from_pretrained` of pi0, e.g. `dtype`; the others know float32 only.

    Raises:
        ImportError: LeRobot is needed and not there. ValueError: another model, or tensors that are missing or left over.

    Example: `load_lerobot_policy("lerobot/smolvla_base", tokenizer=AutoTokenizer.from_pretrained(...), norm_stats=...)`.
    """
    theirs = json.loads(Path(cached_file(folder, "config.json", revision=revision)).read_text())
    kind = theirs.get("type")
    if kind == "pi0":
        of_pi0 = {"settings": settings, "revision": revision, **kwargs}
        return load_lerobot_pi0(folder, tokenizer=tokenizer, norm_stats=norm_stats, **of_pi0)
    if kind not in NUM_STEPS:
        raise ValueError(
            f"`{folder}` must be a checkpoint that LeRobot wrote, one of {['pi0', *sorted(NUM_STEPS)]}, got type {kind!r} in config.json."
        )
    kwargs = {name: value for name, value in kwargs.items() if value not in (None, "float32", torch.float32)}
    if kwargs:
        raise ValueError(
            f"`{', '.join(kwargs)}` must be left out for {kind!r}, got {kwargs}. Use the trainer's `bf16`."
        )
    model = LeRobotFlowModel(LeRobotFlowConfig(theirs, norm_stats, **dict(settings or {}))).eval()
    weights = load_file(cached_file(folder, "model.safetensors", revision=revision))
    if kind == "pi05":  # published ones lack the prefix, and have names of older versions
        renamed = model.lerobot_policy._fix_pytorch_state_dict_keys(weights, model.lerobot_policy.config)
        weights = {f"model.{name.removeprefix('model.')}": value for name, value in renamed.items()}
    _load(folder, model, weights)
    processor = LeRobotFlowProcessor(tokenizer, model.lerobot_policy.config.tokenizer_max_length)
    return LeRobotFlowPolicy(model, processor)


def _load(folder: str | Path, model: LeRobotFlowModel, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` into `model`. LeRobot itself only warns where it could not, and goes on with random ones.

    Raises:
        ValueError: names what is missing or left over.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # safetensors keeps one of the names that share a tensor
    own = model.state_dict()
    loaded = {own[name].data_ptr() for name in weights if name in own}
    problems = {"missing": [name for name in missing if own[name].data_ptr() not in loaded], "left over": unexpected}
    problems = {kind: sorted(names) for kind, names in problems.items() if names}
    if problems:
        raise ValueError(f"`{folder}` must hold the tensors of its `config.json`, got {problems}.")
