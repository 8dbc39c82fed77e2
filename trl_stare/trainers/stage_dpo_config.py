"""Options of [`StageDPOTrainer`]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from trl import DPOConfig


OBJECTIVES = ("sta-tpo", "tpo-mean", "tpo-sum")
"""`sta-tpo` compares stage by stage; the TPO baselines compare whole trajectories, by mean (ours) or sum (GRAPE) of steps."""

# Options of DPO that mean something for tokens of a text, or for its other losses, and would be ignored here.
_UNUSED = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "sync_ref_model": False,
    "padding_free": False,
    "precompute_ref_log_probs": True,
}


@dataclass
class StageDPOConfig(DPOConfig):
    r"""
    Configuration class for the [`StageDPOTrainer`]. Only what differs from [`~trl.DPOConfig`] is listed.

    Args:
        objective (`str`, *optional*, defaults to `"sta-tpo"`):
            `"sta-tpo"`: stage pairs, mean over the stage's decisions. `"tpo-mean"`, `"tpo-sum"`: whole-trajectory pairs.
        beta (`float`, *optional*, defaults to `1.0`):
            Inverse temperature. With the mean over decisions 1.0 is about what GRAPE's 0.1 is on a sum of 8 (method.md 3).
        cost_coef (`float`, *optional*, defaults to `0.1`):
            `lambda`, weight of the stage cost in a side's score.
        margin_sign (`int`, *optional*, defaults to `1`):
            `1`: the paper's sign, the clearer preference has the smaller gradient. `-1`: ODPO's (arXiv 2402.10571).
        stage_weights (`list[float]`, *optional*):
            Weight of each stage in the loss, in the plan's order. `None`: all 1.
        step_micro_batch_size (`int`, *optional*):
            Decisions forwarded at once. The forward is then recomputed in the backward, so that memory does not grow with
            the length of trajectories; gradients are the same. `None`: all at once.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `True`):
            Must stay `True`: reference scores are computed once, before training, and the reference is not kept.

    > [!NOTE]
    > Other defaults than [`~trl.DPOConfig`]'s: `max_length=None` (an observation cannot be truncated),
    > no `gradient_checkpointing` (`step_micro_batch_size` bounds memory), `bf16` only where a GPU can do it.
    """

    beta: float = field(default=1.0, metadata={"help": "Inverse temperature of the preference loss."})
    max_length: int | None = field(
        default=None, metadata={"help": "Must be None: the tokens of an observation cannot be truncated."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute each layer in the backward. Off: `step_micro_batch_size` bounds memory better."},
    )
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "Must be True: reference scores are computed once, before training."}
    )
    objective: str = field(
        default="sta-tpo",
        metadata={"help": "What is compared: stages, or whole trajectories by mean or sum.", "choices": list(OBJECTIVES)},
    )
    cost_coef: float = field(default=0.1, metadata={"help": "lambda, weight of the stage cost in a side's score, >= 0."})
    margin_sign: int = field(
        default=1,
        metadata={"help": "1: subtract the cost from the score (STARE); -1: add it, a larger margin (ODPO).", "choices": [1, -1]},
    )
    stage_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each stage in the loss, in the plan's order. None: all 1."}
    )
    step_micro_batch_size: int | None = field(
        default=None, metadata={"help": "Decisions forwarded at once, recomputed in the backward. None: all at once."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {OBJECTIVES}, got {self.objective!r}.")
        if not 0.0 < self.beta < math.inf:
            raise ValueError(f"`beta` must be positive and finite, got {self.beta}.")
        if not 0.0 <= self.cost_coef < math.inf:
            raise ValueError(f"`cost_coef` must be >= 0 and finite, got {self.cost_coef}. The sign is `margin_sign`'s.")
        if self.margin_sign not in (1, -1):
            raise ValueError(f"`margin_sign` must be 1 or -1, got {self.margin_sign}.")
        if self.stage_weights is not None and not (
            self.stage_weights and all(0.0 <= weight < math.inf for weight in self.stage_weights)
        ):
            raise ValueError(f"`stage_weights` must be numbers >= 0, one per stage, got {self.stage_weights}.")
        if self.stage_weights is not None and self.objective != "sta-tpo":
            raise ValueError(f"`stage_weights` must be None with objective {self.objective!r}, which has no stages.")
        if self.step_micro_batch_size is not None and self.step_micro_batch_size < 1:
            raise ValueError(f"`step_micro_batch_size` must be None or at least 1, got {self.step_micro_batch_size}.")
        if self.max_length is not None:
            raise ValueError(f"`max_length` must be None, got {self.max_length}: an observation cannot be truncated.")
        for name, value in _UNUSED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}` must be {value!r} in StageDPOConfig, got {getattr(self, name)!r}: the stage preference loss "
                    f"does not have it. Use `objective`, `beta`, `cost_coef` and `stage_weights`."
                )
