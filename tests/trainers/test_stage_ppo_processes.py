"""Two processes: one update as of a single process, one ledger, uneven episodes, and a rank that dies or hangs."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from stage_ppo_toy import FaultyTrainer, make_run, run
from test_stage_ppo_resume import assert_same_run, weights_of

from trl_stare.data import play
from trl_stare.trainers.processes import (
    Rendezvous,
    gather_rows,
    global_moments,
    gradient_weights,
    meet_anew_after_restart,
)

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def child(rank: int, port: int, target, folder: Path, args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    for state in (AcceleratorState, PartialState, GradientState):  # the parent's, of one process
        state._shared_state.clear()
    try:
        target(rank, folder, *args)
    except Exception as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)  # not the parent's clean-up


def in_two_processes(target, folder: Path, *args, timeout: float = 120) -> list[int | None]:
    """Exit codes of `target(rank, folder, *args)`; those that do not end are killed and give `None`."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=child, args=(rank, port, target, folder, args)) for rank in (0, 1)]
    for process in processes:
        process.start()
    ends = time.monotonic() + timeout
    while time.monotonic() < ends and any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            ends = min(ends, time.monotonic() + 8)  # the other must have noticed by then
        time.sleep(0.05)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def errors_of(folder: Path) -> str:
    return " | ".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))


def agree(rank: int, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    values = torch.arange(40.0)[:, None] * torch.tensor([1.0, -2.0])
    mine = values[:30] if rank == 0 else values[30:]
    mean, std = global_moments(accelerator, mine)
    torch.testing.assert_close(mean, values.mean(dim=0))
    torch.testing.assert_close(std, values.std(dim=0))
    weights = gradient_weights(accelerator, torch.tensor([30, 2] if rank == 0 else [10, 2]))
    assert weights.tolist() == [[1.5, 1.0], [0.5, 1.0]][rank]
    rows = gather_rows(accelerator, [{"rank": rank, "row": row} for row in range(3 if rank == 0 else 0)])
    assert [(row["rank"], row["row"]) for row in rows] == [(0, 0), (0, 1), (0, 2)]
    rendezvous = Rendezvous(accelerator, timeout_s=3)
    rendezvous.wait()
    if rank == 1:
        time.sleep(8)
    rendezvous.wait()


def test_uneven_processes_agree_and_one_that_does_not_come_is_named(tmp_path):
    codes = in_two_processes(agree, tmp_path, timeout=60)
    assert codes[0] == 1 and "Ranks 1 failed" in errors_of(tmp_path), (codes, errors_of(tmp_path))


class SharedRollout(FaultyTrainer):
    """Every process plays all episodes and learns from its share: the same episodes whatever the number of processes."""

    def collect_rollout(self, iteration):
        self.model.eval()
        generator = torch.Generator().manual_seed(iteration)
        played = play(self.env, self.policy, range(9), temperature=1.0, generator=generator)
        self.model.train()
        return played[self.args.process_index :: self.args.world_size]


def update(rank: int, folder: Path, make=make_run) -> None:
    trainer = make(
        folder, episodes_per_iteration=9, num_train_epochs=2, num_minibatches=1, num_ppo_epochs=1, optim="sgd",
        learning_rate=0.1, value_learning_rate=0.1, value_warmup_iterations=0, max_grad_norm=1e9, logging_steps=1,
    )  # fmt: skip
    trainer.__class__ = SharedRollout
    trainer.train()
    trainer.save_model(str(folder / "policy"))
    if rank == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def test_an_update_of_two_processes_is_that_of_one(tmp_path):
    """Advantages, the critic's statistics, losses, gradients: 5 episodes here and 4 there, as 9 in one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    assert in_two_processes(update, two) == [0, 0], errors_of(two)
    update(0, one)
    start, first, second = (
        {**make_run(tmp_path / "new").policy.model.state_dict()},
        *map(weights_of, (one / "policy", two / "policy")),
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=name)
    moved = max((first[name] - value).abs().max() for name, value in start.items() if name in first)
    assert moved > 1e-3, moved
    losses = [
        [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
        for folder in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def train(rank: int, folder: Path, die=None, die_rank: int = 1, options=None) -> None:
    run(folder, die if rank == die_rank else None, **{"episodes_per_iteration": 5} | (options or {}))


def test_two_processes_killed_anywhere_continue_exactly(tmp_path):
    """Five episodes an iteration: three here and two there."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    assert in_two_processes(train, whole) == [0, 0], errors_of(whole)
    for die, rank in (("kill:rollout:1", 1), ("kill:update:6", 0), ("kill:saving:8", 1)):
        codes = in_two_processes(train, killed, die, rank)
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, (die, codes)
    assert in_two_processes(train, killed, "term:rollout:2", 1) == [0, 0], errors_of(killed)
    assert in_two_processes(train, killed) == [0, 0], errors_of(killed)
    assert_same_run(whole, killed)
    rows = [json.loads(line) for line in (whole / "episodes.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [0, 0, 0, 1, 1] * 4
    assert sorted(row["seed"] for row in rows) == [*range(20)]


def test_a_rank_that_hangs_in_its_rollout_ends_the_job_by_name(tmp_path):
    began = time.monotonic()
    codes = in_two_processes(train, tmp_path, "stop:rollout:1", 1, {"ddp_timeout": 5}, timeout=60)
    assert codes[0] == 1 and "Ranks 1 failed" in (tmp_path / "error-0.txt").read_text(), codes
    assert time.monotonic() - began > 5


def test_processes_started_again_meet_elsewhere_than_those_that_died(monkeypatch):
    launcher = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launcher.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    meet_anew_after_restart()
    assert os.environ["MASTER_PORT"] == str(launcher.port)  # none has died yet
    found = []
    for rank in (0, 1):
        for name, value in {
            "RANK": str(rank),
            "TORCHELASTIC_RESTART_COUNT": "1",
            "MASTER_PORT": str(launcher.port),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        meet_anew_after_restart()
        found.append((os.environ["MASTER_PORT"], os.environ["TORCHELASTIC_USE_AGENT_STORE"]))
    assert found[0] == found[1] and found[0][0] != str(launcher.port) and found[0][1] == "False"


LAUNCHER = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True).wait()"
)
RANK = """
import os, time
from trl_stare.trainers.processes import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not: when it is buried is up to the process that inherited it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_ends_with_its_launcher_and_any_other_process_outlives_its_parent(launched):
    env = os.environ | ({"TORCHELASTIC_RUN_ID": "none"} if launched else {})
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], env=env, stdout=subprocess.PIPE, text=True)
    with launcher.stdout as printed:
        rank = psutil.Process(int(printed.readline()))
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 2
    while is_alive(rank) and time.monotonic() < deadline:
        time.sleep(0.02)
    outlives = is_alive(rank)
    if outlives:
        rank.kill()
    assert outlives != launched


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_launcher_names_the_dead_rank_and_starts_both_again(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu2.yaml"]
    program = str(Path(__file__).with_name("stage_ppo_toy.py"))
    launch += ["--main_process_port", str(free_port())]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    kill = [program, str(tmp_path / "killed"), "--die", "kill:update:6", "--rank", "1"]
    done = subprocess.run([*launch, *kill], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode != 0 and "rank      : 1" in done.stderr and "SIGKILL" in done.stderr, done.stderr[-3000:]

    again = [program, str(tmp_path / "again"), "--die", "kill:update:6", "--rank", "1"]
    done = subprocess.run(
        [*launch, "--max_restarts", "1", *again], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([*launch, *kill], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "killed", tmp_path / "again")
    assert load_file(tmp_path / "again" / "policy" / "model.safetensors")
