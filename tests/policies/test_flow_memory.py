"""The traced estimate against a model with memory: what autograd saves, what the cache holds, what is trained."""

import pytest
import torch
from flow_toy import make_flow
from peft import LoraConfig, get_peft_model

from trl_stare.interfaces import Observation
from trl_stare.policies import estimate_flow_memory

RANK = 4


def saved_for_backward(policy, inputs, trace) -> int:
    """Bytes of every tensor that autograd keeps of `evaluate`, but parameters; each storage once."""
    fixed, kept = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.evaluate(inputs, trace)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in fixed)


@pytest.mark.parametrize("target_modules", ["all-linear", r"model\.dit\..*_proj"])
def test_pi0_is_what_a_real_one_takes(target_modules):
    policy = make_flow(spread=1.0)
    lora = LoraConfig(r=RANK, target_modules=target_modules)
    policy.model = get_peft_model(policy.model.to(torch.bfloat16), lora)
    images = torch.zeros(3, 28, 28, 3, dtype=torch.uint8)
    inputs = policy.prepare(Observation(images, ("stack the cube",) * 3, torch.zeros(3, 8)))
    trace = policy.act(inputs, temperature=1.0, generator=torch.Generator().manual_seed(0)).trace
    text = inputs["input_ids"].shape[1] - 4
    estimate = estimate_flow_memory(
        policy.model.config,
        lora_rank=RANK,
        target_modules=target_modules,
        update_batch=3,
        rollout_batch=3,
        prompt_tokens=text,
    )
    assert estimate.activations == pytest.approx(saved_for_backward(policy, inputs, trace), rel=0.02)
    cache = policy._read(inputs).cache
    assert estimate.kv_cache == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    weights = [(p.requires_grad, p.numel() * p.element_size()) for p in policy.model.parameters()]
    assert estimate.weights == sum(size for is_trained, size in weights if not is_trained)
    assert estimate.adapters == sum(size for is_trained, size in weights if is_trained)


def test_draws_batches_and_shards():
    config = make_flow().model.config
    sizes = {"lora_rank": RANK, "rollout_batch": 1}
    one, two, four = (estimate_flow_memory(config, update_batch=1, num_draws=draws, **sizes) for draws in (1, 2, 4))
    assert four.activations - two.activations == 2 * (two.activations - one.activations) > 0
    copies = one.adapters // 2
    eight = estimate_flow_memory(config, update_batch=8, num_shards=8, **sizes)
    assert eight.activations - copies == 8 * (one.activations - copies) and eight.weights == one.weights // 8
