"""The data of an epoch, made when the epoch begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from trl_stare.trainers.boundaries import RolloutStopped
from trl_stare.trainers.processes import gradient_weights
from trl_stare.trainers.sharding import whole_weights

if TYPE_CHECKING:
    from trl_stare.trainers.stage_ppo_trainer import StagePPOTrainer


class RolloutStream(IterableDataset):
    """One pass is one PPO iteration: iterating plays the rollout, then yields its minibatches `num_ppo_epochs` times.

    Not an endless stream: a loader that prefetches would play the next rollout with a stale policy.
    """

    def __init__(self, trainer: StagePPOTrainer):
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.args.num_ppo_epochs * self.trainer.args.num_minibatches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.trainer
        iteration = trainer.iteration
        try:
            with whole_weights(trainer.model_wrapped, trainer.accelerator):
                batch = trainer.make_batch(trainer.collect_rollout(iteration))
        except RolloutStopped:
            return  # an epoch without batches ends the training
        minibatches = self._minibatches(
            batch, torch.Generator().manual_seed(trainer.episode_seed("shuffle", iteration))
        )
        # losses are means over tokens and over decisions, of which each process has its own number
        counts = torch.tensor([[batch["mask"][rows].sum(), len(rows)] for rows in minibatches])
        for rows, weights in zip(minibatches, gradient_weights(trainer.accelerator, counts), strict=True):
            yield select_rows(batch, rows) | {"weights": weights}

    def _minibatches(self, batch: dict[str, Any], generator: torch.Generator) -> list[Tensor]:
        """Rows of all minibatches of the iteration; the same number in every process, whatever its rollout's length."""
        args, num_rows, chosen = self.trainer.args, len(batch["trace"]), []
        for _ in range(args.num_ppo_epochs):
            order = torch.randperm(num_rows, generator=generator)
            if num_rows < args.num_minibatches:
                order = order[torch.arange(args.num_minibatches) % num_rows]
            chosen += order.tensor_split(args.num_minibatches)
        return chosen


def select_rows(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """These rows of everything in a batch, also of the tensors of its model inputs."""
    return {
        name: select_rows(value, rows) if isinstance(value, dict) else value[rows] for name, value in batch.items()
    }
