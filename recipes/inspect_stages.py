"""Look at a task's stages: `stages.json`, a timeline picture and videos with the stage written on every frame.

    python recipes/inspect_stages.py --task StackCube-v1 --model expert --episodes 8 --output_dir outputs/stages
    python recipes/inspect_stages.py --task PickCube-v1 --model random --output_dir outputs/random
    python recipes/inspect_stages.py --task StackCube-v1 --model outputs/ipi/imitation --output_dir outputs/imitation

Do this before you believe any reward. `findings.txt` holds what `trl_stare.stages.check` has to say about the plan.
"""

import json
import logging
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from trl import TrlParser

from trl_stare import get_plan, make_env
from trl_stare.actors import load_actor
from trl_stare.data import collect, warn_of_void
from trl_stare.evaluation import can_film, film_episode, inspect, plot_timelines
from trl_stare.runs import set_entries
from trl_stare.stages import check
from trl_stare.tasks import import_tasks

logger = logging.getLogger("inspect_stages")


@dataclass
class InspectArguments:
    """What to look at."""

    task: str = field(metadata={"help": "A registered task."})
    model: str = field(default="expert", metadata={"help": "A checkpoint (folder or Hub id), 'expert' or 'random'."})
    policy: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "How a checkpoint is loaded: `unnorm_key`, `dtype`, fields of its configuration."},
    )
    episodes: int = field(default=8, metadata={"help": "Episodes, one seed each."})
    seed: int = field(default=0, metadata={"help": "Seed of the first episode and of the actor's randomness."})
    output_dir: str = field(default="outputs/stages", metadata={"help": "Where everything goes."})
    noise: float = field(default=0.0, metadata={"help": "Share of the expert's steps that are random mistakes."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of a checkpoint; 0 is greedy."})
    videos: int = field(default=2, metadata={"help": "Episodes to film, from the first on."})
    num_envs: int = field(default=4, metadata={"help": "Environments, over all worker processes."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Worker processes; default as cores allow, or the GPU."}
    )
    visuals: str | None = field(default=None, metadata={"help": "'light' (default on a CPU) or 'stock'."})
    task_module: str | None = field(
        default=None, metadata={"help": "Module, or its file, that registers tasks and policies of your own."}
    )

    def __post_init__(self):
        if self.episodes < 1 or self.videos < 0:
            raise ValueError(f"`episodes` must be at least 1 and `videos` 0, got {self.episodes} and {self.videos}.")


def main(args: InspectArguments) -> None:
    """Play, label, draw, film."""
    import_tasks(args.task_module)
    actor = load_actor(args.model, args.task, noise=args.noise, temperature=args.temperature, **args.policy)
    plan = get_plan(args.task)
    out, seeds = Path(args.output_dir), range(args.seed, args.seed + args.episodes)
    settings = {"num_workers": args.num_workers, "visuals": args.visuals, "image_size": actor.image_size}
    with (
        closing(make_env(args.task, args.num_envs, chunk_size=actor.chunk_size, **settings)) as env,
        tqdm(total=args.episodes, desc=args.task, unit="episode") as bar,
    ):
        act = actor.make(torch.Generator().manual_seed(args.seed))
        trajectories = collect(
            env, act, seeds, name=actor.name, on_episode=lambda _: bar.update(), on_void=warn_of_void
        )
    if not trajectories:
        raise SystemExit(
            "`episodes` must hold one whose values are finite, got none: see above. Look at the task's `signals`."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "stages.json").write_text(json.dumps(inspect(trajectories, plan), indent=1))
    plot_timelines(trajectories, plan, out / "timeline.png")
    findings = str(check(plan, [trajectory.signals for trajectory in trajectories]))
    (out / "findings.txt").write_text(findings + "\n")
    logger.info("%s", findings)
    if args.videos and can_film(env):
        with closing(
            make_env(args.task, 1, num_workers=1, chunk_size=1, image_size=256, visuals=args.visuals)
        ) as camera:
            for trajectory in trajectories[: args.videos]:
                film_episode(camera, trajectory, plan, out)
    logger.info("written to %s", out)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(set_entries(*TrlParser(InspectArguments).parse_args_and_config(return_remaining_strings=True)))
