"""Log-probabilities without gradients: of the policy itself, and of the reference it must not drift away from."""

from __future__ import annotations

from copy import copy, deepcopy

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_stare.interfaces import VLAPolicy
from trl_stare.trainers._compat import use_adapter


@torch.no_grad()
def rollout_logps(
    policy: VLAPolicy, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float, batch_size: int
) -> Tensor:
    """Log-probabilities of sampled tokens, `[M, L]` float32 on the CPU, `batch_size` decisions at a time."""
    was_training = policy.model.training
    policy.model.eval()
    parts = [
        policy.evaluate(
            {name: value[rows] for name, value in inputs.items()}, trace[rows], temperature=temperature
        ).logps
        for rows in torch.arange(len(trace)).split(batch_size)
    ]
    policy.model.train(was_training)
    return torch.cat(parts).float().cpu()


REFERENCE_ADAPTER = "reference"


class PolicyReference:
    """The policy as it was when this was made, to measure how far it has drifted: a frozen copy, with PEFT of its adapter alone.

    Args:
        policy ([`VLAPolicy`]): the policy that goes on learning.

    Raises:
        ValueError: under ZeRO-3 without PEFT, where each process holds a part of the weights only.

    Example: before the first update, `PolicyReference(policy).logps(...)` is [`rollout_logps`] of `policy`.
    """

    def __init__(self, policy: VLAPolicy):
        self._policy = policy
        if is_peft_model(policy.model):
            _copy_adapter(policy.model, REFERENCE_ADAPTER)
            return
        if is_deepspeed_zero3_enabled():
            raise ValueError("`kl_coef` must be 0 under ZeRO-3 without PEFT, which cannot copy the policy. Use LoRA.")
        self._policy = copy(policy)
        self._policy.model = deepcopy(policy.model).requires_grad_(False)

    def logps(self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float, batch_size: int) -> Tensor:
        """As [`rollout_logps`]."""
        if is_peft_model(self._policy.model):
            with use_adapter(self._policy.model, REFERENCE_ADAPTER):
                return rollout_logps(self._policy, inputs, trace, temperature=temperature, batch_size=batch_size)
        return rollout_logps(self._policy, inputs, trace, temperature=temperature, batch_size=batch_size)

    def to(self, device: torch.device) -> PolicyReference:
        """Move the copy, if there is one, to the device of the policy."""
        self._policy.model.to(device)
        return self


def _copy_adapter(model: PeftModel, name: str) -> None:
    """Give `model` a frozen second adapter `name` with the weights of its active one, which may have been trained before."""
    active = model.active_adapter
    model.add_adapter(name, model.peft_config[active])
    with torch.no_grad():
        for key, value in model.named_parameters():
            if f".{active}." in key:
                model.get_parameter(key.replace(f".{active}.", f".{name}.")).copy_(value)
    model.set_adapter(active)
