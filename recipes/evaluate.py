"""Evaluate any policy on any task or suite: `eval_info.json`, a row per episode, videos, a table.

    python recipes/evaluate.py --model outputs/ipi/interaction --task StackCube-v1 --episodes 300 --output_dir outputs/eval/ipi
    python recipes/evaluate.py --model user/my-vla --suite simpler_widowx --seed 0 1 2 --output_dir outputs/eval/widowx
    python recipes/evaluate.py --model openvla/openvla-7b --policy.unnorm_key bridge_orig --policy.action_convention bridge \
        --temperature 0 --suite simpler_widowx --output_dir outputs/eval/openvla
    python recipes/evaluate.py --model expert --suite PushCube-v1,PullCube-v1 --output_dir outputs/eval/expert
    python recipes/evaluate.py --model outputs/ipi/interaction --task StackCube-v1 --variations all --output_dir outputs/robust

Interrupt it whenever you like: every finished episode is kept, and the same command continues. The same command on the same
machine gives the same bytes; times are in `timing.json`, apart from the results. See docs/evaluation.md.
"""

import glob
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from trl import TrlParser

from trl_stare import get_plan, make_env
from trl_stare.actors import SCRIPTED, NamedActor, load_actors
from trl_stare.data.trajectory import Trajectory
from trl_stare.envs import get_simulated_task, get_variation, select_variations
from trl_stare.evaluation import (
    RULES,
    PlayedEpisode,
    PolicySource,
    build_eval_info,
    can_film,
    check_distinct,
    eval_results,
    eval_table,
    film_episode,
    held_out_starts,
    measure_robustness,
    package_versions,
    play_in_blocks,
    played_variations,
    publish_results,
    read_played,
    resolve_policy,
    suite_tasks,
    task_metrics,
    write_eval_info,
    write_played,
    write_robustness,
)
from trl_stare.files import write_atomically
from trl_stare.interfaces import NOMINAL
from trl_stare.runs import Stopwatch, claim_folder, set_entries
from trl_stare.tasks import import_tasks

logger = logging.getLogger("evaluate")

FREE = ("output_dir", "push", "task_module", "variations", "videos")
"""May differ when an evaluation is continued."""


@dataclass
class EvaluateArguments:
    """Whom to evaluate, on what."""

    model: str = field(metadata={"help": "A checkpoint (folder or Hub id), 'expert' or 'random'."})
    output_dir: str = field(metadata={"help": "Where everything goes."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    policy: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "How a checkpoint is loaded: `unnorm_key`, `dtype`, fields of its configuration."},
    )
    task: str | None = field(default=None, metadata={"help": "A registered task."})
    suite: str | None = field(
        default=None, metadata={"help": "'simpler_widowx', 'maniskill_panda', or tasks with commas between them."}
    )
    episodes: int | None = field(
        default=None,
        metadata={
            "help": "Of each task and seed; default all configurations where a task has a list of them, else 100."
        },
    )
    seed: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "One or several, from 0 on. Each has its own held-out starts and its own sampling."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of a checkpoint; 0 is greedy."})
    success_rule: str = field(
        default="success_once", metadata={"help": f"What `pc_success` counts: {', '.join(RULES)}."}
    )
    videos: int = field(default=1, metadata={"help": "Successes and failures to film, of each task."})
    num_envs: int = field(default=8, metadata={"help": "Environments, over all worker processes."})
    num_workers: int | None = field(default=None, metadata={"help": "Worker processes; default as cores allow."})
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels; default a checkpoint's, or the task's own."}
    )
    device: str = field(
        default="cpu",
        metadata={
            "help": "Where is simulated; a checkpoint acts on the GPU where there is one. With 'cuda' episodes depend on those before "
            "them: no videos, and an evaluation that was interrupted does not end as another would."
        },
    )
    visuals: str | None = field(default=None, metadata={"help": "'light' (default on a CPU) or 'stock'."})
    variations: str | None = field(
        default=None,
        metadata={
            "help": "'all', or names with commas between them, e.g. 'camera/shift,light/dim': the task as it is, then each of "
            "these changes on the same starts, each in a folder of its own, and robustness.md."
        },
    )
    push: bool = field(
        default=False, metadata={"help": "Put the results into the model card: the Hub's, or the folder's README.md."}
    )
    task_module: str | None = field(
        default=None, metadata={"help": "Module, or its file, that registers tasks and policies of your own."}
    )

    def __post_init__(self):
        if (self.task is None) == (self.suite is None):
            raise ValueError(f"one of `task` and `suite` must be given, got {self.task!r} and {self.suite!r}.")
        if self.success_rule not in RULES:
            raise ValueError(f"`success_rule` must be one of {', '.join(RULES)}, got {self.success_rule!r}.")
        if len(set(self.seed)) != len(self.seed) or min(self.seed) < 0:
            raise ValueError(f"`seed` must be different numbers from 0 on, got {self.seed}.")
        if self.videos < 0 or self.num_envs < 1:
            raise ValueError(f"`videos` must be >= 0 and `num_envs` >= 1, got {self.videos} and {self.num_envs}.")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and self.variations):
            raise ValueError(f"`device` must be 'cpu', or 'cuda' without `variations`, got {self.device!r}.")
        if self.push and self.model in SCRIPTED:
            raise ValueError(f"`push` needs a model with a card, got {self.model!r}.")
        if self.push and self.revision is not None:
            raise ValueError(
                f"`revision` must be left out with `push`, which changes the card of the newest weights, got {self.revision!r}. "
                "Leave out one of the two."
            )


