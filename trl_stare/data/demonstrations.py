"""Demonstrations as imitation data: one row per step, images kept once in the trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from trl_stare.data.folder import TrajectoryFolder
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Observation, token_steps
from trl_stare.stages import StagePlan, segment, stage_per_step


def demonstration_dataset(trajectories: Sequence[Trajectory], plan: StagePlan) -> Dataset:
    """Rows `trajectory`, `decision`, `stage`, `weight`: every decision of every trajectory before success.

    `weight` is the inverse share of the row's stage, normalised to mean 1: with it every stage counts the same.

    Raises:
        ValueError: if there is no decision at all.
    """
    rows = [
        {"trajectory": index, "decision": decision, "stage": stage}
        for index, trajectory in enumerate(light(trajectories))
        for decision, stage in enumerate(_stage_of_decisions(trajectory, plan))
        if stage >= 0
    ]
    if not rows:
        raise ValueError(
            f"`trajectories` must hold a demonstration of {plan.task}, got {len(trajectories)} with no decision."
        )
    counts = torch.bincount(torch.tensor([row["stage"] for row in rows]), minlength=len(plan))
    present = int((counts > 0).sum())
    for row in rows:
        row["weight"] = len(rows) / (present * int(counts[row["stage"]]))
    return Dataset.from_list(rows)


def _stage_of_decisions(trajectory: Trajectory, plan: StagePlan) -> list[int]:
    stages = stage_per_step(segment(plan, trajectory.signals), trajectory.num_steps)
    return stages[trajectory.starts].tolist()


class DemonstrationCollator:
    """Rows of [`demonstration_dataset`] -> model inputs and the labels of the chunk that begins there.

    Where a demonstration ends within the chunk, its last action is repeated. Where a mistake was injected within the chunk, what
    the expert did after it is no answer to what was seen before it: those steps are masked.

    Args:
        trajectories (`Sequence[Trajectory]`): what the rows refer to. Of a [`TrajectoryFolder`] only the pictures that a batch
            looks at are decoded.
        prepare (`Callable`): the policy's `prepare`. encode (`Callable`): the policy's `encode`.
        chunk_size (`int`): `C`.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        prepare: Callable[[Observation], dict[str, Tensor]],
        encode: Callable[[Tensor], Tensor],
        chunk_size: int,
    ):
        self.trajectories = light(trajectories)
        self.prepare, self.encode, self.chunk_size = prepare, encode, chunk_size

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Model inputs, `trace` `[N, L]`, `mask` `[N, L]` bool and `weight` `[N]`."""
        chosen = [(self.trajectories[row["trajectory"]], row["decision"]) for row in rows]
        obs = Observation(
            torch.stack([self._image(row["trajectory"], row["decision"]) for row in rows]),
            tuple(trajectory.instruction for trajectory, _ in chosen),
            torch.stack([trajectory.state[decision] for trajectory, decision in chosen]),
        )
        chunks = [self._chunk(trajectory, int(trajectory.starts[decision])) for trajectory, decision in chosen]
        trace = self.encode(torch.stack([labels for labels, _ in chunks]))
        valid = torch.stack([valid for _, valid in chunks])
        mask = valid[:, token_steps(trace.shape[1], self.chunk_size)]
        weight = torch.tensor([row["weight"] for row in rows])
        return {**self.prepare(obs), "trace": trace, "mask": mask, "weight": weight}

    def _image(self, index: int, decision: int) -> Tensor:
        if isinstance(self.trajectories, TrajectoryFolder):
            return self.trajectories.image(index, decision)
        return self.trajectories[index].images[decision]

    def _chunk(self, trajectory: Trajectory, start: int) -> tuple[Tensor, Tensor]:
        """Labels `[C, A]`, and `[C]` bool: no mistake was made before that step."""
        steps = torch.arange(start, start + self.chunk_size).clamp(max=trajectory.num_steps - 1)
        mistaken = (trajectory.labels[steps] != trajectory.actions[steps]).any(dim=-1)
        return trajectory.labels[steps], mistaken.cumsum(0) - mistaken.long() == 0


def light(trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
    """What is on disk without its pictures, the same object where it is that already."""
    return trajectories.light() if isinstance(trajectories, TrajectoryFolder) else trajectories
