"""The memory estimate against what autograd saves, what a cache holds, and openvla-7b's published sizes."""

import pytest
import torch
from openvla_toy import make_obs, make_openvla
from peft import LoraConfig, get_peft_model

from trl_stare.policies import OpenVLAConfig
from trl_stare.policies.openvla.memory import estimate_memory

RANK = 4
TEXT = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3}


def saved_for_backward(policy, inputs) -> int:
    """Bytes of every tensor that autograd keeps of `score`, but parameters; each storage once."""
    fixed, kept = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    trace = torch.zeros(len(inputs["input_ids"]), policy.num_tokens, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.score(inputs, trace)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in fixed)


@pytest.mark.parametrize("oft", [None, {"chunk_size": 5}, {"chunk_size": 2, "num_images": 2, "bidirectional": False}])
def test_activations_are_what_autograd_saves(oft):
    policy = make_openvla(text_config=TEXT, oft=oft)
    policy.model = get_peft_model(policy.model.to(torch.bfloat16), LoraConfig(r=RANK, target_modules="all-linear"))
    obs = make_obs("put carrot on plate", "put carrot on plate")
    if oft and "num_images" in oft:
        obs = obs._replace(images=obs.images[:, None].repeat(1, 2, 1, 1, 1))
    inputs = policy.prepare(obs)
    config = policy.model.config
    text = inputs["input_ids"].shape[1] - config.num_image_tokens
    estimate = estimate_memory(config, lora_rank=RANK, update_batch=2, rollout_batch=2, prompt_tokens=text)
    assert estimate.activations == pytest.approx(saved_for_backward(policy, inputs), rel=0.05)
    weights = [(p.requires_grad, p.numel() * p.element_size()) for p in policy.model.parameters()]
    assert estimate.weights == sum(size for is_trained, size in weights if not is_trained)
    assert estimate.adapters == sum(size for is_trained, size in weights if is_trained)


@torch.no_grad()
def test_the_cache_is_what_a_decision_leaves_in_it():
    policy = make_openvla(text_config=TEXT)
    policy.model.to(torch.bfloat16)
    inputs = policy.extend(policy.prepare(make_obs("stack", "stack")), torch.full((2, 6), 31999))
    cache = policy.model(**inputs, use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    # the last of the 7 tokens is never read
    text = inputs["input_ids"].shape[1] - policy.model.config.num_image_tokens - 7
    sizes = {"lora_rank": RANK, "update_batch": 1, "rollout_batch": 2, "prompt_tokens": text}
    assert estimate_memory(policy.model.config, **sizes).kv_cache == held
    policy.model.config.oft = {"chunk_size": 8}
    assert estimate_memory(policy.model.config, **sizes).kv_cache == 0


def test_openvla_7b():
    estimate = estimate_memory(OpenVLAConfig(), lora_rank=32, update_batch=8, rollout_batch=64)
    assert estimate.weights == 2 * 7_541_237_184
    assert (estimate.adapters, estimate.optimizer) == (4 * 109_563_904, 8 * 109_563_904)
    # 32 layers, keys and values of 4096 in two bytes, for 256 patches, 32 of text and 7 of the action
    assert estimate.kv_cache == 64 * 32 * 2 * 4096 * 2 * 295
    assert estimate.peak == sum(estimate[:4]) + estimate.activations


def test_batches_checkpointing_and_shards():
    config = make_openvla(text_config=TEXT | {"num_hidden_layers": 16}).model.config
    sizes = {"lora_rank": RANK, "rollout_batch": 1}
    one, eight = (estimate_memory(config, update_batch=count, **sizes) for count in (1, 8))
    copies = one.adapters // 2
    assert eight.activations - copies == 8 * (one.activations - copies)
    checkpointed = estimate_memory(config, update_batch=8, gradient_checkpointing=True, **sizes)
    assert checkpointed.activations < eight.activations / 4
    sharded = estimate_memory(config, update_batch=8, num_shards=8, **sizes)
    assert sharded.weights == eight.weights // 8 and sharded.activations == eight.activations
