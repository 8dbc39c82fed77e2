"""Configuration of the interaction stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import SaveStrategy

from trl_stare.losses import RATIO_LEVELS
from trl_stare.stages import POTENTIAL_FORMS
from trl_stare.trainers._compat import _BaseConfig, start_deepspeed_on_cpu, use_cpu_without_gpus
from trl_stare.trainers.actor_critic import SIMULATOR_CRITICS
from trl_stare.trainers.presets import PPO_PRESETS
from trl_stare.trainers.processes import end_with_launcher, meet_anew_after_restart
from trl_stare.trainers.rewards import REWARDS
from trl_stare.trainers.unused import refuse_unused

CRITICS = (*SIMULATOR_CRITICS, "hidden", "shared")
ADVANTAGE_NORMS = ("rollout", "stage")
FINAL_POTENTIALS = ("zero", "kept")

_POSITIVE = (
    "episodes_per_iteration",
    "num_ppo_epochs",
    "num_minibatches",
    "clip_range",
    "value_clip_range",
    "huber_delta",
    "target_kl",
    "temperature",
    "potential_scale",
    "reset_pool_size",
    "max_skipped_updates",
)
_SHARES = ("gamma", "gae_lambda", "reset_share")
_NOT_NEGATIVE = (
    "value_warmup_iterations",
    "shaping_weight",
    "policy_coef",
    "value_coef",
    "kl_coef",
    "value_learning_rate",
    "eval_temperature",
)
_UNUSED = {
    "per_device_train_batch_size": 8,
    "dataloader_drop_last": False,
    "dataloader_num_workers": 0,
    "auto_find_batch_size": False,
    "label_smoothing_factor": 0.0,
}
_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedulers that read the learning rate back, which is 0 where the policy is held."""
_CHOICES = {
    "ratio_level": RATIO_LEVELS,
    "critic": CRITICS,
    "potential_form": POTENTIAL_FORMS,
    "reward": REWARDS,
    "advantage_norm": ADVANTAGE_NORMS,
    "final_potential": FINAL_POTENTIALS,
}


