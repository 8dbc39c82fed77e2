"""How fast the environment is here: frames/s of stock and light visuals in one process, steps/s of one and two workers.

    python benchmarks/env.py --json env.json

Goals on two idle cores: light visuals at least 4 times stock at 64 and 128 px; two workers at least 1.8 times one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm

from trl_stare.envs import get_simulated_task, make_env
from trl_stare.envs.maniskill import Simulator

TASK = "StackCube-v1"
SIZES = (64, 128)


def frame_time(visuals: str, size: int, frames: int) -> float:
    """Median seconds of one rendered frame, each after a control step that moved the arm."""
    simulator = Simulator(get_simulated_task(TASK), num_envs=1, image_size=size, visuals=visuals, device="cpu")
    simulator.reset([0], torch.tensor([0]))
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(frames + 5):
        simulator.step(torch.rand(1, 7, generator=generator) * 2 - 1)
        start = time.perf_counter()
        simulator.images()
        times.append(time.perf_counter() - start)
    simulator.close()
    return statistics.median(times[5:])  # the first frames compile shaders


def steps_per_second(num_workers: int, decisions: int, num_envs: int = 4, chunk_size: int = 4) -> float:
    """Environment steps per second of `num_envs` environments, images included, resets included."""
    env = make_env(TASK, num_envs, num_workers=num_workers, chunk_size=chunk_size, visuals="light", device="cpu")
    generator = torch.Generator().manual_seed(0)
    env.reset(range(100 * num_envs))
    steps = 0
    for decision in range(decisions + 5):
        if decision == 5:
            start = time.perf_counter()
        step = env.step(torch.rand(num_envs, chunk_size, 7, generator=generator) * 2 - 1)
        steps += int(step.num_steps.sum()) if decision >= 5 else 0
    seconds = time.perf_counter() - start
    env.close()
    return steps / seconds


def measure(frames: int, decisions: int, repeats: int) -> dict[str, Any]:
    """All figures; the best of `repeats`, so that another process disturbs as little as possible."""
    results: dict[str, Any] = {"task": TASK, "cores": len(os.sched_getaffinity(0)), "machine": platform.platform()}
    with tqdm(total=repeats * (2 * len(SIZES) + 2), desc="measuring") as progress:

        def best(pick: Any, function: Any, *args: Any) -> float:
            values = []
            for _ in range(repeats):
                values.append(function(*args))
                progress.update()
            return pick(values)

        for size in SIZES:
            rates = {name: 1 / best(min, frame_time, name, size, frames) for name in ("stock", "light")}
            results[f"frames_per_s_{size}px"] = {**rates, "light_over_stock": rates["light"] / rates["stock"]}
        one, two = (best(max, steps_per_second, workers, decisions) for workers in (1, 2))
        results["steps_per_s"] = {"1_worker": one, "2_workers": two, "two_over_one": two / one}
    results["load_average"] = os.getloadavg()[0]
    return results


def main() -> None:
    """Measure, show, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--frames", type=int, default=60, help="frames per measurement")
    parser.add_argument("--decisions", type=int, default=60, help="chunks of 4 steps per measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each figure, the best counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(args.frames, args.decisions, args.repeats)
    Console().print_json(data=results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
