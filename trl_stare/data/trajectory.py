"""One recorded episode, as rollouts produce it and as datasets, pairs and reports consume it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_stare.interfaces import Signals


@dataclass(frozen=True)
class Trajectory:
    """One episode of `T` environment steps taken in `M` decisions.

    Args:
        task (`str`): registered task name.
        instruction (`str`): what the policy was told.
        seed (`int`): the episode's seed; same task and seed means same initial state.
        policy (`str`): who acted ("expert", a checkpoint).
        images (`Tensor`): `[M, H, W, 3]` uint8, what was seen at each decision.
        state (`Tensor`): `[M, P]` float32.
        starts (`Tensor`): `[M]` int64, environment step at which each decision was taken; `starts[0] == 0`.
        actions (`Tensor`): `[T, A]` float32, robot units, as executed.
        labels (`Tensor`): `[T, A]` float32, what an imitator should do; `actions` unless noise was added to a demonstration.
        trace (`Tensor` or `None`): `[M, L]` int64, the whole chunks as sampled (also steps cut off by the episode's end).
        logps (`Tensor` or `None`): `[M, L]` float32, log-probabilities of `trace` when it was sampled.
        features (`Tensor` or `None`): `[M, F]` float32, what a value head may read; not stored in datasets.
        final_image (`Tensor`): `[H, W, 3]` uint8, after the last step. final_state (`Tensor`): `[P]`.
        signals (`Signals`): name -> `[T + 1]` or `[T + 1, D]`; row 0 is the initial state, row `t + 1` follows action `t`.
        reward (`Tensor`): `[T]` float32, the task's own sparse reward.
        terminated (`bool`): the task ended the episode. truncated (`bool`): the time limit did.
        prefix (`Tensor` or `None`): `[P, A]` float32, the actions of the episode's [`~trl_stare.interfaces.EpisodeStart`],
            executed before the first look. Everything above begins after them; the time limit counts them.
        env (`int` or `None`): row of the environments that played it; not stored in datasets.

    `success_once` and `success_at_end` read the `"success"` signal, the environment's own.
    """

    task: str
    instruction: str
    seed: int
    policy: str
    images: Tensor
    state: Tensor
    starts: Tensor
    actions: Tensor
    labels: Tensor
    trace: Tensor | None
    logps: Tensor | None
    features: Tensor | None
    final_image: Tensor
    final_state: Tensor
    signals: Signals
    reward: Tensor
    terminated: bool
    truncated: bool
    prefix: Tensor | None = None
    env: int | None = None

    @property
    def num_steps(self) -> int:
        """`T`, environment steps."""
        return self.actions.shape[0]

    @property
    def bounds(self) -> Tensor:
        """`[M + 1]` environment steps at which decisions begin, and the end: `starts` and `num_steps`."""
        return torch.cat([self.starts, torch.tensor([self.num_steps])])

    @property
    def success_once(self) -> bool:
        """Whether the task was solved at any step."""
        return bool(self.signals["success"][1:].any())

    @property
    def success_at_end(self) -> bool:
        """Whether the task was solved at the last step."""
        return bool(self.signals["success"][-1])

    def decisions_in(self, start: int, stop: int) -> Tensor:
        """Indices of the decisions that act in the half-open slice `[start, stop)` of environment steps.

        The decision under way at `start` is one of them: of a stage that passes quickly it is often the only one.

        Example: with `starts = [0, 4, 8]`, `decisions_in(4, 9)` is `[1, 2]`, `decisions_in(6, 8)` is `[1]`, and an empty
        slice has none.
        """
        bounds = self.bounds
        return torch.nonzero((bounds[1:] > start) & (bounds[:-1] < stop) & (start < stop)).flatten()
