"""The episode ledger: one line for every episode a run has learned from, so that the run can be audited."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import EpisodeStart, VoidEpisode
from trl_stare.stages import StagePlan, segment
from trl_stare.trainers.ppo_batch import num_prefix_steps

logger = logging.getLogger(__name__)

LEDGER_FILE = "episodes.jsonl"

_TRANSITIONS = ("images", "state", "starts", "actions", "trace", "logps", "final_image", "final_state", "reward")


class EpisodeLedger:
    """Lines of JSON in a file that only grows, except that resuming cuts it back to where the checkpoint was.

    Args:
        path (`Path`): the file; one process writes.

    Example: `ledger.append(row)`, `position = ledger.position`, `ledger.append(lost)`, `ledger.rewind(position)` leaves one line.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def position(self) -> int:
        """Length in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write the rows at once."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def rewind(self, position: int) -> None:
        """Cut off what lies behind `position`.

        Raises:
            ValueError: if lines before it are missing.
        """
        if not self.path.exists():
            if position:
                logger.warning("%s is not there: the ledger begins with the episodes from here on.", self.path)
            return
        if self.position < position:
            raise ValueError(
                f"`{self.path}` must hold the {position} bytes it had at the checkpoint, got {self.position}. Restore it, "
                "or remove it to begin a new ledger."
            )
        os.truncate(self.path, position)

    def sync(self) -> None:
        """Force what is written to the disk."""
        if self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())


def episode_row(trajectory: Trajectory, plan: StagePlan) -> dict[str, Any]:
    """One line of the ledger.

    Returns:
        `env`, the row of the process's environments that played it, `seed`, `task`, `prefix_steps` executed before the policy
        first looked (a [`StageCurriculum`]), `length` in environment steps without these, `success` (at any step), `stages_passed`
        by name, `start_stage` in which the policy first looked, and the `digest` of its transitions. The trainer adds `iteration`
        and `rank`.
    """
    passed = [plan.names[part.stage] for part in segment(plan, trajectory.signals) if part.passed]
    first = int(plan.current_stage({name: value[:1] for name, value in trajectory.signals.items()})[0])
    return {
        "env": trajectory.env,
        "seed": trajectory.seed,
        "task": trajectory.task,
        "prefix_steps": num_prefix_steps(trajectory),
        "length": trajectory.num_steps,
        "success": trajectory.success_once,
        "stages_passed": passed,
        "start_stage": plan.names[min(first, len(plan) - 1)],
        "digest": transitions_digest(trajectory),
    }


def void_row(task: str, start: EpisodeStart, void: VoidEpisode) -> dict[str, Any]:
    """The line of an episode that the simulator spoiled, and that is not learned from: with what, and after how many steps."""
    prefix_steps = 0 if start.actions is None else len(start.actions)
    return {
        "env": void.env,
        "seed": start.seed,
        "task": task,
        "prefix_steps": prefix_steps,
        "length": max(void.step - prefix_steps, 0),
        "void": void.what,
    }


def transitions_digest(trajectory: Trajectory) -> str:
    """SHA-256 of all that was seen, done and measured in an episode: equal digests mean equal transitions, bit by bit."""
    digest = hashlib.sha256(f"{trajectory.terminated} {trajectory.truncated}".encode())
    tensors = {name: getattr(trajectory, name) for name in _TRANSITIONS} | dict(trajectory.signals)
    for name, value in sorted(tensors.items()):
        if value is not None:
            digest.update(f"{name} {value.dtype} {[*value.shape]}".encode())
            digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()
