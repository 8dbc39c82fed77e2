"""How much memory a stored dataset takes to be read, checked, compared and converted: it must not grow with the episodes.

    python benchmarks/reading.py --json reading.json

Writes datasets of 100, 1,000 and 10,000 episodes (24 steps, 6 decisions, 32 px, smooth pictures; five a seed) to a temporary
folder, and does each of these with each of them, in a new process:

- `open`: a `TrajectoryFolder`, and 200 episodes at random places of it;
- `read`: every episode, images included, one after another;
- `pairs`: `build_pairs`, one pair a stage and start; `validate`: `validate_dataset`;
- `convert`: `pairs_dataset(file=...)`, and 200 rows of what it wrote;
- `imitate`: `demonstration_dataset`, and 25 batches of 8 decisions at random from `DemonstrationCollator`, twice: the second time
  everything lies in its cache;
- `load`: all at once by `load_trajectories`, for comparison (not of 10,000).

Measured are the process's peak resident memory, how much of it was added after the imports (both MB), and the seconds it took; of
`imitate` also the milliseconds for each decision of the second time. `--folder data/demos` measures `imitate` with a dataset of yours.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm

from trl_stare import get_plan
from trl_stare.data import (
    DemonstrationCollator,
    Trajectory,
    TrajectoryFolder,
    build_pairs,
    demonstration_dataset,
    load_trajectories,
    pairs_dataset,
    save_trajectories,
    validate_dataset,
)

PLAN = get_plan("StackCube-v1")
SIZES = (100, 1_000, 10_000)
BATCHES, BATCH_SIZE = 25, 8
OPERATIONS = ("open", "read", "pairs", "validate", "convert", "imitate", "load")
DECISIONS, CHUNK, PIXELS, PER_SEED = 6, 4, 32, 5


class Made(Sequence[Trajectory]):
    """`length` episodes, made when they are asked for."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        rows = range(self.length)[index]  # raises `IndexError` where it must
        return make_episode(rows) if isinstance(rows, int) else [make_episode(row) for row in rows]


def make_episode(index: int) -> Trajectory:
    """Random numbers and a picture that fades; the gripper is at the object, and touches it, from the middle on in two of three."""
    g = torch.Generator().manual_seed(index)
    steps = DECISIONS * CHUNK
    rows = torch.arange(steps + 1)
    ramp = torch.linspace(0, 200, PIXELS).to(torch.uint8)[:, None, None].expand(PIXELS, PIXELS, 3)
    signals = {
        name: torch.rand(steps + 1, size, generator=g)
        for name, size in {
            "tcp_position": 3,
            "object_position": 3,
            "goal_position": 3,
            "object_lift": 1,
            "gripper_width": 1,
        }.items()
    }
    signals |= {name: torch.zeros(steps + 1, dtype=torch.bool) for name in ("is_grasped", "success")}
    signals["is_contact"] = (rows >= steps // 2) & (index % 3 > 0)
    signals["tcp_position"] = torch.where(
        signals["is_contact"][:, None], signals["object_position"], signals["tcp_position"]
    )
    actions = torch.randn(steps, 7, generator=g)
    return Trajectory(
        task=PLAN.task,
        instruction="stack the red cube",
        seed=index // PER_SEED,
        policy="made",
        images=torch.stack([ramp + number for number in range(DECISIONS)]),
        state=torch.randn(DECISIONS, 20, generator=g),
        starts=torch.arange(0, steps, CHUNK),
        actions=actions,
        labels=actions,
        trace=torch.randint(0, 33, (DECISIONS, 7 * CHUNK), generator=g),
        logps=-torch.rand(DECISIONS, 7 * CHUNK, generator=g),
        features=None,
        final_image=ramp,
        final_state=torch.randn(20, generator=g),
        signals=signals,
        reward=torch.zeros(steps),
        terminated=False,
        truncated=True,
    )


def measure(operation: str, folder: str, scratch: str) -> dict[str, float]:
    """Do it, in a process of its own; peak memory beyond what the imports take, and seconds."""
    torch.set_num_threads(1)
    before, began = peak_mb(), time.perf_counter()
    places = random.Random(0)
    if operation == "open":
        episodes = TrajectoryFolder(folder)
        for _ in range(200):
            episodes[places.randrange(len(episodes))]
    elif operation == "read":
        for episode in TrajectoryFolder(folder):
            assert episode.images.shape[0] == DECISIONS
    elif operation == "validate":
        validate_dataset(folder)
    elif operation == "load":
        load_trajectories(folder)
    elif operation == "imitate":
        load_batches = batches_of(TrajectoryFolder(folder, cache_dir=Path(scratch) / "pictures").light(), places)
        load_batches()
        again = time.perf_counter()
        load_batches()
        decision_ms = 1000 * (time.perf_counter() - again) / (BATCHES * BATCH_SIZE)
        return {"decision_ms": decision_ms} | figures(before, began)
    else:
        pairs = build_pairs(TrajectoryFolder(folder, images=False), PLAN, max_pairs_per_start=1).pairs
        if operation == "convert":
            rows = pairs_dataset(TrajectoryFolder(folder), pairs, file=Path(scratch) / "pairs.arrow")
            for _ in range(200):
                rows[places.randrange(len(rows))]
    return figures(before, began)


def batches_of(episodes: TrajectoryFolder, places: random.Random) -> Callable[[], None]:
    """What loads batches of imitation, but for the policy's own `prepare`."""
    rows = demonstration_dataset(episodes, get_plan(episodes[0].task))
    collate = DemonstrationCollator(
        episodes, lambda obs: {"images": obs.images}, lambda chunk: chunk.flatten(1), CHUNK
    )

    def load() -> None:
        for _ in range(BATCHES):
            collate([rows[places.randrange(len(rows))] for _ in range(BATCH_SIZE)])

    return load


def figures(before: float, began: float) -> dict[str, float]:
    """Peak memory, what of it was added, and seconds."""
    # the kernel counts pages for each CPU and adds up late: a peak read later can be some pages below one read before
    peak = max(peak_mb(), before)
    return {"added_mb": peak - before, "peak_mb": peak, "seconds": time.perf_counter() - began}


def peak_mb() -> float:
    """Peak resident memory of this process so far. (`ru_maxrss` begins with that of the process which started it.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_all(sizes: Sequence[int]) -> dict[str, Any]:
    """A table by size and operation."""
    table: dict[str, Any] = {}
    for size in sizes:
        with TemporaryDirectory() as scratch:
            folder = str(Path(scratch) / "episodes")
            save_trajectories(Made(size), folder, PLAN)
            megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20
            table[str(size)] = {"on_disk_mb": megabytes}
            operations = [name for name in OPERATIONS if name != "load" or size <= 1_000]
            for operation in tqdm(operations, desc=f"{size} episodes"):
                table[str(size)][operation] = measure_apart(operation, folder, scratch)
    return table


def measure_apart(operation: str, folder: str, scratch: str) -> dict[str, float]:
    """[`measure`] in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, operation, folder, scratch).result()


def main() -> None:
    """Measure, show, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="episodes of the datasets")
    parser.add_argument("--folder", help="measure `imitate` with the episodes there")
    args = parser.parse_args()
    results: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "machine": platform.platform()}
    if args.folder:
        with TemporaryDirectory() as scratch:
            results["imitate"] = measure_apart("imitate", args.folder, scratch)
    else:
        results["sizes"] = measure_all(args.sizes)
    Console().print_json(data=results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
