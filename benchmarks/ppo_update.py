"""What StagePPOTrainer costs besides simulator and policy: its updates beside a bare PyTorch loop, and its share of an iteration.

    python benchmarks/ppo_update.py --json ppo_update.json

Goals: at least 0.95 of the samples per second of the bare loop, which does the same forward, loss, backward, clipping and AdamW on the
same minibatches; and at most 5 % of an iteration for all that is neither simulator, rendering, policy forward nor backward. The
iteration is one of the small VLA with a simulator that costs nothing, whose share is then that of an iteration with the step
time of StackCube-v1 (`--env_ms` a decision of 16 environments; 160 at the 398 steps/s of docs/performance.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from tqdm.auto import tqdm
from transformers import TrainerCallback

from trl_stare import Stage, StagePlan, StagePPOConfig, StagePPOTrainer, TokenPolicy
from trl_stare.interfaces import Observation, Start, Step
from trl_stare.losses import ppo_policy_loss, ppo_value_loss
from trl_stare.stages import succeeded

CHUNK, ACTION_DIM, STATE_SIZE, IMAGE_SIZE, LIMIT = 4, 7, 8, 64, 48
PLAN = StagePlan(
    "Toy-v1",
    tuple(
        Stage(name=name, done=done, distance=lambda s: s["distance"][..., 0], scale=0.3, reads=("distance", "success"))
        for name, done in (
            ("Reach", lambda s: s["distance"][..., 0] < 0.2),
            ("Grasp", lambda s: s["distance"][..., 0] < 0.1),
            ("Stack", succeeded),
        )
    ),
)


class FreeEnv:
    """`N` episodes of `LIMIT` steps on pictures of colour gradients, at no cost."""

    task, instruction, max_episode_steps = "Toy-v1", "stack the red cube on the green cube", LIMIT
    signal_names: tuple[str, ...] = ("distance", "success")
    metadata: dict[str, Any] = {}

    def __init__(self, num_envs: int):
        self.num_envs, self.chunk_size = num_envs, CHUNK
        corners = torch.rand(num_envs, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 255
        images = torch.nn.functional.interpolate(corners, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
        images = images.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
        self.obs = Observation(images, (self.instruction,) * num_envs, torch.zeros(num_envs, STATE_SIZE))
        self.signals = {"distance": torch.ones(num_envs, 1), "success": torch.zeros(num_envs, dtype=torch.bool)}
        self.chunk = {name: torch.stack([value] * CHUNK, dim=1) for name, value in self.signals.items()}

    def reset(self, starts: Any, *, ignore_terminations: bool = False) -> Start:
        """All begin at once, in rounds."""
        self.left, self.time = list(range(len(starts))), 0
        return Start(self.obs, self.signals, self._next())

    def _next(self) -> torch.Tensor:
        now, self.left = self.left[: self.num_envs], self.left[self.num_envs :]
        self.episode = torch.tensor(now + [-1] * (self.num_envs - len(now)))
        return self.episode.clone()

    def step(self, actions: torch.Tensor) -> Step:
        """Nothing moves."""
        alive, self.time = self.episode >= 0, self.time + CHUNK
        ended = alive & (self.time >= LIMIT)
        if ended.any():
            self.time = 0
            self._next()
        reward = torch.zeros(self.num_envs, CHUNK)
        never = torch.zeros_like(ended)
        return Step(self.obs, self.signals, self.episode.clone(), self.chunk, reward, alive.long() * CHUNK, never, ended,
                    self.obs, self.signals)  # fmt: skip

    def close(self) -> None:
        """Nothing to end."""


class UpdateTimes(TrainerCallback):
    """Seconds of all updates of an iteration but the first, which waits for the rollout; and of the whole training."""

    def __init__(self):
        self.iterations: list[list[float]] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.iterations.append([now()])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.iterations[-1].append(now())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.iterations[-1].append(now())

    def updates(self) -> list[float]:
        """Seconds of each."""
        return [b - a for ends in self.iterations for a, b in zip(ends[1:-2], ends[2:-1], strict=True)]


class Spent:
    """Adds up the seconds that calls of a function take."""

    def __init__(self):
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count `seconds`."""
        self.seconds += seconds

    def within(self, function: Any) -> Any:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(now() - began)

        return timed


