"""Interaction: PPO with stage-shaped rewards, inside the Trainer's own loop."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from trl_stare.data.rollout import Timing, play
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import VectorEnv, VLAPolicy
from trl_stare.losses import ppo_policy_loss, ppo_value_loss
from trl_stare.stages import StagePlan, segment, stage_success
from trl_stare.trainers._compat import _BaseTrainer, restore_weights
from trl_stare.trainers.actor_critic import ActorCritic, ValueHead, privileged_features
from trl_stare.trainers.ppo_batch import advantages_and_returns, decision_rewards, executed_tokens, observations
from trl_stare.trainers.stage_ppo_config import StagePPOConfig

ROLLOUT_STATE_FILE = "rollout_state.json"


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
        batch = trainer.make_batch(trainer.collect_rollout(iteration))
        generator = torch.Generator().manual_seed(trainer.episode_seed("shuffle", iteration))
        for _ in range(trainer.args.num_ppo_epochs):
            order = torch.randperm(len(batch["trace"]), generator=generator)
            for rows in order.tensor_split(trainer.args.num_minibatches):
                yield {name: _rows(value, rows) for name, value in batch.items()}


class StagePPOTrainer(_BaseTrainer):
    """
    Trainer for StA-PPO (STARE-VLA, arXiv 2512.05107).

    What differs from other TRL trainers: the data of an epoch are made when the epoch begins, by playing
    `episodes_per_iteration` episodes with the present policy; the loss is PPO's, on rewards shaped by stages. TRL has had no
    PPO trainer since 1.13, so the parent is the class all of its trainers share.

    Args:
        policy ([`VLAPolicy`]): the actor.
        args ([`StagePPOConfig`]): the configuration.
        env ([`VectorEnv`]): plays the episodes; its chunk size is the policy's. Each process brings its own.
        plan ([`StagePlan`]): the task's stages.
        train_dataset ([`~datasets.Dataset`]): episode starts, column `seed`: taken in order, `episodes_per_iteration` at a time,
            and again from the first when they are used up.
        eval_dataset ([`~datasets.Dataset`], *optional*): held-out starts for `evaluate`.
        callbacks (`list[TrainerCallback]`, *optional*): as in [`~transformers.Trainer`].

    Raises:
        ValueError: if the plan reads signals that the environment lacks, or if there are no starts.

    Example:

    ```python
    >>> env = make_env("StackCube-v1", num_envs=16, chunk_size=policy.chunk_size)
    >>> starts = Dataset.from_dict({"seed": list(range(10_000))})
    >>> trainer = StagePPOTrainer(policy, StagePPOConfig("interaction", num_train_epochs=20), env, plan, starts)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-stare", "sta-ppo"]
    _name = "StA-PPO"
    _paper = {"title": "STARE-VLA: Stage-Aware Reinforcement", "id": "2512.05107"}
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        policy: VLAPolicy,
        args: StagePPOConfig,
        env: VectorEnv,
        plan: StagePlan,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
    ):
        plan.validate_signals(env.signal_names)
        if "seed" not in train_dataset.column_names or not len(train_dataset):
            raise ValueError(
                f"`train_dataset` must hold episode starts with a `seed`, got {train_dataset.column_names}."
            )
        self.policy, self.env, self.plan = policy, env, plan
        self.env_steps = 0
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._stopped_iteration = -1
        num_features = self._count_features(args)
        super().__init__(
            model=ActorCritic(policy, ValueHead(num_features)),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=lambda rows: rows,
            processing_class=policy.processor,
            callbacks=callbacks,
        )

    def _count_features(self, args: StagePPOConfig) -> int:
        if args.critic == "hidden":
            return self.policy.model.config.get_text_config().hidden_size
        signals = self.env.reset([0]).signals
        return privileged_features(signals, self.env.signal_names, torch.zeros(self.env.num_envs)).shape[1]

    @property
    def iteration(self) -> int:
        """Index of the PPO iteration under way, from the optimizer steps taken: right also after resuming."""
        per_iteration = -(
            -self.args.num_ppo_epochs * self.args.num_minibatches // self.args.gradient_accumulation_steps
        )
        return self.state.global_step // per_iteration

    def episode_seed(self, purpose: str, iteration: int) -> int:
        """A seed that depends on nothing but the run's seed, the purpose, the iteration and the process."""
        code = {"shuffle": 0, "sample": 1}[purpose]
        return (self.args.seed * 1_000_003 + iteration * 8 + code) * 1_009 + self.args.process_index

    def get_train_dataloader(self) -> DataLoader:
        """One batch per minibatch, made on the fly; see [`RolloutStream`]."""
        return DataLoader(RolloutStream(self), batch_size=None)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The critic has its own learning rate."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {"params": [p for p in self.model.model.parameters() if p.requires_grad]},
                {"params": list(self.model.value_head.parameters()), "lr": self.args.value_learning_rate},
            ]
            # not left to PyTorch, whose AdamW decays by 0.01: that would move the policy also in the critic's warm-up
            self.optimizer = cls(groups, **options, weight_decay=self.args.weight_decay)
        return self.optimizer

    def collect_rollout(self, iteration: int) -> list[Trajectory]:
        """Play this process's share of the iteration's episodes."""
        args = self.args
        first = iteration * args.episodes_per_iteration
        rows = [row % len(self.train_dataset) for row in range(first, first + args.episodes_per_iteration)]
        seeds = self.train_dataset.select(rows[args.process_index :: args.world_size])["seed"]
        began, timing, was_training = time.perf_counter(), Timing(), self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            trajectories = play(
                self.env,
                self.policy,
                list(seeds),
                temperature=args.temperature,
                generator=torch.Generator().manual_seed(self.episode_seed("sample", iteration)),
                timing=timing,
            )
        self.model.train(was_training)
        num_steps = sum(trajectory.num_steps for trajectory in trajectories)
        self.env_steps += int(self._sum(num_steps))
        self._log_rollout(trajectories, time.perf_counter() - began, timing)
        return trajectories

    @torch.no_grad()
    def make_batch(self, trajectories: list[Trajectory]) -> dict[str, Any]:
        """One row per decision: model inputs, old log-probabilities and values, advantages, returns, mask."""
        args = self.args
        weight = args.shaping_weight if args.stage_aware else 0.0
        rewards = [
            decision_rewards(t, self.plan, gamma=args.gamma, weight=weight, form=args.potential_form)
            for t in trajectories
        ]
        features, final_features = self._critic_features(trajectories)
        value_head = self.model.value_head
        value_head.calibrate(features)
        values, final_values = value_head(features).cpu(), value_head(final_features).cpu()
        advantages, returns = advantages_and_returns(
            trajectories,
            rewards,
            values,
            final_values,
            gae_lambda=args.gae_lambda,
            bootstrap_on_truncation=args.bootstrap_on_truncation,
        )
        gathered = self.accelerator.gather_for_metrics(advantages.to(args.device)).cpu()
        residual = (returns - values).var() / returns.var().clamp(min=1e-8)
        self._metrics["value/explained_variance"].append(1 - residual.item())
        self._metrics["rollout/reward_raw"].append(sum(r.raw.sum().item() for r in rewards) / len(rewards))
        self._metrics["rollout/reward_shaped"].append(sum(r.shaped.sum().item() for r in rewards) / len(rewards))
        return {
            "inputs": self.policy.prepare(observations(trajectories)),
            "trace": torch.cat([t.trace for t in trajectories]),
            "logps": torch.cat([t.logps for t in trajectories]),
            "mask": torch.cat([executed_tokens(t, t.trace.shape[1], self.policy.chunk_size) for t in trajectories]),
            "features": features.cpu(),
            "values": values,
            "advantages": (advantages - gathered.mean()) / gathered.std().clamp(min=1e-8),
            "returns": returns,
        }

    def _critic_features(self, trajectories: list[Trajectory]) -> tuple[Tensor, Tensor]:
        """What the critic reads at every decision `[M, F]` and at every end `[N, F]`."""
        device = self.args.device
        if self.args.critic == "hidden":
            final = self.policy.prepare(observations(trajectories, final=True))
            # temperature and generator do not matter: only the hidden state is used
            ends = self.policy.act(final, temperature=1.0, generator=torch.Generator().manual_seed(0)).features
            return torch.cat([t.features for t in trajectories]).to(device), ends.to(device)
        names, limit = self.env.signal_names, self.env.max_episode_steps

        def features_at(chosen: list[Tensor]) -> Tensor:
            signals = {
                name: torch.cat([t.signals[name][at] for t, at in zip(trajectories, chosen, strict=True)])
                for name in names
            }
            return privileged_features(signals, names, torch.cat(chosen) / limit).to(device)

        return features_at([t.bounds[:-1] for t in trajectories]), features_at([t.bounds[-1:] for t in trajectories])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """PPO's loss on one minibatch of decisions."""
        args = self.args
        features = inputs["features"] if args.critic == "privileged" else None
        evaluation, values = model(inputs["inputs"], inputs["trace"], features, args.temperature)
        policy = ppo_policy_loss(
            evaluation.logps,
            inputs["logps"],
            inputs["advantages"],
            inputs["mask"],
            clip_range=args.clip_range,
            level=args.ratio_level,
            action_dim=self.policy.action_dim,
        )
        value_loss = ppo_value_loss(
            values, inputs["values"], inputs["returns"], clip_range=args.value_clip_range, huber_delta=args.huber_delta
        )
        entropy = evaluation.entropies[inputs["mask"]].mean()
        learns = self._policy_learns(policy.approx_kl)
        actor = args.policy_coef * policy.loss - args.entropy_coef * entropy
        loss = actor * learns + args.value_coef * value_loss
        ratio = (evaluation.logps.detach() - inputs["logps"]).abs()[inputs["mask"]].max().exp()
        measured = {
            "policy/loss": policy.loss,
            "policy/approx_kl": policy.approx_kl,
            "policy/clipfrac": policy.clipfrac,
            "policy/entropy": entropy,
            "policy/largest_ratio": ratio,
            "policy/updated": torch.tensor(float(learns)),
            "value/loss": value_loss,
        }
        for name, value in measured.items():
            self._metrics[name].append(value.detach().float().item())
        return (loss, {"loss": loss}) if return_outputs else loss

    def _policy_learns(self, approx_kl: Tensor) -> bool:
        """Whether this minibatch may move the policy: not in the critic's warm-up, nor after `target_kl` was exceeded."""
        if self.iteration < self.args.value_warmup_iterations or self._stopped_iteration == self.iteration:
            return False
        if self.args.target_kl is not None:
            kl = self.accelerator.gather(approx_kl.detach()).mean().item()  # the same decision on every process
            if kl > self.args.target_kl:
                self._stopped_iteration = self.iteration
                return False
        return True

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Play the held-out starts at the training temperature; logs `{prefix}_success_once` and `{prefix}_success_at_end`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.model.eval()
        trajectories = play(
            self.env,
            self.policy,
            list(dataset["seed"])[self.args.process_index :: self.args.world_size],
            temperature=self.args.temperature,
            generator=torch.Generator().manual_seed(self.args.seed),
            ignore_terminations=True,
        )
        total = self._sum(len(trajectories))
        metrics = {
            f"{metric_key_prefix}_{name}": self._sum(sum(getattr(t, name) for t in trajectories)) / total
            for name in ("success_once", "success_at_end")
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was measured since the last log."""
        measured = {name: sum(values) / len(values) for name, values in self._metrics.items() if values}
        self._metrics.clear()
        super().log({**logs, **measured}, start_time)

    def _log_rollout(self, trajectories: list[Trajectory], seconds: float, timing: Timing) -> None:
        passed = stage_success([segment(self.plan, t.signals) for t in trajectories], len(self.plan))
        num_steps, episodes = sum(t.num_steps for t in trajectories), len(trajectories)
        measured = {
            "rollout/success_once": sum(t.success_once for t in trajectories) / episodes,
            "rollout/episode_steps": num_steps / episodes,
            "rollout/env_steps": float(self.env_steps),
            "time/rollout_s": seconds,
            "time/policy_s": timing.act_s,
            "time/env_s": timing.step_s,
            "time/steps_per_s": num_steps / seconds,
        }
        for name, (k, n) in zip(self.plan.names, passed, strict=True):
            if n:
                measured[f"stage/{name}/success"] = k / n
        for name, value in measured.items():
            self._metrics[name].append(value)

    def _sum(self, value: float) -> float:
        return self.accelerator.gather(torch.tensor([float(value)], device=self.args.device)).sum().item()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy as a plain checkpoint, the value head beside it."""
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save(folder)
        (Path(folder) / ROLLOUT_STATE_FILE).write_text(json.dumps({"env_steps": self.env_steps}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore policy and critic, or raise."""
        if is_peft_model(self.policy.model):
            self.policy.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        else:
            restore_weights(self.policy.model, resume_from_checkpoint)
        self.model.load_value_head(resume_from_checkpoint)
        self.env_steps = json.loads((Path(resume_from_checkpoint) / ROLLOUT_STATE_FILE).read_text())["env_steps"]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left to [`trl_stare.evaluation.write_model_card`]: TRL's template is about text generation."""


def _rows(value: Any, rows: Tensor) -> Any:
    return {name: tensor[rows] for name, tensor in value.items()} if isinstance(value, dict) else value[rows]
