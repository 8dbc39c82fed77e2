"""LeRobot's pi0 in transformers' own class; `trl_stare.policies.lerobot` has its other models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PI0Config, PI0ForConditionalGeneration
from transformers.utils import cached_file

from trl_stare.policies.flow.policy import FlowPolicy
from trl_stare.policies.flow.processing import FlowProcessor

LEROBOT_NAMES = {
    "paligemma_with_expert.paligemma.model.": "model.vlm.",
    "paligemma_with_expert.paligemma.lm_head.": "model.vlm.language_model.embed_tokens.",
    "paligemma_with_expert.gemma_expert.model.": "model.dit.",
    "paligemma_with_expert.gemma_expert.lm_head.": "model.dit.embed_tokens.",
    "state_proj.": "embed_action_time.state_proj.",
    "action_in_proj.": "embed_action_time.action_in_proj.",
    "action_time_mlp_in.": "embed_action_time.action_time_mlp_in.",
    "action_time_mlp_out.": "embed_action_time.action_time_mlp_out.",
    "action_out_proj.": "action_out_proj.",
}
"""LeRobot's prefix -> transformers'. Newer LeRobot checkpoints put `model.` before all of them. transformers renames by itself when
it loads and, back again, when it saves (`conversion_mapping.py`, "pi0"): what we save has LeRobot's names too."""

_SAME_FIELDS = ("chunk_size", "max_state_dim", "max_action_dim", "num_inference_steps", "min_period", "max_period")


def lerobot_name(name: str) -> str:
    """The name in `PI0ForConditionalGeneration` of a tensor of LeRobot's pi0.

    Raises:
        ValueError: LeRobot's pi0 has no such tensor.

    Example: `"model.state_proj.bias"` is `"embed_action_time.state_proj.bias"`.
    """
    short = name.removeprefix("model.")
    for theirs, ours in LEROBOT_NAMES.items():
        if short.startswith(theirs):
            return ours + short.removeprefix(theirs)
    raise ValueError(f"`name` must be of LeRobot's pi0, beginning with one of {sorted(LEROBOT_NAMES)}, got {name!r}.")


def load_lerobot_pi0(
    folder: str | Path,
    *,
    tokenizer: Any,
    norm_stats: dict[str, Any],
    settings: Mapping[str, Any] | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> FlowPolicy:
    """What [`~trl_stare.policies.load_lerobot_policy`] does with a pi0.

    Args:
        folder (`str`), tokenizer (`PreTrainedTokenizerBase`), norm_stats (`dict`): as there.
        settings (`Mapping`, *optional*): fields of `PI0Config`. revision (`str`, *optional*): on the Hub. kwargs: for `from_pretrained` of the model, e.g. `dtype`.

    Raises:
        ValueError: not a pi0, or tensors that are missing.
    """
    path = cached_file(folder, "config.json", revision=revision)
    theirs = json.loads(Path(path).read_text())
    if theirs.get("type") != "pi0":
        raise ValueError(
            f"`{folder}` must be a pi0 that LeRobot wrote, got type {theirs.get('type')!r} in config.json."
        )
    known = {name: theirs[name] for name in _SAME_FIELDS if name in theirs}
    config = PI0Config(**known | dict(settings or {}), norm_stats=norm_stats)
    model, info = PI0ForConditionalGeneration.from_pretrained(
        folder, config=config, output_loading_info=True, revision=revision, **kwargs
    )
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        raise ValueError(
            f"`{folder}` must hold the tensors of pi0, got {problems}. Give the checkpoint's architecture by `settings`."
        )
    vision = config.vlm_config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return FlowPolicy(model, FlowProcessor(tokenizer, vision.image_size, patches, config.vlm_config.image_token_id))
