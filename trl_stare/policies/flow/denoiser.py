"""pi0 in two parts: what is seen is read once, and the velocity of noisy actions is asked for as often as needed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor


class Prefix(NamedTuple):
    """What the vision-language part made of `N` observations.

    Attributes:
        cache (`Cache`): keys and values that the action expert attends to. length (`int`): its tokens.
        features (`Tensor`): `[N, F]`, the mean hidden state of the prompt, and the proprioception, which pi0 reads only later.
    """

    cache: Any
    length: int
    features: Tensor


def inner_model(model: Any) -> Any:
    """The `PI0ForConditionalGeneration` in `model`, its adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def read_prefix(model: Any, inputs: dict[str, Tensor]) -> Prefix:
    """One forward of the vision-language part; the steps are those of `PI0ForConditionalGeneration.sample_actions`.

    Raises:
        ValueError: under gradient checkpointing, which in training switches off the cache that pi0 is built on.
    """
    pi0 = inner_model(model)
    pixels = (inputs["pixel_values"].float() / 127.5 - 1).to(pi0.dtype)  # SigLIP's mean and std are 0.5
    mask = inputs["attention_mask"]
    embeds = pi0.model.embed_prefix(inputs["input_ids"], pixels, inputs["pixel_attention_mask"])
    output = pi0.model.vlm(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        token_type_ids=torch.zeros_like(mask),  # 0: the whole prompt attends to itself in both directions
        use_cache=True,
    )
    cache = output.past_key_values
    if cache is None or cache.get_seq_length() == 0:
        raise ValueError(
            "`gradient_checkpointing` must be False for pi0, whose action expert reads the prompt's cache."
        )
    hidden = (output.last_hidden_state.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return Prefix(cache, cache.get_seq_length(), torch.cat([hidden, inputs["state"].float()], dim=-1))


def velocity(model: Any, inputs: dict[str, Tensor], prefix: Prefix, x: Tensor, time: Tensor) -> Tensor:
    """`[N, C, D]` float32, the velocity of `x` `[N, C, D]` at `time` `[N]`, differentiable."""
    pi0 = inner_model(model)
    output = pi0(
        state=inputs["state"].to(pi0.dtype),
        noise=x.to(pi0.dtype),
        timestep=time.float(),
        attention_mask=inputs["attention_mask"],
        pixel_attention_mask=inputs["pixel_attention_mask"],
        past_key_values=prefix.cache,
    )
    # what this step added must not be seen by the next one; `crop` takes how much to drop, as a negative number
    added = prefix.cache.get_seq_length() - prefix.length
    if added:
        prefix.cache.crop(-added)
    return output.logits.float()
