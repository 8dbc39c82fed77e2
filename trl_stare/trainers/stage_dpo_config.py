"""Options of [`StageDPOTrainer`]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from trl import DPOConfig

from trl_stare.data.pairs import OBJECTIVES, STAGE_OBJECTIVES
from trl_stare.losses import PREFERENCE_LOSSES
from trl_stare.trainers._compat import start_deepspeed_on_cpu, use_cpu_without_gpus
from trl_stare.trainers.processes import end_with_launcher
from trl_stare.trainers.unused import refuse_unused

SUMMED = ("sta-tpo-sum", "tpo-sum")
"""Objectives whose side has the sum of its steps' scores."""

# Options of DPO that mean something for tokens of a text, or for its other losses, and would be ignored here.
_UNUSED = {
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "sync_ref_model": False,
    "padding_free": False,
    "torch_compile": False,
    "precompute_ref_log_probs": True,
}


@dataclass
class StageDPOConfig(DPOConfig):
    r"""
    Configuration class for the [`StageDPOTrainer`]. Only what differs from [`~trl.DPOConfig`] is listed.

    Args:
        objective (`str`, *optional*, defaults to `"sta-tpo"`):
            `"sta-tpo"`: stage pairs, mean over the stage's steps, as the paper has it. `"sta-tpo-sum"`: their sum, which
            gives a step the same weight in a short segment and in a long one. `"tpo-mean"`, `"tpo-sum"`: whole trajectories.
        beta (`float`, *optional*, defaults to `1.0`):
            Inverse temperature. With the mean over steps, times the chunk's `C`, 1.0 is about GRAPE's 0.1 on a sum of 8.
        temperature (`float`, *optional*, defaults to `1.0`):
            At which the rollouts were sampled, and the policy is going to be: log-likelihoods of policy and reference are
            taken at it, as [`StagePPOConfig`] does. Pairs of actions that were sampled at 0.3 say what a policy at 0.3 should do.
        cost_coef (`float`, *optional*, defaults to `0.1`):
            `lambda`, weight of the stage cost in a side's score.
        margin_sign (`int`, *optional*, defaults to `1`):
            `1`: the paper's sign, the clearer preference has the smaller gradient. `-1`: ODPO's (arXiv 2402.10571).
        centered (`bool`, *optional*, defaults to `False`):
            Compare what the policy chooses in a state, not which states it is in: subtract from every decision's
            log-ratio its mean over the reference's actions ([`~trl_stare.losses.centered_scores`]). Not in the paper,
            whose loss is also satisfied by a policy that is spoilt in the states of rejected segments; see docs/preference.md.
            Costs one more forward, and without LoRA the memory of a frozen copy. Not under ZeRO-3 and FSDP.
        stage_weights (`list[float]`, *optional*):
            Weight of each stage in the loss, in the plan's order. `None`: all 1.
        step_micro_batch_size (`int`, *optional*):
            Decisions forwarded at once. The forward is then recomputed in the backward, so that memory does not grow
            with the length of trajectories; gradients are the same. `None`: all at once.
        loss_type (`str` or `list[str]`, *optional*, defaults to `["sigmoid"]`):
            One of TRL's losses that are functions of one margin per pair: `"sigmoid"`, `"hinge"`, `"ipo"`, `"robust"`
            ([`~trl_stare.losses.margin_loss`]). TRL divides `ipo`'s scores by the number of tokens; here the objective
            has divided them already, by the number of steps, except where it sums.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Of `"robust"`: the probability that a preference is flipped, in [0, 0.5).
        ref_cache_dir (`str`, *optional*):
            Where reference scores are kept between runs. `None`: beside the dataset's files, or in
            `output_dir/reference_scores` where the dataset is in memory only. Scores are found again by the content of
            what they depend on: the reference's weights, the rows, the objective, the processor and the precision.
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
        metadata={
            "help": "What is compared: stages, or whole trajectories by mean or sum.",
            "choices": list(OBJECTIVES),
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the rollouts, > 0."})
    cost_coef: float = field(
        default=0.1, metadata={"help": "lambda, weight of the stage cost in a side's score, >= 0."}
    )
    margin_sign: int = field(
        default=1,
        metadata={
            "help": "1: subtract the cost from the score (STARE); -1: add it, a larger margin (ODPO).",
            "choices": [1, -1],
        },
    )
    centered: bool = field(
        default=False, metadata={"help": "Subtract from each log-ratio its mean over the reference's actions."}
    )
    stage_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each stage in the loss, in the plan's order. None: all 1."}
    )
    step_micro_batch_size: int | None = field(
        default=None, metadata={"help": "Decisions forwarded at once, recomputed in the backward. None: all at once."}
    )

    ref_cache_dir: str | None = field(
        default=None, metadata={"help": "Where reference scores are kept between runs. None: beside the dataset."}
    )

    def __post_init__(self):
        use_cpu_without_gpus(self)
        if self.bf16 is None:
            on_gpu = not self.use_cpu and torch.cuda.is_available()
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        end_with_launcher()
        super().__post_init__()
        start_deepspeed_on_cpu(self)
        weights, size = self.stage_weights, self.step_micro_batch_size
        for name, is_valid, rule in (
            ("objective", self.objective in OBJECTIVES, f"one of {OBJECTIVES}"),
            ("beta", 0.0 < self.beta < math.inf, "positive and finite"),
            ("temperature", 0.0 < self.temperature < math.inf, "positive and finite, as the rollouts were sampled"),
            ("cost_coef", 0.0 <= self.cost_coef < math.inf, ">= 0 and finite; its sign is `margin_sign`"),
            ("margin_sign", self.margin_sign in (1, -1), "1 (as the paper states it) or -1 (ODPO)"),
            (
                "stage_weights",
                weights is None or weights and min(weights) >= 0.0,
                "None or numbers >= 0, one per stage",
            ),
            (
                "stage_weights",
                weights is None or self.objective in STAGE_OBJECTIVES,
                "None where trajectories are compared whole",
            ),
            (
                "loss_type",
                len(self.loss_type) == 1 and self.loss_type[0] in PREFERENCE_LOSSES,
                f"one of {PREFERENCE_LOSSES}, which are functions of a scalar margin",
            ),
            (
                "label_smoothing",
                0.0 <= self.label_smoothing < 0.5 and (not self.label_smoothing or self.loss_type == ["robust"]),
                "in [0, 0.5), and 0 except for `loss_type='robust'`",
            ),
            ("step_micro_batch_size", size is None or size >= 1, "None or at least 1"),
            ("max_length", self.max_length is None, "None: the tokens of an observation cannot be truncated"),
        ):
            if not is_valid:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")
        refuse_unused(self, _UNUSED, "Use `objective`, `beta`, `cost_coef` and `stage_weights`.")

    @property
    def stage_aware(self) -> bool:
        """Whether stages are compared, and not whole trajectories."""
        return self.objective in STAGE_OBJECTIVES
