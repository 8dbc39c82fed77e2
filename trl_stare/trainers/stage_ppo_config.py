"""Configuration of the interaction stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl_stare.losses import RATIO_LEVELS
from trl_stare.stages import POTENTIAL_FORMS
from trl_stare.trainers._compat import _BaseConfig

CRITICS = ("privileged", "hidden")


@dataclass
class StagePPOConfig(_BaseConfig):
    r"""
    Configuration of [`StagePPOTrainer`].

    One PPO iteration (a rollout and its updates) is one epoch of the Trainer: `num_train_epochs` is the number of iterations,
    `save_strategy="epoch"` saves at rollout boundaries, `learning_rate` is the policy's.

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
        value_learning_rate (`float`, defaults to `1e-3`):
            Learning rate of the critic.
        critic (`str`, defaults to `"privileged"`):
            What the critic reads: `"privileged"` simulator signals and the time (asymmetric actor-critic, arXiv 1710.06542),
            or the policy's `"hidden"` state, detached, so that the critic cannot move the policy.
        value_warmup_iterations (`int`, defaults to `1`):
            First iterations in which only the critic learns.
        target_kl (`float`, *optional*):
            Skip the policy's remaining updates of an iteration once the approximate KL of a minibatch exceeds this.
        temperature (`float`, defaults to `1.0`):
            Sampling temperature of rollouts; log-probabilities are taken at the same temperature.
        stage_aware (`bool`, defaults to `True`):
            Shape the reward by stages. `False` is plain PPO, nothing else changed.
        shaping_weight (`float`, defaults to `0.5`), potential_form (`str`, defaults to `"staged"`):
            Weight and form of the shaping, see [`StagePlan.potential`].
        bootstrap_on_truncation (`bool`, defaults to `True`):
            Take the critic's value for what follows a time limit. `False` makes the limit part of the task ("solve it in
            time"), which needs a critic that knows the time.
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
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the critic."})
    critic: str = field(default="privileged", metadata={"help": f"What the critic reads: {CRITICS}."})
    value_warmup_iterations: int = field(
        default=1, metadata={"help": "First iterations in which only the critic learns."}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Stop the policy's updates of an iteration at this KL."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of rollouts."})
    stage_aware: bool = field(default=True, metadata={"help": "Shape the reward by stages; False is plain PPO."})
    shaping_weight: float = field(default=0.5, metadata={"help": "Weight of the shaping."})
    potential_form: str = field(default="staged", metadata={"help": f"Form of the potential: {POTENTIAL_FORMS}."})
    bootstrap_on_truncation: bool = field(default=True, metadata={"help": "Bootstrap through time limits."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the policy."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    logging_steps: float = field(
        default=1, metadata={"help": "Unused by rollout metrics, which are logged per iteration."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations. Off by default."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Train in bfloat16."})

    def __post_init__(self):
        positive = ("episodes_per_iteration", "num_ppo_epochs", "num_minibatches", "clip_range", "temperature")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        choices = {"ratio_level": RATIO_LEVELS, "critic": CRITICS, "potential_form": POTENTIAL_FORMS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}.")
        if self.value_warmup_iterations < 0 or self.shaping_weight < 0:
            raise ValueError(
                "`value_warmup_iterations` and `shaping_weight` must be at least 0, got "
                f"{self.value_warmup_iterations} and {self.shaping_weight}."
            )
        if not self.bootstrap_on_truncation and self.critic == "hidden":
            raise ValueError(
                "`bootstrap_on_truncation=False` needs a critic that knows the time, got critic='hidden'. "
                "Use critic='privileged' or bootstrap."
            )
        super().__post_init__()
