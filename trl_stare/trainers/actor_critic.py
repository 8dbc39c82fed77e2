"""Policy and critic as the one module that the Trainer, DDP and DeepSpeed see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trl_stare.interfaces import ActionEval, Signals, VLAPolicy
from trl_stare.stages import StagePlan

VALUE_HEAD_FILE = "value_head.safetensors"

SIMULATOR_CRITICS = ("privileged", "stages")
"""What reads the simulator and not the policy; see [`StagePPOConfig.critic`]."""
NEAR = 0.02
"""Share of `L_k` below which distances are told apart less and less: 6 mm of 0.3 m."""


def privileged_features(signals: Signals, names: Sequence[str], time: Tensor) -> Tensor:
    """Signals `[M]` or `[M, D]` in the order of `names`, and the share of the time limit used, `[M]` -> `[M, F]`."""
    columns = [signals[name].float() for name in names]
    return torch.cat([column if column.ndim == 2 else column[:, None] for column in columns] + [time[:, None]], dim=-1)


def stage_features(plan: StagePlan, signals: Signals, time: Tensor) -> Tensor:
    """What a plan says of each moment, and the time: `[M]` or `[M, D]` signals -> `[M, 3 K + 2]`.

    The current stage as one of `K + 1` (the last is success); of each stage, current or not, `d_k / L_k` and
    `log(d_k / L_k + NEAR)`; and the share of the time limit used, `[M]`. A few numbers that mean the same wherever things lie: a
    critic learns from them what it cannot from so few episodes' raw poses, whose differences it would have to find first.
    """
    current = F.one_hot(plan.current_stage(signals), len(plan) + 1).float()
    distances = plan.relative_distances(signals)
    return torch.cat([current, distances, (distances + NEAR).log(), time[:, None]], dim=-1)


def simulator_features(critic: str, plan: StagePlan, signals: Signals, names: Sequence[str], time: Tensor) -> Tensor:
    """What a critic of [`SIMULATOR_CRITICS`] reads at each moment, `[M, F]`."""
    return stage_features(plan, signals, time) if critic == "stages" else privileged_features(signals, names, time)


class ValueHead(nn.Module):
    """An MLP that predicts the return; its input is standardised with statistics fixed at the first rollout.

    Args:
        num_features (`int`): `F`. hidden_size (`int`): width.

    Example: `ValueHead(18)(torch.zeros(5, 18)).shape` is `(5,)`.
    """

    def __init__(self, num_features: int, hidden_size: int = 128):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.register_buffer("is_calibrated", torch.tensor(False))
        self.layers = nn.Sequential(
            nn.Linear(num_features, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, 1),
        )
        # a critic that knows nothing predicts 0, not noise
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def calibrate(self, mean: Tensor, std: Tensor) -> None:
        """Standardise with these statistics `[F]` of the features; later calls change nothing."""
        if not self.is_calibrated:
            self.mean.copy_(mean)
            self.std.copy_(std.clamp(min=1e-3))
            self.is_calibrated.fill_(True)

    def forward(self, features: Tensor) -> Tensor:
        """`[M, F]` -> `[M]`."""
        features = ((features.float() - self.mean) / self.std).clamp(-10, 10)
        return self.layers(features.to(self.layers[0].weight.dtype)).squeeze(-1)


class ActorCritic(nn.Module):
    """A policy's model and a value head, with one forward for both.

    Args:
        policy ([`VLAPolicy`]): the actor. value_head ([`ValueHead`]): the critic.
        shares_features (`bool`): let the critic's gradient reach the policy through the hidden state that it reads.
    """

    def __init__(self, policy: VLAPolicy, value_head: ValueHead, *, shares_features: bool = False):
        super().__init__()
        self.shares_features = shares_features
        self.model, self.value_head = policy.model, value_head
        self._policy = [policy]  # in a list: not a submodule

    @property
    def config(self) -> Any:
        """The model's configuration, which the Trainer asks for."""
        return self.model.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Passed on to the model."""
        self.model.gradient_checkpointing_enable(**kwargs)

    def disable_dropout(self) -> None:
        """With dropout the update would see other log-probabilities than the rollout: the first ratio would not be 1."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(
        self, inputs: dict[str, Tensor], trace: Tensor, features: Tensor | None, temperature: float
    ) -> tuple[ActionEval, Tensor]:
        """Evaluate `trace`; the critic reads `features`, or the hidden state where they are `None`."""
        evaluation = self._policy[0].evaluate(inputs, trace, temperature=temperature)
        if features is None:
            features = evaluation.features if self.shares_features else evaluation.features.detach()
        return evaluation, self.value_head(features)

    def save(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """A plain checkpoint of the policy, and the critic in a file of its own.

        Args:
            state_dict (`Mapping`, *optional*): of this module, where it holds a part of the weights only (ZeRO-3).
        """
        if state_dict is None:
            self._policy[0].save_pretrained(folder)
            critic = self.value_head.state_dict()
        else:
            self._policy[0].save_pretrained(folder, state_dict=_part(state_dict, "model."))
            critic = _part(state_dict, "value_head.")
        save_file({name: value.contiguous() for name, value in critic.items()}, Path(folder) / VALUE_HEAD_FILE)

    def load_value_head(self, folder: str | Path) -> None:
        """Read the critic back.

        Raises:
            FileNotFoundError: if the checkpoint has none.
        """
        path = Path(folder) / VALUE_HEAD_FILE
        if not path.is_file():
            raise FileNotFoundError(f"`{folder}` must hold {VALUE_HEAD_FILE} to resume PPO, got none.")
        self.value_head.load_state_dict(load_file(path))


def _part(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
