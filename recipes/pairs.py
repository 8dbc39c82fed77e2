"""Turn stored trajectories into preference pairs, stage by stage, and say how many there are and why not more.

    python recipes/pairs.py --trajectories data/rollouts --output_dir data/pairs
    python recipes/pairs.py --trajectories data/rollouts --output_dir data/pairs --max_pairs_per_start 8 --balance

The trajectories need several episodes per seed (`recipes/collect.py --episodes_per_seed 6`), and may be those of a repository
on the Hub (`--trajectories user/name`). All of them are checked first. The table that is printed is stored as `data/pairs_yield.json`, and comes
into the dataset's card when the pairs are pushed (`recipes/push_to_hub.py`).
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from trl_stare import get_plan
from trl_stare.data import (
    TrajectoryFolder,
    build_pairs,
    check_labels,
    format_yield,
    relabel_dataset,
    save_pairs,
    validate_dataset,
)
from trl_stare.data.hub import find_dataset
from trl_stare.data.pairs import save_yield
from trl_stare.tasks import import_tasks

logger = logging.getLogger("pairs")


@dataclass
class PairsArguments:
    """What to compare, and which pairs to keep."""

    trajectories: str = field(
        metadata={
            "help": "Folder of stored trajectories (see `recipes/collect.py`), or dataset repository on the Hub."
        }
    )
    output_dir: str = field(metadata={"help": "The pairs' folder."})
    objective: str = field(
        default="sta-tpo",
        metadata={"help": "'sta-tpo', 'sta-tpo-sum': pairs of stages; 'tpo-mean', 'tpo-sum': whole trajectories."},
    )
    both_passed: str = field(
        default="cost",
        metadata={"help": "How two compare that passed a stage: by 'cost', or first by 'later' stages, then by cost."},
    )
    min_cost_gap: float = field(default=0.02, metadata={"help": "Smallest difference of costs that counts."})
    max_pairs_per_start: int | None = field(
        default=None, metadata={"help": "Most pairs of one stage from one initial state; default all."}
    )
    balance: bool = field(default=False, metadata={"help": "Keep equally many pairs of every stage."})
    fill: bool = field(default=False, metadata={"help": "As many pairs of every stage, by comparing across starts."})
    fill_to: int | None = field(
        default=None, metadata={"help": "With `fill`: at least this many, also of whole trajectories."}
    )
    relabel: bool = field(
        default=False,
        metadata={
            "help": "Label the stages of the trajectories anew, by the task's plan as it is now; needs a folder."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice where not all pairs are kept."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a repository."})
    task_module: str | None = field(
        default=None, metadata={"help": "Module, or its file, that registers tasks and policies of your own."}
    )


def main(args: PairsArguments) -> None:
    """Compare every two episodes from one start, and store the pairs with their yield."""
    import_tasks(args.task_module)
    folder, _ = find_dataset(args.trajectories, revision=args.revision)
    if args.relabel and folder != Path(args.trajectories):
        raise ValueError(
            f"`trajectories` must be a folder for `relabel`, got a repository, {args.trajectories}. Download it."
        )
    validate_dataset(folder)
    trajectories = TrajectoryFolder(folder, images=False)
    plan = get_plan(trajectories[0].task)
    if args.relabel:
        relabel_dataset(folder, plan)
        trajectories = TrajectoryFolder(folder, images=False)
    else:
        check_labels(folder, plan)
    pairs = build_pairs(
        trajectories,
        plan,
        objective=args.objective,
        both_passed=args.both_passed,
        min_cost_gap=args.min_cost_gap,
        max_pairs_per_start=args.max_pairs_per_start,
        balance=args.balance,
        fill=args.fill,
        fill_to=args.fill_to,
        seed=args.seed,
    )
    logger.info("%s", format_yield(pairs.yield_table))
    if not pairs.pairs:
        raise SystemExit(
            f"`trajectories` must hold episodes that can be compared, got none in {args.trajectories}: the table above says "
            "why. Where it is all zeros, no two episodes share a seed; collect several per seed, of a policy that acts "
            "at random (temperature 1)."
        )
    save_pairs(pairs.pairs, args.output_dir)
    table = save_yield(pairs.yield_table, args.output_dir)
    logger.info("%s holds %d pairs, %s why there are not more", args.output_dir, len(pairs.pairs), table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(TrlParser(PairsArguments).parse_args_and_config()[0])
