"""Interaction: PPO with stage-shaped rewards, inside the Trainer's own loop."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from trl_stare.data.actors import policy_actor
from trl_stare.data.rollout import Timing, play, stream, warn_of_void
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import VectorEnv, VLAPolicy
from trl_stare.stages import StagePlan
from trl_stare.trainers._compat import _BaseTrainer, restore_weights
from trl_stare.trainers.actor_critic import SIMULATOR_CRITICS, ActorCritic, ValueHead, simulator_features
from trl_stare.trainers.adapters import require_trainable
from trl_stare.trainers.boundaries import RolloutBoundaries, RolloutStopped, StopRequest, UpdateGuard
from trl_stare.trainers.checkpointing import AtomicCheckpoints
from trl_stare.trainers.curriculum import StageCurriculum
from trl_stare.trainers.ledger import LEDGER_FILE, EpisodeLedger, episode_row, void_row
from trl_stare.trainers.ppo_terms import ppo_terms
from trl_stare.trainers.processes import Rendezvous, gather_rows, total
from trl_stare.trainers.reference import PolicyReference
from trl_stare.trainers.rewards import check_reward
from trl_stare.trainers.rollout_batch import make_batch
from trl_stare.trainers.rollout_stream import RolloutStream
from trl_stare.trainers.sharding import refuse_data_parallel, refuse_fsdp, whole_weights
from trl_stare.trainers.stage_ppo_config import StagePPOConfig
from trl_stare.trainers.stage_ppo_metrics import IterationClock, evaluation_counts
from trl_stare.trainers.starts import check_starts

ROLLOUT_STATE_FILE = "rollout_state.json"


class StagePPOTrainer(AtomicCheckpoints, _BaseTrainer):
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
        ValueError: if the plan reads signals that the environment lacks, or if there are no starts, or nothing to train.

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
        check_starts(train_dataset, eval_dataset)
        check_reward(args.reward, env.signal_names, env.task)
        require_trainable(policy.model)
        refuse_fsdp()
        refuse_data_parallel(args)
        self.policy, self.env, self.plan = policy, env, plan
        self.shaping_plan = plan.rescaled(args.potential_scale)
        self.env_steps = 0
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._stopped_iteration, self._is_first_minibatch, self.holds_policy = -1, True, False
        self.reference = PolicyReference(policy) if args.kl_coef else None
        self.curriculum = StageCurriculum(
            plan,
            share=args.reset_share,
            pool_size=args.reset_pool_size,
            seed=args.seed,
            max_episode_steps=env.max_episode_steps,
        )
        self._stop, self._guard = StopRequest(), UpdateGuard(self)
        model = ActorCritic(policy, ValueHead(self._count_features(args)), shares_features=args.critic == "shared")
        if args.disable_dropout:
            model.disable_dropout()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=lambda rows: rows,
            processing_class=policy.processor,
            callbacks=callbacks,
        )
        self._clock = IterationClock(self)
        # the clock logs, after which HF takes logging for done: what decides about it comes last
        for callback in (self._guard, self._clock, RolloutBoundaries(self)):
            self.add_callback(callback)
        self.ledger = EpisodeLedger(Path(args.output_dir) / LEDGER_FILE)
        self._rendezvous = Rendezvous(self.accelerator, args.ddp_timeout)

    def _count_features(self, args: StagePPOConfig) -> int:
        if args.critic not in SIMULATOR_CRITICS:
            # a policy whose features are not its language model's hidden state says how many there are
            return getattr(self.policy, "num_features", None) or self.policy.model.config.get_text_config().hidden_size
        signals, time = self.env.reset([0]).signals, torch.zeros(self.env.num_envs)
        return simulator_features(args.critic, self.plan, signals, self.env.signal_names, time).shape[1]

    @property
    def iteration(self) -> int:
        """Index of the PPO iteration under way, from the optimizer steps taken: right also after resuming."""
        return self.state.global_step // self.args.updates_per_iteration

    @property
    def is_finished(self) -> bool:
        """Whether training came to its end: not so after a SIGTERM."""
        return self.state.global_step >= self.state.max_steps

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`AtomicCheckpoints.train`]; after a SIGTERM it saves at the next rollout boundary and returns, see `is_finished`."""
        with self._stop:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is set in any process; all must ask."""
        return bool(total(self.accelerator, torch.tensor(float(flag))) > 0)

    def must_stop(self, grace: float = 0.0) -> bool:
        """Whether some process was asked to stop more than `grace` seconds ago."""
        return self.any_process(self._stop.waited_longer_than(grace))

    def episode_seed(self, purpose: str, iteration: int) -> int:
        """A seed that depends on nothing but the run's seed, the purpose, the iteration and the process."""
        code = {"shuffle": 0, "sample": 1}[purpose]
        return (self.args.seed * 1_000_003 + iteration * 8 + code) * 1_009 + self.args.process_index

    def get_train_dataloader(self) -> DataLoader:
        """One batch per minibatch, made on the fly; see [`RolloutStream`]."""
        # a loader draws a seed for its workers, of which there are none: the global generator stays out of it
        return DataLoader(RolloutStream(self), batch_size=None, generator=torch.Generator())

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
        """Play this process's share of the iteration's episodes.

        Raises:
            RolloutStopped: if a process was asked to stop.
            RuntimeError: if the simulator spoiled all of this process's episodes, or if a process does not come.
        """
        args, rows, position = self.args, [], self.ledger.position
        first = iteration * args.episodes_per_iteration
        seeds = [row % len(self.train_dataset) for row in range(first, first + args.episodes_per_iteration)]
        starts = self.curriculum.starts(self.train_dataset.select(seeds)["seed"], iteration)

        def write(row: dict[str, Any]) -> None:
            rows.append({"iteration": iteration, "rank": args.process_index} | row)
            if args.process_index == 0:
                self.ledger.append(rows[-1])

        def on_episode(trajectory: Trajectory) -> None:
            write(episode_row(trajectory, self.plan))
            if self._stop.requested:
                raise RolloutStopped

        timing, was_training, trajectories = Timing(), self.model.training, []
        self.model.eval()
        with self.accelerator.autocast(), suppress(RolloutStopped):
            trajectories = play(
                self.env,
                self.policy,
                starts[args.process_index :: args.world_size],
                temperature=args.temperature,
                generator=torch.Generator().manual_seed(self.episode_seed("sample", iteration)),
                timing=timing,
                ignore_terminations=args.ignore_terminations,
                on_episode=on_episode,
                on_void=lambda start, void: write(void_row(self.env.task, start, void)),
            )
        self.model.train(was_training)
        self._rendezvous.wait()
        if self.must_stop():
            if args.process_index == 0:
                self.ledger.rewind(position)
            raise RolloutStopped
        rows = gather_rows(self.accelerator, rows)
        if args.process_index == 0:
            self.ledger.append(*(row for row in rows if row["rank"] != 0))
        self.curriculum.update(gather_rows(self.accelerator, [self.curriculum.describe(t) for t in trajectories]))
        if not trajectories:
            raise RuntimeError(
                f"the simulator spoiled all episodes of process {args.process_index}, see {self.ledger.path}."
            )
        num_steps = sum(row["length"] for row in rows)
        self.env_steps += num_steps
        self._clock.end_rollout(timing, num_steps)
        voided = sum("void" in row for row in rows)
        self.record({"rollout/env_steps": [self.env_steps], "rollout/voided": [voided]})
        self.record({"rollout/skipped_updates": [self._guard.skipped]})
        return trajectories

    def make_batch(self, trajectories: list[Trajectory]) -> dict[str, Any]:
        """See [`make_batch`]."""
        self._is_first_minibatch = True
        return make_batch(self, trajectories)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """PPO's loss on one minibatch of decisions."""
        args = self.args
        features = inputs["features"] if args.critic in SIMULATOR_CRITICS else None
        evaluation, values = model(inputs["inputs"], inputs["trace"], features, args.temperature)
        terms = ppo_terms(evaluation, values, inputs, args, action_dim=self.policy.action_dim)
        learns = self._policy_learns(terms.policy.approx_kl)
        self._hold_policy(not learns)
        of_tokens, of_decisions = inputs["weights"]
        actor_loss = terms.actor_loss(args, of_tokens, of_decisions)
        loss = actor_loss * learns + of_decisions * args.value_coef * terms.value_loss
        self._guard.look_at(loss.detach())
        self.record(terms.metrics() | {"policy/updated": [float(learns)]})
        if self._is_first_minibatch:
            self.record({"policy/first_ratio": [terms.largest_ratio.item()]})
            self._is_first_minibatch = False
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

    def _hold_policy(self, hold: bool) -> None:
        """Momentum and weight decay would go on moving the policy; with a learning rate of 0 nothing does. See also [`UpdateGuard`]."""
        self.holds_policy = hold
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = 0.0 if hold else self.lr_scheduler.get_last_lr()[0]

    def record(self, values: Mapping[str, Sequence[float]]) -> None:
        """Keep what was measured until the next log, which gives the mean over all processes."""
        for name, measured in values.items():
            self._metrics[name] += measured

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Play the held-out starts, from the beginning to the time limit; logs `{prefix}_success_once` and so on, see [`evaluation_counts`].

        An episode that the simulator spoils is left out, which is logged.
        """
        args, was_training = self.args, self.model.training
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("`eval_dataset` must hold starts to evaluate, got None. Give it here or to the trainer.")
        self.model.eval()
        with self.accelerator.autocast(), whole_weights(self.model_wrapped, self.accelerator):
            act = policy_actor(
                self.policy,
                temperature=args.evaluation_temperature,
                generator=torch.Generator().manual_seed(args.seed),
            )
            starts = list(dataset["seed"])[args.process_index :: args.world_size]
            played = stream(self.env, act, starts, name="policy", ignore_terminations=True, on_void=warn_of_void)
            counts = evaluation_counts((trajectory for _, trajectory in played), self.plan).items()
        self.model.train(was_training)
        counts = {f"{metric_key_prefix}_{name}": [self._sum(count) for count in pair] for name, pair in counts}
        metrics = {name: passed / reached for name, (passed, reached) in counts.items() if reached}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was measured since the last log, in all processes."""
        own = [{name: (sum(values), len(values)) for name, values in self._metrics.items() if values}]
        self._metrics.clear()
        sums: dict[str, tuple[float, int]] = {}
        for part in gather_rows(self.accelerator, own):
            for name, (value, count) in part.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = (before[0] + value, before[1] + count)
        super().log({**logs, **{name: value / count for name, (value, count) in sums.items()}}, start_time)

    def _sum(self, value: float) -> float:
        return self.accelerator.gather(torch.tensor([float(value)], device=self.args.device)).sum().item()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy as a plain checkpoint, the value head beside it."""
        if self.args.should_save:  # every process comes here
            self.accelerator.unwrap_model(self.model).save(output_dir or self.args.output_dir, state_dict)

    def _save_run_state(self, folder: Path) -> None:
        self.ledger.sync()
        state = {"env_steps": self.env_steps, "ledger_bytes": self.ledger.position}
        state["curriculum"] = self.curriculum.state_dict()
        state |= {"skipped_updates": self._guard.skipped, "skipped_in_a_row": self._guard.in_a_row}
        (folder / ROLLOUT_STATE_FILE).write_text(json.dumps(state))

    def _load_run_state(self, folder: Path | None) -> None:
        state = {} if folder is None else json.loads((folder / ROLLOUT_STATE_FILE).read_text())
        self.env_steps = state.get("env_steps", 0)
        if "curriculum" in state:
            self.curriculum.load_state_dict(state["curriculum"])
        self._guard.skipped, self._guard.in_a_row = state.get("skipped_updates", 0), state.get("skipped_in_a_row", 0)
        if self.args.process_index == 0:
            self.ledger.rewind(state.get("ledger_bytes", 0))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore policy and critic, or raise."""
        if is_peft_model(self.policy.model):
            self.policy.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        else:
            restore_weights(self.policy.model, resume_from_checkpoint)
        self.model.load_value_head(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """`Trainer`'s own looks for the names of policy and critic in one file, finds none, and only warns."""
        if self.is_deepspeed_enabled:  # all in files of its own
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left to [`trl_stare.evaluation.write_model_card`]: TRL's template is about text generation."""