@dataclass
class Job:
    """What is the same for all variations."""

    args: EvaluateArguments
    source: PolicySource
    actors: dict[str, NamedActor]
    starts: dict[str, dict[int, range]]


def main(args: EvaluateArguments) -> None:
    """Variation by variation, task by task; what is there already is not played again."""
    import_tasks(args.task_module)
    variations = select_variations(args.variations) if args.variations else ()
    tasks = suite_tasks(args.suite) if args.suite else (args.task,)
    starts = {
        task: {
            seed: held_out_starts(seed, args.episodes, get_simulated_task(task).configurations) for seed in args.seed
        }
        for task in tasks
    }
    if args.model == "expert" or (args.model != "random" and args.temperature == 0):
        for task in tasks:
            check_distinct(starts[task], get_simulated_task(task).configurations, task)
    source = resolve_policy(args.model, args.revision, args.policy)
    actors = load_actors(source.location, tasks, temperature=args.temperature, **args.policy)
    out = claim(args, source, tasks)
    job, watch = Job(args, source, actors, starts), Stopwatch(out / "timing.json")
    info, nominal = evaluate_tasks(job, NOMINAL, out / NOMINAL if variations else out, watch)
    if args.push:
        logger.info("model card: %s", publish_results(args.model, eval_results(info)))
    if variations:
        # with those that were played before, so that the summary is of all; in one order
        asked = {*variations, *played_variations(out)}
        names = [name for name in select_variations("all") if name in asked]
        varied = {name: evaluate_tasks(job, name, out / name, watch)[1] for name in names}
        rule, what = args.success_rule, {name: get_variation(name).what for name in names}
        write_robustness(out, measure_robustness(nominal, varied, rule=rule), rule=rule, what=what)
        logger.info("%s\n\nwritten to %s", (out / "robustness.md").read_text(), out)


def claim(args: EvaluateArguments, source: PolicySource, tasks: Sequence[str]) -> Path:
    """The folder, if all episodes in it are played and cut as those to come."""
    decided = {
        "weights": source.files,
        "versions": package_versions(),
        "stage_events": {task: get_plan(task).event_names for task in tasks},
    }
    # a checkpoint is known by its files, wherever they are; a demonstrator and chance have only a name
    free = (*FREE, "model") if source.files else FREE
    return claim_folder(args.output_dir, asdict(args) | decided, free=free)


