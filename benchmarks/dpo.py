"""What a step of StageDPOTrainer costs: memory by length of the trajectories, and time beside a bare PyTorch loop.

    python benchmarks/dpo.py --json dpo.json

A batch is the four stage pairs of two trajectories, so that it holds every step of both. Goals: peak memory with 80 steps at
most 1.15 times that with 20; a step at most 1.1 times the bare loop's, which reads, scores, recomputes and updates the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback

from trl_stare import StageDPOConfig, StageDPOTrainer, TokenPolicy
from trl_stare.data import StagePair, Trajectory, pairs_dataset

LENGTHS = (20, 40, 80, 160)
STAGES = ("Reach", "Grasp", "Transport", "Stack")
MICRO_BATCH = 16
IMAGE_SIZE, STATE_SIZE, ACTION_DIM = 64, 8, 7


def make_policy() -> TokenPolicy:
    """The small VLA; a decision is one step."""
    torch.manual_seed(0)
    stats = {"action": {"scale": [1.0] * ACTION_DIM}, "state": {"mean": [0.0] * STATE_SIZE, "std": [1.0] * STATE_SIZE}}
    return TokenPolicy.create_tiny({"toy": stats}, image_size=IMAGE_SIZE, chunk_size=1, action_dim=ACTION_DIM)


def make_trajectory(steps: int, seed: int) -> Trajectory:
    """`steps` decisions on pictures of colour gradients, which are about as large as rendered ones."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(steps, 3, 2, 2, generator=generator) * 255
    images = torch.nn.functional.interpolate(corners, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return Trajectory(
        task="Toy-v1",
        instruction="stack the red cube on the green cube",
        seed=0,
        policy="toy",
        images=images.permute(0, 2, 3, 1).to(torch.uint8).contiguous(),
        state=torch.randn(steps, STATE_SIZE, generator=generator),
        starts=torch.arange(steps),
        actions=torch.zeros(steps, ACTION_DIM),
        labels=torch.zeros(steps, ACTION_DIM),
        trace=torch.randint(0, 33, (steps, ACTION_DIM), generator=generator),
        logps=None,
        features=None,
        final_image=torch.zeros(IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8),
        final_state=torch.zeros(STATE_SIZE),
        signals={"success": torch.zeros(steps + 1, dtype=torch.bool)},
        reward=torch.zeros(steps),
        terminated=False,
        truncated=True,
    )


def make_rows(steps: int) -> Dataset:
    """Eight rows: the four stage pairs of two pairs of trajectories of `steps` steps."""
    pairs, size = [], steps // len(STAGES)
    for chosen in (0, 2):
        for stage, name in enumerate(STAGES):
            cut = (stage * size, (stage + 1) * size)
            text = "stack the red cube on the green cube"
            pairs.append(StagePair("Toy-v1", text, 0, stage, name, chosen, chosen + 1, *cut, *cut, 0.0, 1.0, "passed"))
    return pairs_dataset([make_trajectory(steps, seed) for seed in range(4)], pairs)


class StepTimes(TrainerCallback):
    """Seconds of this process's CPU time (with a GPU: of the clock) from the end of one step to the end of the next."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(now())


def now() -> float:
    """CPU time, which other jobs on the machine do not stretch; with a GPU the clock, after all kernels."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def make_trainer(policy: TokenPolicy, rows: Dataset, folder: str, steps: int, size: int | None) -> StageDPOTrainer:
    """Full fine-tuning with a batch of four pairs; nothing is saved or logged."""
    config = StageDPOConfig(
        folder, per_device_train_batch_size=len(STAGES), step_micro_batch_size=size, max_steps=steps,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-5, bf16=False,
    )  # fmt: skip
    return StageDPOTrainer(policy, config, rows)


def peak_memory(steps: int, size: int | None) -> dict[str, float]:
    """MB: of this process before the trainer is made, its peak after two steps, and CUDA's peak where there is a GPU."""
    torch.set_num_threads(1)
    policy, rows = make_policy(), make_rows(steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with TemporaryDirectory() as folder:
        make_trainer(policy, rows, folder, 2, size).train()
    figures = {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        figures["cuda_peak"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def trainer_times(trainer: StageDPOTrainer) -> list[float]:
    """Seconds of each step but the first of one training."""
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    trainer.remove_callback(times)
    return [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)]


def bare_times(policy: TokenPolicy, rows: Dataset, collator: Any, steps: int) -> list[float]:
    """The same without a trainer: rows that carry their reference scores, AdamW, clipping at norm 1."""
    model = policy.model.train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loader, ends = DataLoader(rows, batch_size=len(STAGES), shuffle=True, collate_fn=collator), []
    for batch in endless(loader, steps):
        sides, num_pairs = batch["side_ids"].to(device), len(batch["stages"])
        scores = torch.cat(
            [
                checkpoint(policy.score, *part, use_reentrant=False, preserve_rng_state=False)
                for part in micro_batches(batch, device)
            ]
        )
        zero = scores.new_zeros(2 * num_pairs)
        means = zero.index_add(0, sides, scores) / zero.index_add(0, sides, torch.ones_like(scores))
        chosen, rejected = (
            means[i * num_pairs : (i + 1) * num_pairs]
            - batch[f"ref_{side}_logps"].to(device)
            - 0.1 * batch[f"{side}_cost"].to(device)
            for i, side in enumerate(("chosen", "rejected"))
        )
        (-logsigmoid(chosen - rejected)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(now())
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def micro_batches(batch: dict[str, Any], device: torch.device) -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    """Inputs and trace, `MICRO_BATCH` decisions at a time."""
    for i in range(0, len(batch["trace"]), MICRO_BATCH):
        inputs = {name: value[i : i + MICRO_BATCH].to(device) for name, value in batch["inputs"].items()}
        yield inputs, batch["trace"][i : i + MICRO_BATCH].to(device)


def endless(loader: DataLoader, steps: int) -> Iterator[dict[str, Any]]:
    """`steps` batches, epoch after epoch."""
    while True:
        for batch in loader:
            if steps == 0:
                return
            steps -= 1
            yield batch


def measure_speed(length: int, steps: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step, trainer and bare loop in turns."""
    times: dict[str, list[float]] = {"trainer": [], "bare": []}
    policy = make_policy()
    with TemporaryDirectory() as folder:
        trainer = make_trainer(policy, make_rows(length), folder, steps, MICRO_BATCH)
        for _ in tqdm(range(repeats), desc="speed"):
            times["trainer"] += trainer_times(trainer)
            times["bare"] += bare_times(policy, trainer.train_dataset, trainer.data_collator, steps)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"trainer_over_bare": medians["trainer"] / medians["bare"]}


def measure_memory() -> dict[str, Any]:
    """Peak memory by length in micro-batches, and for comparison at once, each in a new process."""
    table: dict[str, dict[int, dict[str, float]]] = {"micro_batches": {}, "at_once": {}}
    runs = [("micro_batches", MICRO_BATCH, steps) for steps in LENGTHS] + [
        ("at_once", None, 20),
        ("at_once", None, 80),
    ]
    for name, size, steps in tqdm(runs, desc="memory"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            table[name][steps] = process.submit(peak_memory, steps, size).result()
    peaks = {steps: figures["peak"] for steps, figures in table["micro_batches"].items()}
    return table | {"80_over_20": peaks[80] / peaks[20], "160_over_80": peaks[160] / peaks[80]}


def main() -> None:
    """Measure, show, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--steps", type=int, default=9, help="training steps per measurement")
    parser.add_argument("--repeats", type=int, default=4, help="measurements of the speed, trainer and loop in turns")
    parser.add_argument("--length", type=int, default=40, help="steps of a trajectory for the speed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "machine": platform.platform()}
    results["memory_mb"] = measure_memory()
    results["seconds_per_step"] = measure_speed(args.length, args.steps, args.repeats)
    results["load_average"] = os.getloadavg()[0]
    Console().print_json(data=results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
