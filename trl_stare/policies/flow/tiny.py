"""A pi0 of random weights, small enough for a CPU: the real classes and code paths, for tests and dry runs."""

from __future__ import annotations

from typing import Any

from transformers import PI0Config, PI0ForConditionalGeneration

from trl_stare.policies.flow.policy import FlowPolicy
from trl_stare.policies.flow.processing import FlowProcessor
from trl_stare.policies.tiny.processing import build_tokenizer


def create_tiny_pi0(norm_stats: dict[str, Any], *, image_size: int = 28, **config: Any) -> FlowPolicy:
    """A random pi0 with a two-layer SigLIP on 14 x 14 patches and two-layer Gemmas (0.2 M parameters).

    Args:
        norm_stats (`dict`): `{key: {"action": {"q01": [A], "q99": [A]}, "state": {"mean": [P], "std": [P]}}}`.
        image_size (`int`): pixels of a side, a multiple of 14.
        config: for `PI0Config`, e.g. `chunk_size`, `num_inference_steps`, `flow`.
    """
    tokenizer = build_tokenizer(0, 0)
    expert = {"model_type": "gemma", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
    expert |= {"head_dim": 16, "hidden_size": 32, "intermediate_size": 64}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": image_size, "patch_size": 14, "vision_use_head": False}
    text = expert | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(tokenizer)}
    vlm = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 64}
    # as in the published checkpoints, the placeholder is an id past the vocabulary
    vlm["image_token_id"] = len(tokenizer)
    settings = {"chunk_size": 4, "max_state_dim": 32, "max_action_dim": 8, "num_inference_steps": 4}
    model = PI0ForConditionalGeneration(
        PI0Config(vlm_config=vlm, dit_config=expert, norm_stats=norm_stats, **settings | config)
    ).eval()
    patches = (image_size // 14) ** 2
    return FlowPolicy(model, FlowProcessor(tokenizer, image_size, patches, len(tokenizer)))