def evaluate_tasks(
    job: Job, variation: str, out: Path, watch: Stopwatch
) -> tuple[dict[str, Any], list[PlayedEpisode]]:
    """Everything under one variation: content of `eval_info.json`, and the rows of all tasks."""
    args, source, episodes, metrics = job.args, job.source, {}, {}
    for task in job.starts:
        with watch(task if variation == NOMINAL else f"{task} {variation}"):
            episodes[task], metrics[task] = evaluate_task(job, task, variation, out)
    settings = {
        "success_rule": args.success_rule,
        "temperature": args.temperature if source.files else None,
        "seed": args.seed,
        "num_envs": args.num_envs,
    } | ({"policy": args.policy} if args.policy else {})
    info = build_eval_info(
        policy=source.to_dict(),
        settings=settings,
        group=args.suite or args.task,
        episodes=episodes,
        metrics=metrics,
    )
    write_eval_info(out, info)
    logger.info("%s\n\nwritten to %s", eval_table(info), out)
    return info, [row for rows in episodes.values() for row in rows]


def evaluate_task(job: Job, task: str, variation: str, out: Path) -> tuple[list[PlayedEpisode], dict[str, Any]]:
    """Rows and metrics of one task."""
    args, actor, starts, stages = job.args, job.actors[task], job.starts[task], get_plan(task)
    file, blocks = out / "episodes" / f"{task}.parquet", out / "episodes" / f".{task}"
    found = file.with_suffix(".json")  # written last
    if found.exists():
        return read_played(file), json.loads(found.read_text())
    varied = {"visuals": args.visuals, "variation": variation, "device": args.device}
    env = make_env(
        task,
        args.num_envs,
        num_workers=args.num_workers,
        chunk_size=actor.chunk_size,
        image_size=args.image_size or actor.image_size,
        **varied,
    )
    name, rows, solved = Path(job.source.name).name, [], []
    with closing(env), ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=sum(map(len, starts.values())), desc=f"{task} {variation}", unit="episode")
        )
        videos = args.videos if args.videos and can_film(env) else 0
        film = Film(task, out / "videos" / task, videos, stack, **varied)
        for seed, chosen in starts.items():
            rows += play_in_blocks(
                env, actor.make, stages, chosen, blocks, seed=seed, name=name,
                on_episode=partial(show, bar, solved), on_block=film,
            )  # fmt: skip
        environment = env.metadata | {"num_parts": len(env.parts)}
    videos = [path.relative_to(out).as_posix() for path in sorted((out / "videos" / task).glob("[!.]*.mp4"))]
    metrics = task_metrics(rows, stages.event_names, rule=args.success_rule, environment=environment, videos=videos)
    write_played(file, rows)
    write_atomically(found, json.dumps(metrics))
    shutil.rmtree(blocks)
    return rows, metrics


def show(bar: tqdm, solved: list[bool], episode: PlayedEpisode) -> None:
    """Move the progress bar on."""
    solved.append(episode.result.success_once)
    bar.set_postfix_str(f"success_once {100 * sum(solved) / len(solved):.0f} %", refresh=False)
    bar.update()


class Film:
    """Films the first `videos` successes and failures of a task, every step, in a larger picture with the stage on it."""

    def __init__(self, task: str, folder: Path, videos: int, stack: ExitStack, **varied: Any):
        self.task, self.folder, self.videos, self.stack, self.varied = task, folder, videos, stack, varied
        self.camera = None

    def __call__(self, trajectories: list[Trajectory]) -> None:
        for trajectory in trajectories:
            outcome = "success" if trajectory.success_once else "failure"
            name = glob.escape(Path(trajectory.policy).name)
            if len(list(self.folder.glob(f"{name}_{outcome}_seed*.mp4"))) < self.videos:
                try:
                    self._film(trajectory)
                except (OSError, RuntimeError, ValueError) as error:  # the episode counts without it
                    logger.warning("no video of seed %d of %s: %s", trajectory.seed, self.task, error)

    def _film(self, trajectory: Trajectory) -> None:
        if self.camera is None:
            env = make_env(self.task, 1, num_workers=1, chunk_size=1, image_size=256, **self.varied)
            self.camera = self.stack.enter_context(closing(env))
        film_episode(self.camera, trajectory, get_plan(self.task), self.folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(set_entries(*TrlParser(EvaluateArguments).parse_args_and_config(return_remaining_strings=True)))
