"""Does preference learning raise success? StA-TPO beside TPO, from one checkpoint, on rollouts of its own.

    python benchmarks/preference_learning.py --checkpoint outputs/ipi/imitation --output_dir outputs/preference_learning

Plays several episodes from each start, compares them by stage (StA-TPO) and whole (TPO), trains a copy of the checkpoint on
equally many pairs (or all that the rollouts give: `--equal_pairs false`) for equally many steps by each objective, and evaluates
all three on the same held-out seeds.
`results.json` holds success with Wilson 95 % intervals, stage by stage, and for each objective exact McNemar tests against
the checkpoint, and of StA-TPO against TPO. The same command continues where it was interrupted.

Some options of `StageDPOConfig` are flags, for both objectives: `--learning_rate 3e-5 --max_steps 120`; see `OPTIONS`.
"""

import json
import logging
import random
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from trl_stare import StageDPOConfig, StageDPOTrainer, TokenPolicy, get_plan, make_env
from trl_stare.data import (
    PairSet,
    TrajectoryFolder,
    build_pairs,
    check_traces,
    collect_dataset,
    pairs_dataset,
    validate_dataset,
)
from trl_stare.data.actors import policy_actor
from trl_stare.data.pairs import BOTH_PASSED, OBJECTIVES, REASONS
from trl_stare.evaluation import evaluate, mcnemar_exact, package_versions, paired, read_episodes, write_episodes
from trl_stare.runs import claim_folder

logger = logging.getLogger("preference_learning")

BASE = "base"
"""The checkpoint as it is, among the arms."""
OPTIONS = (
    *("max_steps", "per_device_train_batch_size", "learning_rate", "step_micro_batch_size", "logging_steps"),
    *("centered", "beta", "cost_coef", "margin_sign", "loss_type", "label_smoothing", "weight_decay", "seed"),
    *("stage_weights", "temperature"),
)
DEFAULTS = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 1.2e-5, "step_micro_batch_size": 64}


@dataclass
class Arguments:
    """What is compared on what."""

    checkpoint: str = field(
        metadata={"help": "Where all begin: an imitation checkpoint that succeeds half of the time."}
    )
    task: str = field(default="StackCube-v1", metadata={"help": "A registered task."})
    starts: int = field(default=150, metadata={"help": "Initial states of the rollouts."})
    episodes_per_seed: int = field(default=6, metadata={"help": "Episodes from each."})
    max_pairs_per_start: int = field(default=4, metadata={"help": "Most pairs of one stage from one initial state."})
    both_passed: str = field(
        default="cost", metadata={"help": f"How two are compared that both passed a stage: {BOTH_PASSED}."}
    )
    min_cost_gap: float = field(default=0.02, metadata={"help": "Smallest difference of costs that counts."})
    fill: bool = field(default=False, metadata={"help": "As many pairs of every stage, by comparing across starts."})
    fill_to: int | None = field(default=None, metadata={"help": "With `fill`: this many, also of whole trajectories."})
    arms: list[str] = field(
        default_factory=lambda: [BASE, "sta-tpo", "tpo-mean"],
        metadata={"help": f"What is evaluated, of {BASE}, {OBJECTIVES}."},
    )
    reasons: list[str] = field(
        default_factory=lambda: [*REASONS], metadata={"help": f"Pairs of these reasons alone, of {REASONS}."}
    )
    rollouts: str | None = field(
        default=None, metadata={"help": "Folder of the rollouts, for runs that share them; default: in `output_dir`."}
    )
    equal_pairs: bool = field(
        default=True,
        metadata={"help": "Train the arms on equally many pairs; if not, each on all that it finds in the rollouts."},
    )
    eval_episodes: int = field(default=300, metadata={"help": "Held-out episodes, seeds 0 on."})
    first_seed: int = field(default=200_000, metadata={"help": "Seed of the first initial state."})
    num_envs: int = field(default=16, metadata={"help": "Environments, over all worker processes."})

    def __post_init__(self):
        for name, known in (("arms", (BASE, *OBJECTIVES)), ("reasons", REASONS)):
            given = getattr(self, name)
            if not given or not set(given) <= set(known):
                raise ValueError(f"`{name}` must be some of {known}, got {given}.")


def main(args: Arguments, config: StageDPOConfig) -> None:
    """Collect, train, evaluate, write; each part once."""
    given = vars(args) | {name: getattr(config, name) for name in OPTIONS}
    out, plan = claim_folder(config.output_dir, given, free=()), get_plan(args.task)
    policy = TokenPolicy.from_pretrained(args.checkpoint)
    with closing(
        make_env(args.task, args.num_envs, chunk_size=policy.chunk_size, image_size=policy.image_size)
    ) as env:
        rollouts = collect(args, config, Path(args.rollouts or out / "rollouts"), env, policy, plan)
        play = partial(evaluated, args, config, out, env, plan)
        results = {"settings": given, "versions": package_versions(), "metadata": env.metadata, "arms": {}}
        results["rollouts"] = {"episodes": len(rollouts), "success_once": sum(r.success_once for r in rollouts)}
        if BASE in args.arms:
            results["arms"][BASE] = play(BASE, policy)
        pairs = find_pairs(args, config, rollouts, plan)
        for objective, (chosen, table) in pairs.items():
            checkpoint = out / objective / "policy"
            if not checkpoint.exists():
                train(args, config, objective, out / objective, rollouts, chosen)
            arm = {
                "pairs": len(chosen),
                "yield": table,
                "training": json.loads((out / objective / "log.json").read_text()),
            }
            results["arms"][objective] = play(objective, TokenPolicy.from_pretrained(checkpoint)) | arm
    results["mcnemar"] = compare(out, args.arms)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    logger.info("%s", summary(results))


