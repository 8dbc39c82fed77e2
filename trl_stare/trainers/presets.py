"""Named settings of [`StagePPOConfig`]: what they change from its defaults, and nothing else."""

from __future__ import annotations

from typing import Any

_SMALL_CPU: dict[str, Any] = {
    "use_cpu": True,
    # many episodes and few, large minibatches: smaller ones at twice the learning rate stood still
    "episodes_per_iteration": 256,
    "num_ppo_epochs": 3,
    "num_minibatches": 4,
    # most is gained in the first ten iterations: fast there, then let the noise of the updates settle
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "value_learning_rate": 2e-3,
    # a privileged critic explains more than half of the returns within three iterations: trust it over long sums of noise
    "critic": "privileged",
    "gae_lambda": 0.7,
    "value_warmup_iterations": 1,
    # soft imitation targets leave the policy noisier than is good for it: let the entropy fall
    "entropy_coef": -0.06,
    # the limit of the episode is part of what is measured, and the critic knows the time
    "bootstrap_on_truncation": False,
    # where the limit is an end, shaping that is lost there changes nothing that an exact critic would not: an episode keeps it
    "final_potential": "kept",
}

PPO_PRESETS: dict[str, dict[str, Any]] = {
    # RL4VLA (arXiv 2505.19789), read from its code (github.com/gen-robot/RL4VLA: `train_ms3_ppo.py`, `replay_buffer.py`,
    # `openvla_train.py`). Other than there: time limits are bootstrapped, the policy loss is not multiplied by 7 (set
    # `policy_coef=7` for that), and the reward is shaped by stages (set `stage_aware=False`). The adapter is the
    # caller's: LoRA of rank 32, alpha 16.
    "rl4vla-7b": {
        # 64 environments x 80 steps, whatever happens in them: 5120 decisions ...
        "episodes_per_iteration": 64,
        "ignore_terminations": True,
        "reward": "rl4vla",
        "temperature": 1.0,
        "eval_temperature": 0.6,
        # ... in micro-batches of 8, 20 to an update: 32 updates. For one process; on `W`, divide both numbers by it
        "num_ppo_epochs": 1,
        "num_minibatches": 640,
        "gradient_accumulation_steps": 20,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "ratio_level": "action",
        "value_clip_range": 0.2,
        "huber_delta": 10.0,
        "value_coef": 1.0,
        "entropy_coef": 0.0,
        "critic": "shared",
        "value_warmup_iterations": 0,
        "learning_rate": 1e-4,
        "value_learning_rate": 3e-3,
        # the default of PyTorch's AdamW, which RL4VLA does not change
        "weight_decay": 0.01,
        "max_grad_norm": 10.0,
        "bf16": True,
        # sampling and update run in different batch shapes, which bfloat16 tells apart
        "recompute_logps": True,
    },
    # a policy of a few million weights on two CPU cores: `recipes/configs/ipi_stackcube_tiny.yaml`, measured in docs/results.md
    "small-cpu": _SMALL_CPU,
    # the same where hardly an episode succeeds yet: docs/results.md, "Success hardly ever seen" and "Interaction from the same start"
    "small-cpu-rare": _SMALL_CPU
    | {
        # there is nothing to settle, and a habit that fails is not to be sharpened
        "learning_rate": 4e-4,
        "lr_scheduler_type": "constant",
        "entropy_coef": 0.0,
        # stages are what is paid, and each of them learns as much, however little of a rollout it is
        "shaping_weight": 1.0,
        "advantage_norm": "stage",
    },
}
"""Of 7B models and of small ones; see [`StagePPOConfig.preset`]."""