@dataclass
class StagePPOConfig(_BaseConfig):
    r"""
    Configuration of [`StagePPOTrainer`].

    One PPO iteration (a rollout and its updates) is one epoch of the Trainer: `num_train_epochs` is the number of iterations,
    checkpoints are saved at rollout boundaries (by default at each, and two are kept), `learning_rate` is the policy's.

    Parameters:
        episodes_per_iteration (`int`, defaults to `128`):
            Episodes of one rollout, over all processes.
        num_ppo_epochs (`int`, defaults to `3`):
            Passes over a rollout.
        num_minibatches (`int`, defaults to `16`):
            Minibatches of one pass on each process. Rollouts differ in length, so their number is fixed, not their size.
        gamma (`float`, defaults to `0.99`), gae_lambda (`float`, defaults to `0.95`):
            Discount per environment step, and GAE's decay per decision.
        clip_range (`float`, defaults to `0.2`), ratio_level (`str`, defaults to `"token"`):
            Clipping of the importance ratio, and what one ratio is over: `"token"`, `"action"` (an environment step) or
            `"chunk"`. A ratio over all tokens of a chunk saturates the clip.
        value_clip_range (`float`, *optional*), huber_delta (`float`, *optional*):
            Clipping and Huber threshold of the value loss; off by default.
        policy_coef, value_coef, entropy_coef (`float`, default to `1.0`, `0.5`, `0.0`):
            Weights of the three losses.
        kl_coef (`float`, defaults to `0.0`):
            Weight of the KL to the reference, the policy as it is when the trainer is made (with PEFT a copy of its adapter). 0 keeps none.
        advantage_norm (`str`, defaults to `"rollout"`):
            Over what advantages are brought to mean 0 and standard deviation 1: the `"rollout"`, or each `"stage"` of it alone,
            so that a stage in which little is at stake learns as much as the others. Where success was rare, `"stage"` added seven
            points to StA-PPO's success on StackCube-v1 (docs/results.md, "Interaction from the same start").
        value_learning_rate (`float`, defaults to `1e-3`):
            Learning rate of the critic.
        critic (`str`, defaults to `"privileged"`):
            What the critic reads: `"privileged"` simulator signals and the time (asymmetric actor-critic, arXiv 1710.06542), or
            what the plan makes of them, `"stages"`: the current stage and how far each stage is from its end ([`stage_features`]),
            or the policy's `"hidden"` state, detached, so that the critic cannot move the policy, or that state `"shared"`, i.e.
            with the value loss reaching the policy's weights (RL4VLA).
        value_warmup_iterations (`int`, defaults to `1`):
            First iterations in which only the critic learns. The policy stays as it is, to the bit.
        target_kl (`float`, *optional*):
            Skip the policy's remaining updates of an iteration once the approximate KL of a minibatch exceeds this.
        temperature (`float`, defaults to `1.0`):
            Sampling temperature of rollouts; log-probabilities are taken at the same temperature.
        eval_temperature (`float`, *optional*):
            Sampling temperature of `evaluate`, `temperature` if it is not given; 0 is greedy.
        recompute_logps (`bool`, defaults to `False`):
            Take the old log-probabilities from a second look at the rollout, in the batches of an update, and not from sampling:
            bfloat16 gives other ones in other batches, and the first ratio would not be 1.
        disable_dropout (`bool`, defaults to `True`):
            Switch the policy's dropout off, as TRL's DPO does: with it rollout and update are of different policies.
        ignore_terminations (`bool`, defaults to `False`):
            Play every training episode to its time limit, as RL4VLA does, and not until it is solved.
        reward (`str`, defaults to `"success"`):
            What the task pays: its own sparse reward, or `"rl4vla"`, the difference reward of [`rl4vla_reward`].
        stage_aware (`bool`, defaults to `True`):
            Shape the reward by stages. `False` is plain PPO, nothing else changed.
        shaping_weight (`float`, defaults to `0.5`), potential_form (`str`, defaults to `"staged"`):
            Weight and form of the shaping, see [`StagePlan.potential`].
        potential_scale (`float`, defaults to `1.0`):
            What every `L_k` of the plan is multiplied by for the potential, see [`StagePlan.rescaled`]. Below 1 coming nearer to a
            stage's end is worth more, against passing it.
        final_potential (`str`, defaults to `"zero"`):
            The potential after the end of an episode. `"zero"` changes no optimal policy and, with an exact critic, not even an
            update. `"kept"` pays each episode for the stage it ended in, `shaping_weight` for a solved one: progress counts also
            where success is too rare to learn from. A time limit that is bootstrapped is no end: there the potential always stays.
        reset_share (`float`, defaults to `0.0`):
            Share of training episodes that begin where an earlier one entered the stage that fails most, see [`StageCurriculum`].
            The steps that lead there are replayed without rendering, and not counted as environment steps.
        reset_pool_size (`int`, defaults to `64`):
            How many such beginnings are kept for each stage.
        bootstrap_on_truncation (`bool`, defaults to `True`):
            Take the critic's value for what follows a time limit. `False` makes the limit part of the task ("solve it in
            time"), which needs a critic that knows the time.
        max_skipped_updates (`int`, defaults to `5`):
            Updates whose loss or gradient is not finite are skipped and counted; after so many in a row the run stops.
        stop_grace_s (`float`, defaults to `25.0`):
            Seconds after a SIGTERM in which the iteration may come to its end and be saved. Slurm and Kubernetes kill after 30.
    """

    episodes_per_iteration: int = field(default=128, metadata={"help": "Episodes of one rollout, over all processes."})
    num_ppo_epochs: int = field(default=3, metadata={"help": "Passes over a rollout."})
    num_minibatches: int = field(default=16, metadata={"help": "Minibatches of one pass on each process."})
    gamma: float = field(default=0.99, metadata={"help": "Discount per environment step."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Decay of GAE per decision."})
    clip_range: float = field(default=0.2, metadata={"help": "Clipping of the importance ratio."})
    ratio_level: str = field(default="token", metadata={"help": f"What one importance ratio is over: {RATIO_LEVELS}."})
    value_clip_range: float | None = field(default=None, metadata={"help": "Clipping of the value loss."})
    huber_delta: float | None = field(default=None, metadata={"help": "Huber threshold of the value loss."})
    policy_coef: float = field(default=1.0, metadata={"help": "Weight of the policy loss."})
    value_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the KL to the reference."})
    advantage_norm: str = field(
        default="rollout", metadata={"help": f"Over what advantages are normalised: {ADVANTAGE_NORMS}."}
    )
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the critic."})
    critic: str = field(default="privileged", metadata={"help": f"What the critic reads: {CRITICS}."})
    value_warmup_iterations: int = field(
        default=1, metadata={"help": "First iterations in which only the critic learns."}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Stop the policy's updates of an iteration at this KL."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of rollouts."})
    eval_temperature: float | None = field(default=None, metadata={"help": "Sampling temperature of `evaluate`."})
    recompute_logps: bool = field(
        default=False, metadata={"help": "Take the old log-probabilities from a second look at the rollout."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch the policy's dropout off."})
    ignore_terminations: bool = field(
        default=False, metadata={"help": "Play every training episode to its time limit."}
    )
    reward: str = field(default="success", metadata={"help": f"What the task pays: {REWARDS}."})
    stage_aware: bool = field(default=True, metadata={"help": "Shape the reward by stages; False is plain PPO."})
    shaping_weight: float = field(default=0.5, metadata={"help": "Weight of the shaping."})
    potential_form: str = field(default="staged", metadata={"help": f"Form of the potential: {POTENTIAL_FORMS}."})
    potential_scale: float = field(
        default=1.0, metadata={"help": "What every scale `L_k` of the potential is multiplied by; below 1 is steeper."}
    )
    final_potential: str = field(
        default="zero", metadata={"help": f"The potential after an episode's end: {FINAL_POTENTIALS}."}
    )
    reset_share: float = field(
        default=0.0, metadata={"help": "Share of training episodes that begin at the entry of a later stage."}
    )
    reset_pool_size: int = field(default=64, metadata={"help": "Beginnings kept for each later stage."})
    bootstrap_on_truncation: bool = field(default=True, metadata={"help": "Bootstrap through time limits."})
    max_skipped_updates: int = field(
        default=5, metadata={"help": "Stop after so many updates in a row whose loss or gradient is not finite."}
    )
    stop_grace_s: float = field(
        default=25.0, metadata={"help": "Seconds after a SIGTERM in which the iteration may come to its end."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the policy."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    logging_steps: float = field(
        default=1, metadata={"help": "Unused by rollout metrics, which are logged per iteration."}
    )
    save_strategy: SaveStrategy | str = field(
        default="epoch",
        metadata={"help": "When to save: an epoch is an iteration, between two of which a run can be continued."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Newest checkpoints that are kept; None: all."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations. Off by default."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Train in bfloat16."})

    def __post_init__(self):
        self._require(_POSITIVE, lambda value: value > 0, "positive")
        self._require(_SHARES, lambda value: 0 <= value <= 1, "in [0, 1]")
        self._require(_NOT_NEGATIVE, lambda value: value >= 0, "at least 0")
        for name, known in _CHOICES.items():
            self._require((name,), lambda value, known=known: value in known, f"one of {known}")
        if not self.bootstrap_on_truncation and self.critic not in SIMULATOR_CRITICS:
            raise ValueError(
                "`bootstrap_on_truncation=False` needs a critic that knows the time, got "
                f"critic={self.critic!r}. Use one of {SIMULATOR_CRITICS}, or bootstrap."
            )
        if self.reset_share and self.reward == "rl4vla":
            raise ValueError(
                f"`reset_share` must be 0 with reward='rl4vla', got {self.reset_share}: it pays for success only after a grasp, and one "
                "before an episode's beginning is not known. Use reward='success'."
            )
        self._require(
            ("lr_scheduler_type",),
            lambda value: value not in _BY_EVALUATION,
            f"another than {_BY_EVALUATION}, whose rate would stay 0",
        )
        use_cpu_without_gpus(self)
        end_with_launcher()
        meet_anew_after_restart()
        super().__post_init__()  # makes the process group
        start_deepspeed_on_cpu(self)
        self._check_sizes()
        refuse_unused(
            self,
            _UNUSED,
            "A batch is a part of a rollout: use `num_minibatches`, and `gradient_accumulation_steps` against too little memory.",
        )

    def _check_sizes(self) -> None:
        if self.episodes_per_iteration < self.world_size:
            raise ValueError(
                f"`episodes_per_iteration` must give each of {self.world_size} processes an episode, got "
                f"{self.episodes_per_iteration}."
            )
        if self.max_steps > 0 and self.max_steps % self.updates_per_iteration:
            raise ValueError(
                f"`max_steps` must be whole iterations of {self.updates_per_iteration} updates, got {self.max_steps}. "
                "Use `num_train_epochs`, the number of iterations."
            )

    def _require(self, names: Iterable[str], holds: Callable[[Any], bool], wanted: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")

    @property
    def evaluation_temperature(self) -> float:
        """Sampling temperature of an evaluation: `eval_temperature`, or that of rollouts."""
        return self.temperature if self.eval_temperature is None else self.eval_temperature

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps of one PPO iteration."""
        return -(-self.num_ppo_epochs * self.num_minibatches // self.gradient_accumulation_steps)

    @property
    def num_iterations(self) -> int:
        """PPO iterations of a run; the last has fewer updates if `num_train_epochs` is not whole."""
        return self.max_steps // self.updates_per_iteration if self.max_steps > 0 else math.ceil(self.num_train_epochs)

    @classmethod
    def preset(cls, name: str, output_dir: str, **overrides: Any) -> StagePPOConfig:
        """The named settings, with `overrides` over them: a plain config, which can be printed and saved as any other.

        Args:
            name (`str`): `"rl4vla-7b"`, RL4VLA's recipe for policies of 7B weights; `"small-cpu"`, or `"small-cpu-rare"` where
                hardly an episode succeeds yet.
            output_dir (`str`): as in any config. overrides: fields that differ, e.g. those of a YAML file.

        Raises:
            ValueError: for an unknown name; lists the known ones.

        Example:

        ```python
        >>> config = StagePPOConfig.preset("rl4vla-7b", "interaction", num_train_epochs=100, **yaml.safe_load(text))
        ```
        """
        return cls(output_dir=output_dir, **{**preset_fields(name), **overrides})


def preset_fields(name: str) -> Mapping[str, Any]:
    """What a preset changes from the defaults; `parser.set_defaults(**preset_fields(name))` puts it below a YAML file and flags.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    if name not in PPO_PRESETS:
        raise ValueError(f"`preset` must be one of {sorted(PPO_PRESETS)}, got {name!r}.")
    return PPO_PRESETS[name]
