"""Imitation: TRL's `SFTTrainer` on decisions of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTTrainer

from trl_stare.data.demonstrations import DemonstrationCollator, demonstration_dataset, light
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import VLAPolicy
from trl_stare.stages import StagePlan
from trl_stare.trainers._compat import EndsAtMaxSteps, SavesAdapterConfig, forward_once, keep_forward, restore_weights
from trl_stare.trainers.adapters import require_trainable
from trl_stare.trainers.processes import OwnRandomness
from trl_stare.trainers.stage_sft_config import StageSFTConfig


class StageSFTTrainer(EndsAtMaxSteps, SavesAdapterConfig, SFTTrainer):
    """
    Trainer for the imitation stage.

    What differs from [`~trl.SFTTrainer`]: a row is a decision of a demonstration, and the loss is the policy's own
    `imitation_loss` on the action chunk that follows, if wanted weighted so that every stage counts the same.

    Args:
        policy ([`VLAPolicy`]): what is trained.
        args ([`StageSFTConfig`]): the configuration.
        demonstrations (`Sequence[Trajectory]`): what is imitated; `labels` are the targets. Of a [`TrajectoryFolder`] the
            pictures stay on disk.
        plan ([`StagePlan`]): the task's stages.
        callbacks, optimizers, peft_config (*optional*): as in [`~trl.SFTTrainer`].

    Raises:
        ValueError: if there is no demonstration, or nothing to train.

    Example:

    ```python
    >>> trainer = StageSFTTrainer(policy, StageSFTConfig("imitation", max_steps=1000), demonstrations, plan)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-stare", "stage-sft"]
    _name = "Stage-SFT"

    def __init__(
        self,
        policy: VLAPolicy,
        args: StageSFTConfig,
        demonstrations: Sequence[Trajectory],
        plan: StagePlan,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ):
        require_trainable(policy.model, peft_config)
        self.policy = policy
        demonstrations = light(demonstrations)  # read once for both the rows and the batches
        model = policy.model.get_base_model() if is_peft_model(policy.model) else policy.model
        with keep_forward(model):
            super().__init__(
                model=policy.model,
                args=args,
                data_collator=DemonstrationCollator(demonstrations, policy.prepare, policy.encode, policy.chunk_size),
                train_dataset=demonstration_dataset(demonstrations, plan),
                processing_class=policy.processor,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        policy.model = self.model
        self.add_callback(OwnRandomness())

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["trajectory", "decision", "stage", "weight"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The policy's imitation loss; a mean over the micro-batch, which [`~transformers.Trainer`] averages."""
        inputs = dict(inputs)
        trace, mask, weight = (inputs.pop(name) for name in ("trace", "mask", "weight"))
        inner = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            weight = weight if self.args.stage_balanced else None
            loss = forward_once(model, inner, self.policy.imitation_loss, inputs, trace, mask, weight)
        return (loss, {"loss": loss}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """No token count: the loss is a mean over decisions, and every decision has the same number of tokens."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore every weight of a full fine-tuning, or raise; see [`restore_weights`]."""
        if is_peft_model(self.model) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_weights(self.model if model is None else model, resume_from_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left to [`trl_stare.evaluation.write_model_card`]: TRL's template is about text generation."""
