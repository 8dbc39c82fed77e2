"""SIGKILL and SIGTERM at any moment, then the same run again: not one bit differs from a run that was never stopped."""

import json
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_ppo_toy import run

LAST = 16  # updates: 4 iterations of 4


def run_apart(folder: Path, die: str | None = None, **options) -> int:
    """`run` in a process of its own; its exit code. Forked: everything is imported already."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(folder, die), kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "value_head.safetensors")


def history_of(checkpoint: Path) -> list[dict[str, float]]:
    """The log without what the clock says."""
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if not name.startswith("time/")} for entry in entries]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, optimizer, scheduler, RNG, log and ledger."""
    one, two = weights_of(first / "policy"), weights_of(second / "policy")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    one, two = (folder / f"checkpoint-{LAST}" for folder in (first, second))
    assert history_of(one) == history_of(two)
    # not by its bytes: Python's pickle tells the names that came from a checkpoint from equal ones that did not
    torch.testing.assert_close(*(torch.load(folder / "optimizer.pt") for folder in (one, two)), rtol=0, atol=0)
    for name in ("scheduler.pt", *(path.name for path in one.glob("rng_state*.pth"))):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (first / "episodes.jsonl").read_text() == (second / "episodes.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run_apart(folder) == 0
    return folder


def test_the_run_learns_and_its_ledger_lists_every_episode(whole):
    rows = [json.loads(line) for line in (whole / "episodes.jsonl").read_text().splitlines()]
    assert sorted(row["seed"] for row in rows) == [*range(40)]
    assert [row["iteration"] for row in rows] == [i for i in range(4) for _ in range(10)]
    assert len({row["digest"] for row in rows}) > 1 and {row["start_stage"] for row in rows} == {"Near"}
    assert {row["env"] for row in rows} == {0, 1, 2, 3} and {row["prefix_steps"] for row in rows} == {0}
    logged = [entry for entry in history_of(whole / f"checkpoint-{LAST}") if "rollout/success_once" in entry]
    for iteration, entry in enumerate(logged):
        mine = [row for row in rows if row["iteration"] == iteration]
        assert entry["rollout/success_once"] == sum(row["success"] for row in mine) / 10
        assert entry["rollout/episode_steps"] == sum(row["length"] for row in mine) / 10
    first, last = weights_of(whole / "checkpoint-4"), weights_of(whole / "policy")
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_killed_anywhere_nothing_is_lost(whole, tmp_path):
    for die in (
        "kill:rollout:0",
        "kill:rollout:1",
        "kill:update:6",
        "kill:saving:8",
        "kill:update:12",
        "kill:saving:16",
    ):
        assert run_apart(tmp_path, die) == -signal.SIGKILL
    assert run_apart(tmp_path) == 0
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize(
    ("die", "saved"),
    [
        ("term:rollout:2", 8),
        pytest.param("term:update:6", 8, marks=pytest.mark.slow),
        pytest.param("term:rollout:0", None, marks=pytest.mark.slow),
    ],
)
def test_sigterm_saves_at_the_boundary_and_leaves(whole, tmp_path, die, saved):
    """Nothing is saved by schedule: the checkpoint is there because of the signal."""
    assert run_apart(tmp_path, die, save_strategy="no") == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ([f"checkpoint-{saved}"] if saved else [])
    assert not (tmp_path / "policy").exists()
    assert run_apart(tmp_path) == 0
    assert_same_run(whole, tmp_path)


def test_without_time_of_grace_the_last_checkpoint_stays_the_newest(whole, tmp_path):
    assert run_apart(tmp_path, "term:update:6", stop_grace_s=0.0) == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert run_apart(tmp_path) == 0
    assert_same_run(whole, tmp_path)


def test_a_finished_run_does_nothing_again(whole):
    before = {path: path.read_bytes() for path in (whole / f"checkpoint-{LAST}").iterdir()}
    ledger = (whole / "episodes.jsonl").read_text()
    assert run_apart(whole) == 0
    assert {path: path.read_bytes() for path in (whole / f"checkpoint-{LAST}").iterdir()} == before
    assert (whole / "episodes.jsonl").read_text() == ledger
