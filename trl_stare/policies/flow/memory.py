"""How much memory a pi0 under a LoRA takes, from its config alone: it is traced without memory, and nothing is loaded."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PI0Config, PI0ForConditionalGeneration
from transformers.initialization import no_init_weights

from trl_stare.policies.flow.denoiser import read_prefix, velocity
from trl_stare.policies.memory import MemoryEstimate


def estimate_flow_memory(
    config: PI0Config,
    *,
    lora_rank: int,
    update_batch: int,
    rollout_batch: int,
    target_modules: str = "all-linear",
    prompt_tokens: int = 48,
    num_cameras: int = 1,
    num_draws: int = 1,
    num_shards: int = 1,
) -> MemoryEstimate:
    """Weights in bfloat16, a LoRA in float32, updates under bfloat16 autocast.

    The activations are what autograd saves in one forward of PyTorch's fake tensors (https://docs.pytorch.org/docs/main/user_guide/torch_compiler/torch.compiler_fake_tensor.html),
    which have shapes and no content: seconds for pi0's real size.

    Args:
        config (`PI0Config`): sizes.
        lora_rank (`int`): r. target_modules (`str`): as PEFT reads it. update_batch (`int`): decisions of one micro-batch.
        rollout_batch (`int`): decisions made at once. prompt_tokens (`int`): text of the prompt, padded. num_cameras (`int`): images.
        num_draws (`int`): velocities that one decision asks for: 1 in imitation and PPO, `score_draws` of a preference.
        num_shards (`int`): processes that weights, gradients and optimiser are divided among (ZeRO-3, FSDP); 1 for DDP.

    Example: pi0 has 3,501,372,176 weights of two bytes, 7.0 GB; r 32 on all linear layers adds 70,842,368 of four bytes, 0.28 GB.
    """
    with torch.device("meta"), no_init_weights():
        model = PI0ForConditionalGeneration(config).to(torch.bfloat16)
        weights = 2 * model.num_parameters()
        lora = LoraConfig(r=lora_rank, target_modules=target_modules)
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with FakeTensorMode():
        _without_memory(model)
        kept, cached = _trace(model, config, prompt_tokens, num_cameras, num_draws)
    copies = 2 * trained  # autocast keeps a bfloat16 copy of the adapters, however many decisions there are
    return MemoryEstimate(
        *(size // num_shards for size in (weights, 4 * trained, 4 * trained, 8 * trained)),
        activations=copies + update_batch * (kept - copies),
        kv_cache=rollout_batch * cached,
    )


def _without_memory(model: nn.Module) -> None:
    """Put fake tensors of the CPU in the place of those of the device "meta", where autocast does nothing."""
    for module in model.modules():
        for own, wrap in ((module._parameters, True), (module._buffers, False)):
            for name, value in own.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                    own[name] = nn.Parameter(fake, requires_grad=value.requires_grad) if wrap else fake


def _trace(model: Any, config: PI0Config, prompt_tokens: int, num_cameras: int, num_draws: int) -> tuple[int, int]:
    """Bytes that autograd saves of one decision, parameters not counted, and bytes of its prompt's cache."""
    vision = config.vlm_config.vision_config
    length = num_cameras * (vision.image_size // vision.patch_size) ** 2 + prompt_tokens
    inputs = {
        "input_ids": torch.full((1, length), config.vlm_config.image_token_id),
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "pixel_values": torch.zeros(1, num_cameras, 3, vision.image_size, vision.image_size, dtype=torch.uint8),
        "pixel_attention_mask": torch.ones(1, num_cameras, dtype=torch.bool),
        "state": torch.zeros(1, config.max_state_dim),
    }
    fixed, saved = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        prefix = read_prefix(model, inputs)
        cache = [part for layer in prefix.cache.layers for part in (layer.keys, layer.values)]
        noisy = torch.zeros(1, config.chunk_size, config.max_action_dim)
        errors = [velocity(model, inputs, prefix, noisy, torch.ones(1)).square() for _ in range(num_draws)]
    assert all(error.requires_grad for error in errors)
    kept = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in fixed)
    return kept, sum(part.numel() * part.element_size() for part in cache)
