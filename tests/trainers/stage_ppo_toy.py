"""A run of StagePPOTrainer on a trivial environment, as a program: what the tests kill, continue and start in two processes.

    python stage_ppo_toy.py FOLDER [--die kill:update:5] [--rank R]

`kill:rollout:1`, `kill:update:5` and `kill:saving:8` send SIGKILL to the process itself in that iteration, after that update, or
while that checkpoint is written; `stop:...` sends SIGSTOP and `term:...` SIGTERM. Only in process `--rank`, and once per folder.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from ppo_toy import PLAN, ToyEnv, make_policy
from transformers import TrainerCallback

from trl_stare.trainers import StagePPOConfig, StagePPOTrainer

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
OPTIONS = {
    "num_train_epochs": 4, "episodes_per_iteration": 10, "num_minibatches": 2, "num_ppo_epochs": 2, "use_cpu": True,
    "learning_rate": 3e-3, "save_strategy": "epoch", "save_total_limit": None, "report_to": "none",
    "disable_tqdm": True, "logging_steps": 3,
}  # fmt: skip


class Fault(TrainerCallback):
    """Sends a signal to its own process at one place of the run."""

    def __init__(self, number: int, place: str, when: int):
        self.number, self.place, self.when, self.trainer = number, place, when, None

    def at(self, place: str, when: int) -> None:
        if (place, when) == (self.place, self.when):
            self.place = None
            os.kill(os.getpid(), self.number)

    def on_step_end(self, args, state, control, **kwargs):
        self.at("update", state.global_step)


class FaultyEnv(ToyEnv):
    """Sends the signal at the third decision of a rollout."""

    fault: Fault | None = None

    def reset(self, starts, **options):
        self.decisions = 0
        return super().reset(starts, **options)

    def step(self, actions):
        self.decisions += 1
        if self.fault is not None and self.decisions == 3:
            self.fault.at("rollout", self.fault.trainer.iteration)
        return super().step(actions)


class FaultyTrainer(StagePPOTrainer):
    """Sends the signal when a checkpoint is half written."""

    fault: Fault | None = None

    def _save_rng_state(self, output_dir):
        if self.fault is not None:
            self.fault.at("saving", self.state.global_step)
        super()._save_rng_state(output_dir)


def make_run(folder: Path, fault: Fault | None = None, **options) -> FaultyTrainer:
    starts, held_out = (Dataset.from_dict({"seed": list(seeds)}) for seeds in (range(999), range(1000, 1010)))
    config = StagePPOConfig(str(folder), **OPTIONS | options)
    env = FaultyEnv(num_envs=4)
    trainer = FaultyTrainer(make_policy(), config, env, PLAN, starts, held_out)
    if fault is not None:
        trainer.fault = env.fault = fault
        fault.trainer = trainer
        trainer.add_callback(fault)
    return trainer


def run(folder: Path, die: str | None = None, **options) -> FaultyTrainer:
    """Begin or continue the run in `folder`; a finished one leaves its policy in `policy`."""
    fault = None
    if die is not None:
        kind, place, when = die.split(":")
        fault = Fault(SIGNALS[kind], place, int(when))
    trainer = make_run(folder, fault, **options)
    trainer.train(resume_from_checkpoint=True)
    if trainer.is_finished:
        trainer.save_model(str(folder / "policy"))
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--die")
    parser.add_argument("--rank", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    once = args.folder / "has-died"
    is_here = args.die is not None and int(os.environ.get("RANK", "0")) == args.rank and not once.exists()
    if is_here:
        args.folder.mkdir(parents=True, exist_ok=True)
        once.touch()
    run(args.folder, args.die if is_here else None)


if __name__ == "__main__":
    main()
