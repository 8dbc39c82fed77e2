"""Weights that are divided among processes (ZeRO-3, FSDP): whole again where a process works on its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainingArguments
from trl.models.utils import add_hooks, remove_hooks


def refuse_fsdp() -> None:
    """Say so where a rollout could not see all weights.

    Raises:
        ValueError: under FSDP, also on a CPU, where accelerate 1.15 silently makes DDP of it (state.py: no FSDP for MULTI_CPU).
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "PPO must run with DDP or DeepSpeed, got FSDP, of which each process holds a part of the weights that a rollout needs. "
            "Take recipes/accelerate/zero3.yaml, which divides them too."
        )


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Say so where the Trainer would copy the model to several GPUs of one process, as TRL's trainers do.

    Raises:
        ValueError: if one process sees several GPUs.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"a process must see one GPU, got {args.n_gpu}: `nn.DataParallel` would copy the model, and not the policy around it. "
            "Start with `accelerate launch`, or set `CUDA_VISIBLE_DEVICES` to one."
        )


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """All weights of `model`, which accelerate has prepared, in every process, to be read only. All processes must come here.

    Within, processes may call its parts as often as they like: episodes differ in length, and a forward that gathers weights in one
    process waits for the others.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        remove_hooks(model)  # which would gather what is there, and divide it again behind each layer
        try:
            yield
        finally:
            add_hooks(model)


def are_divided(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights only, which every forward fetches from all: ZeRO-3 and FSDP."""
    state = accelerator.state
    is_fsdp = getattr(state, "fsdp_plugin", None) is not None
    return is_fsdp or (state.deepspeed_plugin is not None and state.deepspeed_plugin.zero_stage == 3)


def most_of_all(accelerator: Accelerator, count: int) -> int:
    """The largest `count` of all processes where weights are divided, elsewhere `count`.

    A process with fewer micro-batches would leave the others waiting for its part.
    """
    if not are_divided(accelerator):
        return count
    return int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max())