def now() -> float:
    """CPU time, which other jobs on the machine do not stretch; with a GPU the clock, after all kernels."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def make_trainer(folder: str, episodes: int, iterations: int) -> StagePPOTrainer:
    """Plain settings; nothing is saved, and logged once an iteration."""
    torch.manual_seed(0)
    stats = {"action": {"scale": [1.0] * ACTION_DIM}, "state": {"mean": [0.0] * STATE_SIZE, "std": [1.0] * STATE_SIZE}}
    policy = TokenPolicy.create_tiny({"toy": stats}, image_size=IMAGE_SIZE, chunk_size=CHUNK, action_dim=ACTION_DIM)
    config = StagePPOConfig(
        folder, num_train_epochs=iterations, episodes_per_iteration=episodes, num_minibatches=4, num_ppo_epochs=2,
        save_strategy="no", logging_steps=8, report_to="none", disable_tqdm=True, value_warmup_iterations=0,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return StagePPOTrainer(policy, config, FreeEnv(16), PLAN, Dataset.from_dict({"seed": list(range(1000))}))


def bare_times(trainer: StagePPOTrainer, batches: list[dict[str, Any]]) -> list[float]:
    """The same updates without a trainer."""
    args, model = trainer.args, trainer.model.train()
    groups = [{"params": list(model.model.parameters())}, {"params": list(model.value_head.parameters()), "lr": 1e-3}]
    optimizer, ends = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True, weight_decay=0.0), [now()]
    for batch in batches:
        batch = {name: to_device(value, args.device) for name, value in batch.items()}
        evaluation, values = model(batch["inputs"], batch["trace"], batch["features"], args.temperature)
        policy = ppo_policy_loss(
            evaluation.logps, batch["logps"], batch["advantages"], batch["mask"], clip_range=args.clip_range,
            level=args.ratio_level, action_dim=ACTION_DIM,
        )  # fmt: skip
        value = ppo_value_loss(values, batch["values"], batch["returns"], clip_range=None, huber_delta=None)
        (policy.loss + args.value_coef * value).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(now())
    return [b - a for a, b in zip(ends[1:], ends[2:], strict=False)]


def to_device(value: Any, device: torch.device) -> Any:
    return {name: part.to(device) for name, part in value.items()} if isinstance(value, dict) else value.to(device)


def measure_updates(episodes: int, repeats: int) -> dict[str, float]:
    """Median seconds of an update, trainer and bare loop in turns on minibatches of the same sizes."""
    times: dict[str, list[float]] = {"trainer": [], "bare": []}
    with TemporaryDirectory() as folder:
        for _ in tqdm(range(repeats), desc="updates"):
            trainer, clock, seen = make_trainer(folder, episodes, 1), UpdateTimes(), []
            trainer.add_callback(clock)
            compute_loss = trainer.compute_loss
            trainer.compute_loss = lambda model, inputs, *a, f=compute_loss, s=seen, **k: (
                s.append(inputs) or f(model, inputs, *a, **k)
            )
            trainer.train()
            times["trainer"] += clock.updates()
            times["bare"] += bare_times(trainer, seen)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = episodes * LIMIT // CHUNK // 4
    speeds = {f"{name}_samples_per_s": rows / seconds for name, seconds in medians.items()}
    return medians | speeds | {"trainer_over_bare": medians["bare"] / medians["trainer"]}


def measure_overhead(episodes: int, repeats: int, env_ms: float) -> dict[str, float]:
    """Seconds of an iteration by what they go into; the overhead is what is neither policy nor backward."""
    figures: dict[str, list[float]] = {"policy": [], "backward": [], "optimizer": [], "iteration": []}
    with TemporaryDirectory() as folder:
        trainer = make_trainer(folder, episodes, 1 + repeats)
        policy, backward, optimizer, marks = Spent(), Spent(), Spent(), []
        trainer.policy.act = policy.within(trainer.policy.act)
        trainer.model.forward = policy.within(trainer.model.forward)
        trainer.accelerator.backward = backward.within(trainer.accelerator.backward)
        created, began = trainer.create_optimizer(), []
        created.register_step_pre_hook(lambda *_: began.append(now()))
        created.register_step_post_hook(lambda *_: optimizer.add(now() - began[-1]))

        class Marks(TrainerCallback):
            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                marks.append((now(), policy.seconds, backward.seconds, optimizer.seconds))

        trainer.add_callback(Marks())
        trainer.train()
    for before, after in zip(marks, marks[1:], strict=False):
        for name, a, b in zip(("iteration", "policy", "backward", "optimizer"), before, after, strict=True):
            figures[name].append(b - a)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    overhead = medians["iteration"] - medians["policy"] - medians["backward"]  # AdamW's step is part of it
    simulator = -(-episodes // 16) * (LIMIT // CHUNK) * env_ms / 1000
    return medians | {
        "overhead": overhead,
        "simulator": simulator,
        "overhead_share_without_simulator": overhead / medians["iteration"],
        "overhead_share": overhead / (medians["iteration"] + simulator),
    }


def main() -> None:
    """Measure, show, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--episodes", type=int, default=64, help="episodes of an iteration, of 12 decisions each")
    parser.add_argument("--repeats", type=int, default=5, help="measurements")
    parser.add_argument("--env_ms", type=float, default=160.0, help="milliseconds of a decision of 16 environments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "machine": platform.platform()}
    results["update_s"] = measure_updates(args.episodes, args.repeats)
    results["iteration_s"] = measure_overhead(args.episodes, args.repeats, args.env_ms)
    results["load_average"] = os.getloadavg()[0]
    Console().print_json(data=results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
