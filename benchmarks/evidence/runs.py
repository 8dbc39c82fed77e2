"""The steps of a run: which command makes what, and running it so that it survives interruptions."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.evidence.queue import METHODS, Arm, Queue
from benchmarks.preference_learning import Arguments
from trl_stare import TokenPolicy, evaluate, get_plan, make_env
from trl_stare.data import TrajectoryFolder
from trl_stare.data.pairs import OBJECTIVES
from trl_stare.evaluation import write_episodes
from trl_stare.runs import claim_folder

logger = logging.getLogger("evidence")

ROOT = Path(__file__).parents[2]
COLLECTING = ("checkpoint", "task", "starts", "episodes_per_seed", "first_seed", "temperature", "num_envs")
"""Flags of `benchmarks/preference_learning.py` that its rollouts depend on, beside the seed."""


@dataclass(frozen=True)
class Step:
    """One command and what it leaves.

    Args:
        folder (`Path`): of the step alone: its settings, its log, and `training/` with all that the command writes.
        script (`str`): relative to the repository. flags (`Mapping`): its settings.
        policy (`Path`): the trained checkpoint. episodes (`Path`): its evaluation, an episode a line.
        done (`Path`): what is written last.
        ledger (`Path` or `None`): episodes it learned from in the simulator; only PPO has one.
    """

    folder: Path
    script: str
    flags: Mapping[str, Any]
    policy: Path
    episodes: Path
    done: Path
    ledger: Path | None = None

    @property
    def command(self) -> list[str]:
        """What is run, in the repository's root."""
        flags = [part for name, value in self.flags.items() for part in _flag(name, value)]
        return [sys.executable, self.script, *flags, f"--output_dir={self.folder / 'training'}"]

    @property
    def env_steps(self) -> int:
        """Environment steps that the step took to learn, its evaluation not counted."""
        if self.ledger is not None:
            return sum(json.loads(line)["length"] for line in self.ledger.read_text().splitlines())
        return steps_played(self.flags["rollouts"])


@cache
def steps_played(rollouts: Path) -> int:
    """Environment steps of a complete folder of rollouts. Read once: thousands of episodes take seconds, and every arm asks anew."""
    return sum(rollout.num_steps for rollout in TrajectoryFolder(rollouts, images=False))


def steps_of(queue: Queue, arm: Arm, seed: int, start: Path, out: Path) -> list[Step]:
    """What is done to the checkpoint `start` in one run, in order; nothing for `sft`.

    Arms share what they have in common: the rollouts of preference learning, and a preference step that is the same, which the
    second arm finds done; so does an arm of two rounds the first of them.
    """
    steps: list[Step] = []
    for name in METHODS[arm.method]:
        for turn in range(arm.rounds if name in OBJECTIVES else 1):
            model = steps[-1].policy if steps else start
            if name in OBJECTIVES:
                steps.append(_preference_step(queue, arm, seed, model, out, name, turn))
            else:
                steps.append(_ppo_step(queue, arm, seed, model, out, name))
    return steps


def _preference_step(queue: Queue, arm: Arm, seed: int, model: Path, out: Path, objective: str, turn: int) -> Step:
    flags = {"checkpoint": model, "seed": seed, **_common(queue), **arm.preference}
    if turn:  # rollouts from initial states that no earlier round has seen
        starts, first = (flags.get(name, getattr(Arguments, name)) for name in ("starts", "first_seed"))
        flags["first_seed"] = first + turn * starts
    played = _digest({name: flags.get(name) for name in COLLECTING})
    rollouts = out / "runs" / f"rollouts-{arm.start}-{played}" / f"seed-{seed}"
    folder = out / "runs" / f"{objective}-{arm.start}-{_digest(flags)}" / f"seed-{seed}"
    made = folder / "training"
    return Step(
        folder,
        "benchmarks/preference_learning.py",
        flags | {"arms": objective, "rollouts": rollouts},
        policy=made / objective / "policy",
        episodes=made / f"{objective}.jsonl",
        done=made / "results.json",
    )


def _flag(name: str, value: Any) -> list[str]:
    """Example: `("beta", 1.0)` is `["--beta=1.0"]`, `("stage_weights", [1, 2])` is `["--stage_weights", "1", "2"]`."""
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def _digest(flags: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(flags, default=str, sort_keys=True).encode()).hexdigest()[:8]


def _ppo_step(queue: Queue, arm: Arm, seed: int, model: Path, out: Path, name: str) -> Step:
    fixed = {"stage_aware": name == "sta-ppo", "save_strategy": "epoch", "save_total_limit": 1, "report_to": "none"}
    flags = {"model": model, "seed": seed, **_common(queue), **fixed, **arm.ppo}
    folder = out / "runs" / arm.name / f"seed-{seed}"
    made = folder / "training"
    episodes = made / "policy" / "evaluation.jsonl"
    ledger = made / "episodes.jsonl"
    return Step(
        folder, "recipes/ppo.py", flags, policy=made / "policy", episodes=episodes, done=episodes, ledger=ledger
    )


def _common(queue: Queue) -> dict[str, Any]:
    return {name: getattr(queue, name) for name in ("task", "eval_episodes", "temperature", "num_envs")}


def run_step(step: Step) -> bool:
    """Run or continue a step, unless it is done; whether it is done in the end. Its output goes to `log.txt` in its folder.

    Raises:
        ValueError: if the folder is of a step with other settings.
    """
    claim_folder(step.folder, {"script": step.script} | {name: _plain(value) for name, value in step.flags.items()})
    with _lock(step.folder) as held, (step.folder / "log.txt").open("a") as log:
        if step.done.exists():
            return True
        logger.info("running %s, see %s", step.folder, log.name)
        # as the Makefile does it: threads that wait sleep instead of taking the simulators' cores
        env = {"OMP_WAIT_POLICY": "passive"} | os.environ
        process = subprocess.Popen(step.command, cwd=ROOT, env=env, stdout=log, stderr=log, pass_fds=[held])
        try:
            process.wait()
        finally:
            if (
                process.poll() is None
            ):  # this process is asked to stop: the step saves what it has, and is continued later
                process.terminate()
                process.wait()
    if not step.done.exists():
        logger.error("%s ended with exit status %d and is not done, see %s", step.folder, process.returncode, log.name)
    return step.done.exists()


def evaluate_start(queue: Queue, checkpoint: Path, digests: Mapping[str, str], file: Path, seed: int) -> None:
    """Evaluate a start checkpoint as the steps evaluate what they trained; once, into `file`.

    Args:
        digests (`Mapping`): [`~trl_stare.evaluation.file_digests`] of `checkpoint`.

    Raises:
        ValueError: if the folder of `file` is of other weights, of a queue that evaluates them otherwise, or of other stages.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _lock(file.parent):
        # not stages that are cut otherwise: the table counts who passed them, and tests it
        stages = {"stage_events": get_plan(queue.task).event_names}
        claim_folder(file.parent, _common(queue) | stages | {"files": dict(digests)})
        if file.exists():
            return
        logger.info("evaluating %s with sampling seed %d", checkpoint, seed)
        policy = TokenPolicy.from_pretrained(checkpoint)
        with closing(
            make_env(queue.task, queue.num_envs, chunk_size=policy.chunk_size, image_size=policy.image_size)
        ) as env:
            _, episodes = evaluate(
                policy, env, get_plan(queue.task), range(queue.eval_episodes), temperature=queue.temperature, seed=seed
            )
        write_episodes(file, episodes)


@contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """Wait until no process has the folder. Children inherit it: what a killed queue left running is waited for."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
