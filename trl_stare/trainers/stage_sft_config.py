"""Configuration of the imitation stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig

from trl_stare.trainers._compat import start_deepspeed_on_cpu, use_cpu_without_gpus
from trl_stare.trainers.processes import end_with_launcher
from trl_stare.trainers.unused import refuse_unused

_UNUSED = {
    "loss_type": "nll",
    "label_smoothing_factor": 0.0,
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "packing": False,
    "eval_packing": None,
    "padding_free": False,
    "torch_compile": False,
}


@dataclass
class StageSFTConfig(SFTConfig):
    r"""
    Configuration of [`StageSFTTrainer`]: TRL's [`~trl.SFTConfig`] and what stages add.

    Parameters:
        stage_balanced (`bool`, *optional*, defaults to `False`):
            Weight decisions so that every stage counts the same, however many steps it lasts.
    """

    stage_balanced: bool = field(
        default=False,
        metadata={"help": "Weight decisions so that every stage counts the same, however many steps it lasts."},
    )
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of AdamW; the small VLA's default."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Unused: a decision has a fixed number of tokens."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations. Off by default."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Train in bfloat16."})

    def __post_init__(self):
        if self.max_length is not None:
            raise ValueError(
                f"`max_length` must be None, got {self.max_length}. A decision has a fixed number of tokens."
            )
        # the rows are decisions that a collator turns into tensors: there is no text to tokenise
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        use_cpu_without_gpus(self)
        end_with_launcher()
        super().__post_init__()
        start_deepspeed_on_cpu(self)
        refuse_unused(self, _UNUSED, "A decision is trained by its policy's own loss, alone in its row.")
