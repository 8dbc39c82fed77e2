"""Rollouts of the small VLA on StackCube-v1: this package's engine against a plain loop over Gymnasium's AsyncVectorEnv.

    python benchmarks/rollout.py --json rollout.json

Goals on two idle cores: at least 1.5 times the steps/s of the better plain loop, and seconds and memory that grow linearly with envs x
steps (R^2 >= 0.99 over a 16-fold range). Engine and loops are measured in turns, and the best of each counts, so that
another process disturbs as little as possible; `--only linearity` leaves the plain loops out. Memory is that of all processes: the
peak of the one that acts and keeps the episodes, and what its workers hold afterwards.

The plain loop is what one writes without this package: a process per environment, ManiSkill's own environment with
`obs_mode="rgb"` in its `CPUGymWrapper`, sparse reward, the same light visuals, image size, proprioception, policy and chunks. All
environments are one batch of the policy; the chunk is executed step by step, a picture each, and finished episodes begin
again by themselves (`AutoresetMode.SAME_STEP`), without the scene being built anew. It is measured with as many processes as the
engine has workers, and with as many as it has environments.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import load_env_creator
from rich.console import Console
from tqdm.auto import tqdm

from trl_stare.data import play
from trl_stare.data.rollout import Timing
from trl_stare.envs import get_simulated_task, make_env
from trl_stare.interfaces import Observation
from trl_stare.policies import TokenPolicy

TASK = "StackCube-v1"
IMAGE_SIZE, CHUNK_SIZE, STATE_SIZE = 64, 4, 8
SIZES = ((4, 4), (4, 8), (4, 16), (8, 16), (8, 32), (16, 32), (16, 64))
"""Environments and episodes of the rollouts whose seconds and memory are compared with their steps."""


class PlainEnv(gym.ObservationWrapper):
    """ManiSkill's environment with what the policy wants to see: a picture and 8 numbers."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        image = gym.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        state = gym.spaces.Box(-np.inf, np.inf, (STATE_SIZE,), np.float32)
        self.observation_space = gym.spaces.Dict({"image": image, "state": state})

    def observation(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        opening = observation["agent"]["qpos"][-2:].sum(keepdims=True)
        state = np.concatenate([observation["extra"]["tcp_pose"], opening]).astype(np.float32)
        return {"image": observation["sensor_data"]["base_camera"]["rgb"], "state": state}


def make_plain_env() -> gym.Env:
    """One environment, in its own process."""
    torch.set_num_threads(1)
    from trl_stare.envs.visuals import use_visuals

    with use_visuals("light"):
        env = gym.make(
            f"mani_skill.envs:{TASK}",
            robot_uids=get_simulated_task(TASK).robot,  # the environment's own has a second camera, on its wrist
            obs_mode="rgb",
            reward_mode="sparse",
            control_mode=get_simulated_task(TASK).control_mode,
            sim_backend="physx_cpu",
            render_backend="sapien_cpu",
            sensor_configs={"width": IMAGE_SIZE, "height": IMAGE_SIZE},
        )
    return PlainEnv(load_env_creator("mani_skill.utils.wrappers:CPUGymWrapper")(env))


def plain_rollout(env: gym.vector.AsyncVectorEnv, policy: TokenPolicy, num_steps: int, seed: int) -> int:
    """Steps of the plain loop, at least `num_steps` over all environments."""
    generator, instruction = torch.Generator().manual_seed(seed), get_simulated_task(TASK).instruction
    seen, _ = env.reset(seed=seed)
    decisions = -(-num_steps // (env.num_envs * CHUNK_SIZE))
    for _ in range(decisions):
        obs = Observation(
            torch.from_numpy(seen["image"]), (instruction,) * env.num_envs, torch.from_numpy(seen["state"])
        )
        actions = policy.act(policy.prepare(obs), temperature=1.0, generator=generator).actions.numpy()
        for c in range(CHUNK_SIZE):
            seen, *_ = env.step(actions[:, c])
    return decisions * env.num_envs * CHUNK_SIZE


def make_engine(num_envs: int, num_workers: int) -> Any:
    """This package's environments."""
    sizes = {"chunk_size": CHUNK_SIZE, "image_size": IMAGE_SIZE}
    return make_env(TASK, num_envs, num_workers=num_workers, visuals="light", device="cpu", **sizes)


def engine_rollout(env: Any, policy: TokenPolicy, num_episodes: int, seed: int, timing: Timing | None = None) -> int:
    """Steps of `num_episodes` episodes of the engine."""
    generator, first = torch.Generator().manual_seed(seed), 1000 * seed
    shown = play(
        env,
        policy,
        range(first, first + num_episodes),
        temperature=1.0,
        generator=generator,
        ignore_terminations=True,
        timing=timing,
    )
    return sum(trajectory.num_steps for trajectory in shown)


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of this process and of `pids` so far (`man 5 proc_pid_stat`: user and system time in clock ticks)."""
    ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
    return time.process_time() + sum(int(tick) for pair in ticks for tick in pair) / os.sysconf("SC_CLK_TCK")


class Cost(NamedTuple):
    """What a step of a rollout takes, in seconds: of the clock, and of all processors (which depends less on the load)."""

    wall: float
    cpu: float


def cost_per_step(rollout: Callable[..., int], pids: Sequence[int] = (), **kwargs: Any) -> Cost:
    """Play a rollout, and divide what it took by its steps."""
    wall, cpu = time.perf_counter(), cpu_seconds(pids)
    steps = rollout(**kwargs)
    return Cost((time.perf_counter() - wall) / steps, (cpu_seconds(pids) - cpu) / steps)


def compare(policy: TokenPolicy, num_envs: int, num_workers: int, episodes: int, repeats: int) -> dict[str, Any]:
    """Steps/s of the engine and of the plain loops, and where the engine's seconds went."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    timings: list[Timing] = []
    with closing(make_engine(num_envs, num_workers)) as engine:
        plain = {
            count: gym.vector.AsyncVectorEnv(
                [make_plain_env] * count, context="forkserver", autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
            )
            for count in sorted({num_workers, num_envs})
        }
        steps = episodes * engine.max_episode_steps
        for repeat in tqdm(range(repeats + 1), desc="engine against plain loops"):
            timings.append(Timing())
            measured = {"engine": (engine_rollout, engine, [worker.pid for worker in engine.workers])}
            for count, env in plain.items():
                measured[f"plain_{count}_processes"] = (plain_rollout, env, [process.pid for process in env.processes])
            for name, (rollout, env, pids) in measured.items():
                size = {"num_episodes": episodes, "timing": timings[-1]} if name == "engine" else {"num_steps": steps}
                costs[name].append(cost_per_step(rollout, pids, env=env, policy=policy, seed=repeat, **size))
        for env in plain.values():
            env.close()
    # the first one warms up
    rates = {name: 1 / min(cost.wall for cost in found[1:]) for name, found in costs.items()}
    quickest = min(timings[1:], key=lambda timing: timing.total_s)
    return {
        "steps_per_s": rates,
        "cpu_ms_per_step": {name: 1e3 * min(cost.cpu for cost in found[1:]) for name, found in costs.items()},
        "engine_over_better_plain": rates["engine"] / max(rate for name, rate in rates.items() if name != "engine"),
        "engine_shares": {
            name.removesuffix("_s"): value / quickest.total_s for name, value in asdict(quickest).items()
        },
    }


def linearity(policy: TokenPolicy, num_workers: int, repeats: int) -> dict[str, Any]:
    """Seconds and memory of rollouts of 4 to 64 episodes of 50 steps by 4 to 16 environments, and how straight a line they make."""
    envs, steps, wall, cpu, memory = [], [], [], [], []
    for num_envs in sorted({size for size, _ in SIZES}):
        with closing(make_engine(num_envs, num_workers)) as env:
            engine_rollout(env, policy, num_envs, seed=0)
            pids = [worker.pid for worker in env.workers]
            for episodes in (count for size, count in SIZES if size == num_envs):
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (`man 5 proc_pid_clear_refs`)
                costs = [
                    cost_per_step(engine_rollout, pids, env=env, policy=policy, num_episodes=episodes, seed=seed)
                    for seed in range(1, repeats + 1)
                ]
                envs.append(num_envs)
                steps.append(episodes * env.max_episode_steps)
                wall.append(min(cost.wall for cost in costs) * steps[-1])
                cpu.append(min(cost.cpu for cost in costs) * steps[-1])
                memory.append(memory_mb("self", "VmHWM") + sum(memory_mb(pid, "VmRSS") for pid in pids))
    of_wall, of_cpu, of_memory = fit(wall, steps), fit(cpu, steps), fit(memory, envs, steps)
    return {
        "envs_and_episodes": SIZES,
        "steps": steps,
        "seconds": wall,
        "ms_per_step": 1e3 * of_wall.slopes[0],
        "r_squared": of_wall.r_squared,
        "cpu_seconds": cpu,
        "cpu_ms_per_step": 1e3 * of_cpu.slopes[0],
        "cpu_r_squared": of_cpu.r_squared,
        "memory_mb": memory,
        "memory_mb_per_env": of_memory.slopes[0],
        "memory_mb_per_1000_steps": 1e3 * of_memory.slopes[1],
        "memory_r_squared": of_memory.r_squared,
    }


def memory_mb(pid: int | str, name: str) -> float:
    """A line of `/proc/{pid}/status` in MB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024 / 1e6


class Fit(NamedTuple):
    """A linear fit: its slopes, and the share of the variance it explains."""

    slopes: list[float]
    r_squared: float


def fit(measured: Sequence[float], *causes: Sequence[float]) -> Fit:
    """`measured` as a constant and a slope for each of `causes`, by least squares."""
    columns = np.array([[1.0] * len(measured), *causes]).T
    found = np.linalg.lstsq(columns, np.array(measured), rcond=None)[0]
    return Fit(found[1:].tolist(), 1 - float(np.var(measured - columns @ found) / np.var(measured)))


def main() -> None:
    """Measure, show, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--num_envs", type=int, default=8, help="environments of the engine")
    parser.add_argument("--num_workers", type=int, default=2, help="worker processes of the engine")
    parser.add_argument("--episodes", type=int, default=32, help="episodes of 50 steps per measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each figure, the best counts")
    parser.add_argument("--only", choices=("speed", "linearity"), help="measure this alone")
    args = parser.parse_args()
    stats = {TASK: {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * STATE_SIZE, "std": [1.0] * STATE_SIZE}}}
    policy = TokenPolicy.create_tiny(stats, image_size=IMAGE_SIZE, chunk_size=CHUNK_SIZE)
    policy.model.eval()
    results: dict[str, Any] = {
        "task": TASK,
        "what": __doc__.split("\n\n")[-1],
        "num_envs": args.num_envs,
        "num_workers": args.num_workers,
        "image_size": IMAGE_SIZE,
        "chunk_size": CHUNK_SIZE,
        "policy_threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.platform(),
        "load_average_before": os.getloadavg()[0],
    }
    if args.only != "linearity":
        results |= compare(policy, args.num_envs, args.num_workers, args.episodes, args.repeats)
    if args.only != "speed":
        results["linearity"] = linearity(policy, args.num_workers, args.repeats)
    results["load_average_after"] = os.getloadavg()[0]
    Console().print_json(data=results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