def collect(
    args: Arguments, config: StageDPOConfig, folder: Path, env: Any, policy: TokenPolicy, plan: Any
) -> TrajectoryFolder:
    """Rollouts of the checkpoint, checked, on disk and without their images in memory."""
    collect_dataset(
        env,
        lambda generator: policy_actor(policy, temperature=config.temperature, generator=generator),
        folder,
        plan,
        episodes=args.starts * args.episodes_per_seed,
        episodes_per_seed=args.episodes_per_seed,
        first_seed=args.first_seed,
        seed=config.seed,
        name=args.checkpoint,
        settings={"temperature": config.temperature},
    )
    validate_dataset(folder)
    rollouts = TrajectoryFolder(folder)
    check_traces(rollouts, policy)
    return rollouts


def find_pairs(args: Arguments, config: StageDPOConfig, rollouts: TrajectoryFolder, plan: Any) -> dict[str, PairSet]:
    """Objective -> pairs and yield; with `equal_pairs`, of the objective with more of them a random choice as large as the other's."""
    slim = TrajectoryFolder(rollouts.folder, images=False)
    made = {}
    for objective in (name for name in OBJECTIVES if name in args.arms):
        options = {
            name: getattr(args, name)
            for name in ("both_passed", "min_cost_gap", "max_pairs_per_start", "fill", "fill_to")
        }
        found = build_pairs(slim, plan, objective=objective, seed=config.seed, **options)
        made[objective] = found._replace(pairs=tuple(pair for pair in found.pairs if pair.reason in args.reasons))
    if not all(found.pairs for found in made.values()):
        raise SystemExit("preference_learning: an objective has no pairs. Play more starts or more episodes per seed.")
    if not args.equal_pairs or len(made) < 2:
        return made
    budget, chooser = min(len(found.pairs) for found in made.values()), random.Random(config.seed)
    return {
        objective: PairSet(
            tuple(found.pairs[i] for i in sorted(chooser.sample(range(len(found.pairs)), budget))), found.yield_table
        )
        for objective, found in made.items()
    }


def train(
    args: Arguments, config: StageDPOConfig, objective: str, out: Path, rollouts: TrajectoryFolder, pairs: tuple
) -> None:
    """A copy of the checkpoint on these pairs; `out/policy` is there when all is."""
    policy = TokenPolicy.from_pretrained(args.checkpoint)
    options = {name: getattr(config, name) for name in OPTIONS}
    trainer = StageDPOTrainer(
        policy,
        StageDPOConfig(str(out / "training"), objective=objective, save_strategy="no", report_to="none", **options),
        pairs_dataset(rollouts, pairs, file=out / "rows" / "pairs.arrow"),
    )
    trainer.train()
    (out / "log.json").write_text(json.dumps(trainer.state.log_history))
    policy.save_pretrained(out / "policy.new")
    (out / "policy.new").rename(out / "policy")


def evaluated(
    args: Arguments, config: StageDPOConfig, out: Path, env: Any, plan: Any, name: str, policy: TokenPolicy
) -> dict[str, Any]:
    """The arm's result on the held-out seeds, played once and kept."""
    file = out / f"{name}.json"
    if not file.exists():
        starts = range(args.first_seed, args.first_seed + args.starts)
        result, episodes = evaluate(
            policy,
            env,
            plan,
            range(args.eval_episodes),
            temperature=config.temperature,
            seed=config.seed,
            train_seeds=starts,
        )
        write_episodes(out / f"{name}.jsonl", episodes)
        file.write_text(json.dumps(result.to_dict()))
    return json.loads(file.read_text())


def compare(out: Path, arms: list[str]) -> dict[str, dict[str, float]]:
    """Exact McNemar tests, `success_once` on the same seeds; `gain` in percentage points."""
    tests = {}
    for before, after in ((BASE, "sta-tpo"), (BASE, "tpo-mean"), ("tpo-mean", "sta-tpo")):
        if before not in arms or after not in arms:
            continue
        a, b = paired(*(read_episodes(out / f"{name}.jsonl") for name in (before, after)))
        gain = 100 * (sum(b) - sum(a)) / len(a)
        tests[f"{after} against {before}"] = mcnemar_exact(a, b)._asdict() | {"gain": gain}
    return tests


def summary(results: dict[str, Any]) -> str:
    """A line per arm and per test."""
    lines = []
    for name, arm in results["arms"].items():
        low, high = arm["success_once_ci95"]
        interval = f"{100 * arm['success_once']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append(f"{name}: success once {interval}, n = {arm['n_episodes']}")
    for name, test in results["mcnemar"].items():
        lines.append(f"{name}: {test['b_only']} to {test['a_only']} episodes, p = {test['p_value']:.3g}")
    return "\n".join(lines)


def parse(flags: list[str] | None = None) -> tuple[Arguments, StageDPOConfig]:
    """The command line, or these flags.

    Raises:
        ValueError: if a setting of `StageDPOConfig` is given that no arm would be trained with.
    """
    parser = HfArgumentParser((Arguments, StageDPOConfig))
    parser.set_defaults(**DEFAULTS)
    args, config = parser.parse_args_into_dataclasses(flags)
    usual = StageDPOConfig(config.output_dir, **DEFAULTS)
    names = [option.name for option in fields(config) if option.init and option.name not in OPTIONS]
    if ignored := [name for name in names if getattr(config, name) != getattr(usual, name)]:
        raise ValueError(f"Settings of `StageDPOConfig` must be among {OPTIONS}, got {ignored}. Leave these out.")
    return args, config


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*parse())
