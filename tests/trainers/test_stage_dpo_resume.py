"""SIGKILL at any step, then the same run again: not one bit is different from a run that was never stopped."""

import json
import multiprocessing
import os
import signal

import torch
from safetensors.torch import load_file
from stage_dpo_toy import make_policy, make_trainer
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

STEPS = 6


class KillAt(TrainerCallback):
    """Die at the end of a step, before anything of it is saved; or of a step in the middle of its accumulation."""

    def __init__(self, step: int, event: str):
        self.step, self.event = step, event

    def on_substep_end(self, args, state, control, **kwargs):
        self._die("on_substep_end", state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        self._die("on_step_end", state.global_step)

    def _die(self, event, step):
        if (event, step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, kill_at=None):
    trainer = make_trainer(
        make_policy(), folder, max_steps=STEPS, save_strategy="steps", save_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, disable_dropout=False, step_micro_batch_size=2, lr_scheduler_type="cosine",
    )  # fmt: skip
    if kill_at is not None:
        trainer.add_callback(KillAt(*kill_at))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)


def run(folder, kill_at=None) -> int:
    """`train` in a process of its own; its exit code. Forked: everything is imported already."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, kill_at))
    process.start()
    process.join(120)
    return process.exitcode


def state_of(checkpoint):
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    scheduler = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    return load_file(checkpoint / "model.safetensors"), optimizer["state"], scheduler


def history_of(checkpoint):
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm")} for entry in log]


def test_killed_at_any_step_nothing_is_lost(tmp_path):
    assert run(tmp_path / "whole") == 0
    for kill_at in [(1, "on_step_end"), (2, "on_step_end"), (4, "on_substep_end"), (5, "on_step_end")]:
        assert run(tmp_path / "killed", kill_at) == -signal.SIGKILL
    assert run(tmp_path / "killed") == 0

    whole, killed = (tmp_path / name / f"checkpoint-{STEPS}" for name in ("whole", "killed"))
    assert [entry["step"] for entry in history_of(whole)] == [*range(1, STEPS + 1)]
    assert history_of(killed) == history_of(whole)
    (weights, moments, schedule), (other_weights, other_moments, other_schedule) = state_of(whole), state_of(killed)
    assert schedule == other_schedule
    assert weights.keys() == other_weights.keys() and moments.keys() == other_moments.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    for index, values in moments.items():
        assert all(torch.equal(values[name], other_moments[index][name]) for name in values)
    initial = make_policy().model.state_dict()
    assert any(not torch.equal(weights[name], initial[name]) for name in weights), "nothing was trained"
