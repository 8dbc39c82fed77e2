"""Collect a dataset of stage-labelled trajectories: demonstrations, noisy ones, or rollouts of any checkpoint.

    python recipes/collect.py --task StackCube-v1 --episodes 1000 --noise 0.08 --successes_only --output_dir data/demos
    python recipes/collect.py --task StackCube-v1 --episodes 300 --episodes_per_seed 6 --model outputs/ipi/imitation \
        --output_dir data/rollouts

The second is what `recipes/pairs.py` compares: six episodes from each of 50 initial states. Interrupt it whenever you like: every finished episode is kept, and the same command continues. The folder holds plain
parquet files: `datasets.load_dataset("data/demos")` reads them, and `trl_stare.data.load_trajectories` gives tensors.
"""

import logging
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser

from trl_stare import get_plan, make_env
from trl_stare.actors import load_actor
from trl_stare.data import collect_dataset, stored_settings
from trl_stare.evaluation import resolve_policy
from trl_stare.runs import set_entries
from trl_stare.tasks import import_tasks

logger = logging.getLogger("collect")


@dataclass
class CollectArguments:
    """What to collect."""

    task: str = field(metadata={"help": "A registered task."})
    output_dir: str = field(metadata={"help": "The dataset's folder."})
    episodes: int = field(default=100, metadata={"help": "Episodes that the dataset shall hold."})
    episodes_per_seed: int = field(
        default=1, metadata={"help": "Episodes from each initial state; preference pairs need several."}
    )
    model: str = field(default="expert", metadata={"help": "A checkpoint (folder or Hub id), 'expert' or 'random'."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    policy: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "How a checkpoint is loaded: `unnorm_key`, `dtype`, fields of its configuration."},
    )
    noise: float = field(default=0.0, metadata={"help": "Share of the expert's steps that are random mistakes."})
    successes_only: bool = field(default=False, metadata={"help": "Keep successful episodes only."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of a checkpoint; 0 is greedy."})
    first_seed: int = field(default=100_000, metadata={"help": "Seed of the first episode; evaluations begin at 0."})
    seed: int = field(default=0, metadata={"help": "Seed of the actor's randomness."})
    num_envs: int = field(default=8, metadata={"help": "Environments, over all worker processes."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Worker processes; default as cores allow, or the GPU."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels; default a checkpoint's, or the task's own."}
    )
    visuals: str | None = field(default=None, metadata={"help": "'light' (default on a CPU) or 'stock'."})
    task_module: str | None = field(
        default=None, metadata={"help": "Module, or its file, that registers tasks and policies of your own."}
    )


def main(args: CollectArguments) -> None:
    """Collect until `output_dir` holds `episodes` episodes."""
    import_tasks(args.task_module)
    source = resolve_policy(args.model, args.revision, args.policy)
    actor = load_actor(source.location, args.task, noise=args.noise, temperature=args.temperature, **args.policy)
    settings = {"noise": args.noise} if args.model == "expert" else {"temperature": args.temperature} | args.policy
    if source.files:  # not other weights under the same name
        settings |= {"revision": source.revision, "weights": source.files}
    env = make_env(
        args.task,
        args.num_envs,
        num_workers=args.num_workers,
        chunk_size=actor.chunk_size,
        image_size=args.image_size or actor.image_size,
        visuals=args.visuals,
    )
    with closing(env):
        folder = collect_dataset(
            env,
            actor.make,
            args.output_dir,
            get_plan(args.task),
            episodes=args.episodes,
            episodes_per_seed=args.episodes_per_seed,
            first_seed=args.first_seed,
            seed=args.seed,
            successes_only=args.successes_only,
            name=source.name,
            settings=settings,
        )
    logger.info("%s holds %d episodes", folder, len(stored_settings(folder)[0]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(set_entries(*TrlParser(CollectArguments).parse_args_and_config(return_remaining_strings=True)))
