"""Checkpoints are whole or not there; the newest that verifies is taken; one run per folder."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from stage_ppo_toy import make_run

from trl_stare.interfaces import EpisodeStart, VoidEpisode
from trl_stare.trainers.checkpointing import (
    checkpoint_problems,
    latest_valid_checkpoint,
    sole_run,
    write_manifest,
)
from trl_stare.trainers.ledger import EpisodeLedger, transitions_digest, void_row


def make_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / f"checkpoint-{step}"
        (path / "part").mkdir(parents=True)
        (path / "weights").write_bytes(bytes(range(256)))
        (path / "part" / "state").write_text("state")
        write_manifest(path, step=step)


def flip_byte(path: Path, index: int) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [
    (lambda c: (c / "weights").unlink(), "weights is missing"),
    (lambda c: (c / "weights").write_bytes(b"x" * 100), "weights has 100 bytes instead of 256"),
    (lambda c: flip_byte(c / "weights", 200), "weights differs from its SHA-256"),
    (lambda c: flip_byte(c / "part" / "state", 0), "part/state differs from its SHA-256"),
    (lambda c: (c / "manifest.json").unlink(), "it has no manifest.json"),
    (lambda c: (c / "manifest.json").write_text('{"step": 1'), "manifest.json is damaged"),
    (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES, ids=[problem for _, problem in DAMAGES])
def test_a_damaged_checkpoint_is_passed_over_and_the_damage_is_named(tmp_path, caplog, damage, problem):
    make_checkpoints(tmp_path, 8, 16, 100)
    assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    damage(tmp_path / "checkpoint-100")
    assert checkpoint_problems(tmp_path / "checkpoint-100") == [problem]
    assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")
    assert problem in caplog.text and "checkpoint-100" in caplog.text


def test_the_newest_is_that_of_the_highest_step_not_of_the_clock(tmp_path):
    make_checkpoints(tmp_path, 9, 10)
    os.utime(tmp_path / "checkpoint-9", (2e9, 2e9))
    assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_none_where_there_is_none_and_an_error_where_none_is_whole(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_valid_checkpoint(tmp_path) is None
    make_checkpoints(tmp_path, 4)
    flip_byte(tmp_path / "checkpoint-4" / "weights", 0)
    with pytest.raises(ValueError, match="checkpoint-4: weights differs from its SHA-256"):
        latest_valid_checkpoint(tmp_path)


def hold(folder, is_held, may_end):
    with sole_run(folder):
        is_held.set()
        may_end.wait(60)


def test_a_second_run_in_the_folder_is_refused_by_name_and_a_later_one_is_not(tmp_path):
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, is_held, may_end))
    process.start()
    assert is_held.wait(60)
    with pytest.raises(RuntimeError, match=rf"process {process.pid} is training"), sole_run(tmp_path):
        pass
    with pytest.raises(RuntimeError, match="`output_dir` must belong to one run"):
        make_run(tmp_path).train()
    process.kill()
    process.join()
    with sole_run(tmp_path):
        assert (tmp_path / "_lock").read_text() == str(os.getpid())


def test_the_line_of_a_spoiled_episode_counts_the_steps_of_the_policy_only():
    """Seed 7 began after 20 replayed actions, in environment 3, and was spoiled with step 26."""
    row = void_row("toy", EpisodeStart(7, torch.zeros(20, 1)), VoidEpisode(0, 26, "state", env=3))
    assert row == {"env": 3, "seed": 7, "task": "toy", "prefix_steps": 20, "length": 6, "void": "state"}


def test_a_ledger_is_cut_back_and_its_losses_are_noticed(tmp_path):
    ledger = EpisodeLedger(tmp_path / "episodes.jsonl")
    ledger.append({"seed": 1}, {"seed": 2})
    position = ledger.position
    ledger.append({"seed": 3})
    ledger.rewind(position)
    assert [json.loads(line)["seed"] for line in ledger.path.read_text().splitlines()] == [1, 2]
    with pytest.raises(
        ValueError, match=f"must hold the {position + 1} bytes it had at the checkpoint, got {position}"
    ):
        ledger.rewind(position + 1)


def test_the_digest_sees_every_transition(tmp_path):
    trajectory = make_run(tmp_path).collect_rollout(0)[0]
    again = make_run(tmp_path / "again").collect_rollout(0)[0]
    assert transitions_digest(trajectory) == transitions_digest(again)
    for name in ("images", "actions", "reward", "logps"):
        getattr(again, name).view(-1)[-1] += 1
        assert transitions_digest(trajectory) != transitions_digest(again), name
        getattr(again, name).view(-1)[-1] -= 1
    assert transitions_digest(trajectory) == transitions_digest(again)


def test_saving_is_put_off_to_the_boundary_limited_and_resumed_past_a_damage(tmp_path, caplog):
    """`save_steps` 3 falls into iterations of 4 updates; of the checkpoints two are kept."""
    trainer = make_run(tmp_path, num_train_epochs=3, save_strategy="steps", save_steps=3, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    assert not (tmp_path / "_saving").exists()
    assert checkpoint_problems(tmp_path / "checkpoint-12") == []
    listed = json.loads((tmp_path / "checkpoint-12" / "manifest.json").read_text())["files"]
    for name in ("model.safetensors", "value_head.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                 "trainer_state.json", "rollout_state.json", "config.json"):  # fmt: skip
        assert name in listed, name

    flip_byte(tmp_path / "checkpoint-12" / "optimizer.pt", 1000)
    with pytest.raises(ValueError, match=r"must be a whole checkpoint.*optimizer.pt differs"):
        make_run(tmp_path, num_train_epochs=3).train(str(tmp_path / "checkpoint-12"))
    resumed = make_run(tmp_path, num_train_epochs=3)
    resumed.train(resume_from_checkpoint=True)
    assert "optimizer.pt differs from its SHA-256" in caplog.text
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert checkpoint_problems(tmp_path / "checkpoint-12") == []


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    """Evaluations say 0.1, 0.3, 0.2: the second is the best."""
    trainer = make_run(
        tmp_path, num_train_epochs=3, eval_strategy="epoch", save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="success_once", greater_is_better=True, value_warmup_iterations=0,
    )  # fmt: skip
    scores = iter((0.1, 0.3, 0.2))
    trainer.evaluate = lambda *args, **kwargs: {"eval_success_once": next(scores)}
    trainer.train()
    best = tmp_path / "checkpoint-8"
    assert trainer.state.best_model_checkpoint == str(best) and checkpoint_problems(best) == []
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]
    loaded = make_run(tmp_path / "other")
    loaded._load_from_checkpoint(str(best))
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(tmp_path, caplog):
    trainer = make_run(tmp_path, num_train_epochs=2, max_skipped_updates=3, save_strategy="no")
    original, calls = trainer.compute_loss, []

    def poisoned(*args, **kwargs):
        calls.append(trainer.state.global_step)
        loss = original(*args, **kwargs)
        return loss * float("nan") if calls[-1] in bad else loss

    trainer.compute_loss = poisoned
    bad = {1, 2, 6}
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert trainer._guard.skipped == 3 and "Update 2 was skipped" in caplog.text

    bad = {4, 5, 6}
    with pytest.raises(FloatingPointError, match=r"got 3 updates in a row .*the last is update 7"):
        trainer.train()


def test_a_skipped_update_changes_nothing(tmp_path):
    trainer = make_run(tmp_path, num_train_epochs=1, value_warmup_iterations=0, learning_rate=1e-2)
    seen = []

    def poisoned(*args, original=trainer.compute_loss, **kwargs):
        seen.append([value.clone() for value in trainer.model.parameters()])
        loss = original(*args, **kwargs)
        return loss * float("inf") if len(seen) == 3 else loss

    trainer.compute_loss = poisoned
    trainer.train()
    one, two, three, four = seen
    assert any(not torch.equal(a, b) for a, b in zip(two, three, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(three, four, strict=True))
