"""Arms of a file, one after the other, unattended; a table and learning curves at the end.

    python -m benchmarks.evidence --config recipes/configs/evidence/ppo.yaml --task StackCube-v1 \
        --output_dir outputs/evidence/ppo_stackcube --checkpoint start=outputs/weak/imitation

From the repository's root. Killed at any moment, the same command continues: finished runs are skipped, an unfinished one goes on
from its checkpoint. `results.json`, `results.md` and `results.png` are written anew after every run, of what is there so far.
A run that fails is told and left out, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.evidence.curves import plot
from benchmarks.evidence.queue import Queue, read_queue
from benchmarks.evidence.results import build_results, markdown
from benchmarks.evidence.runs import evaluate_start, run_step, steps_of
from trl_stare import get_plan
from trl_stare.evaluation import file_digests, read_episodes

logger = logging.getLogger("evidence")


def main(queue: Queue, checkpoints: dict[str, Path], out: Path) -> bool:
    """Run what is not done, and tell what came out; whether everything is done."""
    plan, complete = get_plan(queue.task), True
    known = {name: {"path": str(path), "files": file_digests(path)} for name, path in checkpoints.items()}
    starts: dict[str, dict[int, Any]] = {}
    arms: dict[str, tuple[dict[int, Any], dict[int, Any]]] = {}
    for seed, arm in queue.runs:
        file = out / "starts" / arm.start / f"seed-{seed}.jsonl"
        evaluate_start(queue, checkpoints[arm.start], known[arm.start]["files"], file, seed)
        starts.setdefault(arm.start, {})[seed] = read_episodes(file)
        steps = steps_of(queue, arm, seed, checkpoints[arm.start], out)
        if not all(run_step(step) for step in steps):  # the first that is not done ends the run
            complete = False
            continue
        done, episodes = arms.setdefault(arm.name, ({}, {}))
        done[seed] = steps
        episodes[seed] = read_episodes(steps[-1].episodes if steps else file)
        results = build_results(queue, plan, starts, arms, known)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "results.md").write_text(markdown(results))
        plot(out / "results.png", results)
        logger.info(
            "%s, seed %d: success once %.3f", arm.name, seed, results["arms"][arm.name]["success_once_per_seed"][seed]
        )
    return complete


def parse() -> tuple[Queue, dict[str, Path], Path]:
    """The command line, refused before anything runs if a checkpoint is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="File of arms.")
    parser.add_argument("--task", help="Another registered task than the file's.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where everything goes.")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=PATH", help="A start of the file.")
    args = parser.parse_args()
    queue = read_queue(args.config, args.task)
    given = dict(text.split("=", 1) for text in args.checkpoint if "=" in text)
    checkpoints = {name: Path(path).resolve() for name, path in given.items()}
    for name in sorted({arm.start for arm in queue.arms}):
        if name not in checkpoints or not (checkpoints[name] / "config.json").exists():
            parser.error(f"`--checkpoint {name}=PATH` must name a checkpoint's folder, got {checkpoints.get(name)}.")
    return queue, checkpoints, args.output_dir.resolve()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(0 if main(*parse()) else 1)
