"""How much memory an OpenVLA under a LoRA takes, from its config alone: nothing is loaded, nothing is run."""

from __future__ import annotations

import torch
from torch import nn
from transformers.initialization import no_init_weights

from trl_stare.policies.memory import MemoryEstimate
from trl_stare.policies.openvla.configuration import OpenVLAConfig, VisionTower
from trl_stare.policies.openvla.modeling import OpenVLAForActionPrediction


def estimate_memory(
    config: OpenVLAConfig,
    *,
    lora_rank: int,
    update_batch: int,
    rollout_batch: int,
    prompt_tokens: int = 32,
    action_dim: int = 7,
    gradient_checkpointing: bool = False,
    num_shards: int = 1,
) -> MemoryEstimate:
    """Weights in bfloat16, a LoRA on all linear layers but the head in float32, updates under bfloat16 autocast, SDPA attention.

    Args:
        config ([`OpenVLAConfig`]): sizes; with `oft` a chunk takes one forward pass and no cache.
        lora_rank (`int`): r. update_batch (`int`): decisions of one micro-batch. rollout_batch (`int`): decisions made at once.
        prompt_tokens (`int`): text around the instruction; 32 suffice for the Bridge and Franka tasks. action_dim (`int`): `A`.
        gradient_checkpointing (`bool`): keep the input of every layer and recompute the rest, one layer at a time.
        num_shards (`int`): processes that weights, gradients and optimiser are divided among (ZeRO-3, FSDP); 1 for DDP.

    Example: openvla-7b has 7,541,237,184 weights of two bytes, 15.1 GB; r 32 adds 109,563,904 of four bytes, 0.44 GB.
    """
    with torch.device("meta"), no_init_weights():
        model = OpenVLAForActionPrediction(config)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    trained = sum(lora_rank * (module.in_features + module.out_features) for module in linear)
    actions = action_dim * (1 if config.oft is None else config.oft_settings.chunk_size)
    length = config.num_image_tokens + prompt_tokens + actions
    # autocast keeps a bfloat16 copy of the adapters besides
    kept = 2 * trained + update_batch * _activations(config, lora_rank, length, actions, gradient_checkpointing)
    text = config.text_config
    heads = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    cached = 0 if config.oft is not None else 2 * 2 * text.num_hidden_layers * heads * length
    whole = (2 * model.num_parameters(), 4 * trained, 4 * trained, 8 * trained)
    return MemoryEstimate(*(size // num_shards for size in whole), activations=kept, kv_cache=rollout_batch * cached)


def _activations(config: OpenVLAConfig, rank: int, length: int, actions: int, checkpointing: bool) -> int:
    """Bytes that one decision keeps for the backward pass of an update.

    Counted by hand for transformers' Llama, timm's ViT and PEFT's LoRA, per token and layer, `h` wide with an MLP of `m`. A frozen
    linear layer keeps nothing; its adapter keeps a bfloat16 copy of the input, and `r` values between its two matrices.
    `tests/policies/test_openvla_memory.py` holds it against what autograd really saves.
    """
    text = config.text_config
    images = 1 if config.oft is None else config.oft_settings.num_images
    patches = config.num_image_tokens // images
    vision = sum(_tower(tower, patches, rank, checkpointing) for tower in config.towers())
    width, hidden = sum(tower.width for tower in config.towers()), text.hidden_size
    # inputs of fc1, fc2 (and fc3), and of the GELU before the later ones
    between = 8 * width if config.use_fused_vision_backbone else 0
    projector = patches * 2 * (width + between + 2 * hidden + (3 if between else 2) * rank)
    # two RMSNorms in float32 (8 h); inputs of the adapters of q, k, v, o, gate and up (2 h each); q, k, v and the output of attention
    # (8 h); SiLU's input and output, up's output, the input of down's adapter (8 m)
    layer = 8 * hidden + 2 * 6 * hidden + 8 * hidden + 8 * text.intermediate_size + 2 * 7 * rank
    decoder = length * _layers(text.num_hidden_layers, layer, 2 * hidden, checkpointing)
    logits = actions * config.n_action_bins * 4  # in float32, of the bins alone
    return images * (vision + projector) + decoder + 4 * length * hidden + logits


def _tower(tower: VisionTower, patches: int, rank: int, checkpointing: bool) -> int:
    """Of one picture: two LayerNorms (8 w), inputs of qkv, proj, fc1 (6 w) and fc2 (2 m), attention (8 w), GELU's input (2 m)."""
    block = 22 * tower.width + 4 * tower.mlp_width + 2 * 4 * rank
    tokens = patches + tower.class_token + tower.register_tokens
    return tokens * _layers(tower.depth - 1, block, 2 * tower.width, checkpointing)


def _layers(count: int, each: int, boundary: int, checkpointing: bool) -> int:
    """Bytes per token of `count` layers: all of `each`, or the inputs and one layer."""
    return count * boundary + each if checkpointing else count * each
