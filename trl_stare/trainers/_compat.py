"""The one module that imports private names of TRL and works around its libraries' faults: upgrades break here first.

`tests/test_trl_contract.py` names every attribute of TRL and transformers that the trainers lean on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments

# TRL documents its trainers, not their base; but `_BaseTrainer` (HF's `Trainer` plus TRL's cards, tags and logging)
# and `_BaseConfig` (its defaults) are what all of them share, the only root left since 1.13 removed `PPOTrainer`.
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

# Switches the adapter of a PEFT model off (or to TRL's frozen copy "ref") and back: how TRL gets a reference for free.
from trl.trainer.utils import use_adapter

from trl_stare.interfaces import ADAPTER_CONFIG_NAME

__all__ = [
    "_BaseConfig",
    "_BaseTrainer",
    "EndsAtMaxSteps",
    "SavesAdapterConfig",
    "forward_once",
    "give_generation_config",
    "keep_forward",
    "restore_weights",
    "start_deepspeed_on_cpu",
    "use_adapter",
    "use_cpu_without_gpus",
    "whole",
]


@contextmanager
def keep_forward(model: nn.Module) -> Iterator[None]:
    """Undo what the block does to `model.forward`.

    `DPOTrainer.__init__` replaces `forward` on the *instance* by a fused LM head that closes over this very model: a
    later `deepcopy` would silently go on running the original's weights. We never use that head, so it does not stay.
    """
    own = model.__dict__.get("forward")
    try:
        yield
    finally:
        if own is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = own


def give_generation_config(model: nn.Module) -> None:
    """`DPOTrainer.__init__` writes token ids to `model.generation_config`, which a model that generates no text (pi0) lacks."""
    if not hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig()


def forward_once(wrapper: nn.Module, inner: nn.Module, method: Callable[..., Any], *args: Any) -> Any:
    """Call `method(*args)` inside exactly one forward of `wrapper`.

    DDP and DeepSpeed prepare their gradient reduction in the wrapper's `forward`, once per backward. A loss that needs
    several forwards of the model (micro-batches), or another entry than `forward`, must therefore run within one call
    of the wrapper. So `inner.forward` is replaced for the length of that call; as soon as the wrapper arrives there,
    the real `forward` is put back, because `method` itself calls the model.

    Args:
        wrapper (`nn.Module`): what accelerate prepared.
        inner (`nn.Module`): the model in it. May be `wrapper` itself, and then `method` is simply called.
        method (`Callable`): what to run; it must reach the model through `inner`, not through `wrapper`.

    Returns:
        What `method` returns.

    Example:
        ```python
        >>> forward_once(ddp_model, ddp_model.module, policy.score, inputs, trace)
        ```
    """
    if wrapper is inner:
        return method(*args)
    own = inner.__dict__.get("forward")

    def forward(*args: Any) -> Any:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own
        return method(*args)

    with keep_forward(inner):
        inner.forward = forward
        return wrapper(*args)


class SavesAdapterConfig:
    """A trainer whose adapters keep their model's config, which PEFT does not write: `TokenPolicy.from_pretrained` reads it.

    To be put before the trainer among the base classes.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model):
            model.config.to_json_file(Path(output_dir or self.args.output_dir) / ADAPTER_CONFIG_NAME)


class EndsAtMaxSteps:
    """A trainer that trains no more where it resumes from its last step.

    `Trainer` of transformers 5.23 looks at `max_steps` only behind an update: a finished run whose last epoch has batches left, given
    again, would go one step further each time. To be put before the trainer among the base classes.
    """

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)


def restore_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load all weights of a checkpoint into `model`, in place, or raise.

    `Trainer._load_from_checkpoint` of transformers 5.23 reads the file with `strict=False`: where `save_pretrained`
    renames keys (LLaVA, PaliGemma), *none* are found and training goes on from the initial weights with a mere warning
    (huggingface/transformers#43701). `from_pretrained` knows the renaming.

    Raises:
        ValueError: if the checkpoint lacks weights of the model or has others.
    """
    loaded, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys and kind.endswith("_keys")}
    if problems:
        raise ValueError(
            f"`{folder}` must hold the weights of {type(model).__name__}, got {problems}. Resume from another."
        )
    model.load_state_dict(loaded.state_dict(), strict=True)


def use_cpu_without_gpus(args: TrainingArguments) -> None:
    """Set `use_cpu` on a machine without GPUs, of several of whose processes accelerate 1.15 would take each for one with a GPU.

    Must run before the process group is made, which [`~transformers.TrainingArguments`] does in its `__post_init__`.
    """
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()


def start_deepspeed_on_cpu(args: TrainingArguments) -> None:
    """Tell DeepSpeed of the process group of a run without GPUs; elsewhere nothing is done.

    On a CPU accelerate 1.15 starts `torch.distributed` only, and DeepSpeed 0.19 takes itself for a single process: as
    soon as ZeRO-3 loads a model, it stops with "Check batch related parameters". Must run before any model is loaded.
    """
    if args.device.type == "cpu" and args.deepspeed_plugin is not None:
        import deepspeed

        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@contextmanager
def whole(parameter: Tensor) -> Iterator[Tensor]:
    """`parameter` with all its values: ZeRO-3 leaves each process a part only. All processes must come here."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
            yield parameter
    else:
        yield parameter
