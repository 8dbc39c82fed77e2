"""Imitation -> Preference -> Interaction on one task, from nothing to three evaluated checkpoints.

    accelerate launch recipes/ipi.py --config recipes/configs/ipi_stackcube_tiny.yaml --output_dir outputs/ipi

Flags override the file, those of a phase by its name: `--interaction.learning_rate 3e-4`. The same command with the same
`--output_dir` continues where it stopped. `--phases preference,interaction --init_checkpoint PATH` starts from a checkpoint. Another
VLA than the small one is trained in all three phases by `--lora.r 32`, adapters that are merged at the end of each; it needs learning
rates of its own: docs/openvla.md and docs/flow.md have commands. `--preference_rounds 4` does the preference phase four times, each on
rollouts of what the time before made; rounds after the first are `preference-2`, `preference-3`, ...
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from trl import TrlParser

from trl_stare import (
    StageDPOConfig,
    StageDPOTrainer,
    StagePPOConfig,
    StagePPOTrainer,
    StageSFTConfig,
    StageSFTTrainer,
    TokenPolicy,
    get_plan,
    make_env,
)
from trl_stare.actors import load_actor
from trl_stare.data import (
    Trajectory,
    TrajectoryFolder,
    build_pairs,
    collect_dataset,
    format_yield,
    pairs_dataset,
    save_pairs,
)
from trl_stare.data.actors import policy_actor
from trl_stare.evaluation import (
    PHASES,
    PLAIN_METHODS,
    PhaseRecords,
    build_results,
    can_film,
    evaluate,
    film_policy,
    in_round,
    phase_turn,
    read_episodes,
    save_success_and_failure,
    write_episodes,
    write_model_card,
    write_report,
    write_results,
)
from trl_stare.interfaces import ACTION_DIM
from trl_stare.policies import norm_stats
from trl_stare.policies.adapters import merge_checkpoint, whole_checkpoint
from trl_stare.runs import Stopwatch, as_number, claim_folder, last_checkpoint, make_config, set_entries
from trl_stare.tasks import import_tasks

logger = logging.getLogger("ipi")

# Every use of a seed has a range of its own: nothing that is evaluated was ever trained on.
EVAL_SEEDS, VIDEO_SEEDS, DEMO_SEEDS, PREFERENCE_SEEDS, INTERACTION_SEEDS = 0, 50_000, 100_000, 200_000, 300_000


@dataclass
class IPIArguments:
    """What to run; the fields of `imitation`, `preference` and `interaction` are those of the trainers' configurations."""

    output_dir: str = field(default="outputs/ipi", metadata={"help": "Where everything goes."})
    task: str = field(default="StackCube-v1", metadata={"help": "A registered task."})
    task_module: str | None = field(default=None, metadata={"help": "Module, or its file, of own tasks and policies."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    phases: str = field(default=",".join(PHASES), metadata={"help": "Phases to run, in this order."})
    init_checkpoint: str | None = field(default=None, metadata={"help": "Start the first phase from this checkpoint."})
    num_demonstrations: int = field(default=200, metadata={"help": "Successful demonstrations to imitate."})
    demonstration_noise: float = field(default=0.1, metadata={"help": "Share of expert steps that are mistakes."})
    preference_rounds: int = field(default=1, metadata={"help": "Times to do preference, on new rollouts each."})
    preference_starts: int = field(default=48, metadata={"help": "Initial states played for a round's pairs."})
    rollouts_per_start: int = field(default=6, metadata={"help": "Episodes per initial state."})
    max_pairs_per_start: int = field(default=4, metadata={"help": "Most pairs of a stage from one initial state."})
    both_passed: str = field(
        default="cost", metadata={"help": "Of two that passed a stage: by 'cost', or by 'later' ones."}
    )
    min_cost_gap: float = field(default=0.02, metadata={"help": "Smallest cost difference that makes a pair."})
    fill: bool = field(default=False, metadata={"help": "As many pairs of every stage, by comparing across starts."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of all phases, also in evaluation."}
    )
    eval_episodes: int = field(default=300, metadata={"help": "Held-out episodes that each phase is evaluated on."})
    video_episodes: int = field(
        default=32,
        metadata={"help": "Most episodes played to find a phase's success and failure to film; 0: no videos."},
    )
    num_envs: int = field(default=16, metadata={"help": "Environments, over all worker processes."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Worker processes; default as cores allow, or the GPU."}
    )
    image_size: int = field(default=64, metadata={"help": "Pixels of the policy's image."})
    chunk_size: int = field(default=4, metadata={"help": "Environment steps per decision."})
    visuals: str | None = field(default=None, metadata={"help": "'light' (default on a CPU) or 'stock'."})
    policy: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of the small VLA's configuration, or of `init_checkpoint`'s."}
    )
    lora: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of PEFT's LoraConfig; {}: no LoRA."})
    imitation: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of StageSFTConfig."})
    preference: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of StageDPOConfig."})
    interaction: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of StagePPOConfig."})

    def __post_init__(self):
        chosen = self.phases.split(",")
        if chosen != [phase for phase in PHASES if phase in chosen]:
            raise ValueError(f"`phases` must be some of {','.join(PHASES)} in this order, got {self.phases!r}.")
        if "imitation" not in chosen and self.init_checkpoint is None and "imitation" not in phase_records(self).done:
            raise ValueError("`init_checkpoint` must be given when the imitation phase is skipped, got None.")
        for name in (
            "num_demonstrations", "preference_rounds", "preference_starts", "eval_episodes", "chunk_size", "num_envs"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.video_episodes < 0:
            raise ValueError(f"`video_episodes` must be at least 0, got {self.video_episodes}.")
        if self.rollouts_per_start < 2:
            raise ValueError(f"`rollouts_per_start` must be at least 2 to compare any, got {self.rollouts_per_start}.")


def main(args: IPIArguments) -> None:
    """The pipeline, phase by phase; what is there already is not made again."""
    # everything that can be refused is refused before any work
    configs = {phase: trainer_config(args, phase) for phase in rounds(args, args.phases.split(","))}
    import_tasks(args.task_module)
    plan = get_plan(args.task)
    if args.init_checkpoint:
        has_tokens = hasattr(load_policy(args, args.init_checkpoint), "action_logps")
        if not has_tokens and any(getattr(config, "centered", False) for config in configs.values()):
            raise ValueError(
                "`preference.centered` must be false for a policy that samples no tokens, got true. Leave it out."
            )
    records = phase_records(args)
    # need not be said again, but rollouts and weights of one must not go on as another's
    begun_from = ("init_checkpoint",) if args.init_checkpoint is None and records.done else ()
    out = claim_folder(args.output_dir, asdict(args), free=("phases", "output_dir", "video_episodes", *begun_from))
    (out / "evaluation").mkdir(exist_ok=True)
    watch = Stopwatch(out / "timing.json")
    todo = [phase for phase in configs if phase not in records.done]
    set_seed(args.seed)

    demonstrations: Sequence[Trajectory] = []
    if "imitation" in todo and not records.is_trained("imitation"):
        with watch("demonstrations"), closing(make(args, chunk_size=1)) as env:
            demonstrations = collect_demonstrations(args, env, plan)

    with closing(make(args, chunk_size=args.chunk_size)) as env:
        for phase in todo:
            before = records.before(phase)
            checkpoint = str(out / before) if before else args.init_checkpoint
            if not records.is_trained(phase):
                with watch(f"{phase}: training"):
                    if phase == "imitation":
                        imitate(args, configs[phase], demonstrations, plan)
                    elif phase == "interaction":
                        interact(args, configs[phase], checkpoint, env, plan)
                    else:
                        prefer(args, phase, configs[phase], checkpoint, env, plan)
            with watch(f"{phase}: evaluation"):
                wall_s = watch.seconds.get(f"{phase}: training", 0.0)
                evaluate_phase(args, phase, configs[phase], env, plan, started_from=checkpoint, wall_s=wall_s)
            PartialState().wait_for_everyone()  # the next phase begins where the records say that this one ended
            report(args, watch.seconds)
        with watch("videos"):
            film(args, env, plan)
    report(args, watch.seconds)


def imitate(args: IPIArguments, config: StageSFTConfig, demonstrations: Sequence[Trajectory], plan: Any) -> None:
    """Phase 1: a new small VLA (or `init_checkpoint`) imitates the demonstrations."""
    if args.init_checkpoint:
        policy = load_policy(args, args.init_checkpoint)
    else:
        stats = norm_stats(torch.cat([d.labels for d in demonstrations]), torch.cat([d.state for d in demonstrations]))
        policy = TokenPolicy.create_tiny(
            {args.task: stats}, image_size=args.image_size, chunk_size=args.chunk_size, **args.policy
        )
    trainer = StageSFTTrainer(policy, config, demonstrations, plan, peft_config=lora_config(args))
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))
    env_steps = sum(demonstration.num_steps for demonstration in demonstrations)
    save_phase(args, "imitation", trainer, env_steps, [demonstration.seed for demonstration in demonstrations])


def prefer(args: IPIArguments, phase: str, config: StageDPOConfig, checkpoint: str, env: Any, plan: Any) -> None:
    """Phase 2, one round of it: several episodes per start, cut into stages and compared stage by stage; then StA-TPO."""
    policy, data, turn = load_policy(args, checkpoint), Path(args.output_dir) / "data", phase_turn(phase)[1]
    folder = data / in_round("rollouts", turn)
    if PartialState().is_main_process:
        # from initial states that no earlier round has seen
        collect_rollouts(args, policy, env, plan, folder, PREFERENCE_SEEDS + (turn - 1) * args.preference_starts)
    PartialState().wait_for_everyone()
    rollouts, signals = TrajectoryFolder(folder), TrajectoryFolder(folder, images=False)
    pairs = build_pairs(
        signals, plan, objective=config.objective, both_passed=args.both_passed, min_cost_gap=args.min_cost_gap,
        max_pairs_per_start=args.max_pairs_per_start, fill=args.fill, seed=args.seed,
    )  # fmt: skip
    logger.info("pairs per stage:\n%s", format_yield(pairs.yield_table))
    rows = data / in_round("_pairs", turn) / "pairs.arrow"
    if PartialState().is_main_process:
        save_pairs(pairs.pairs, data / in_round("pairs", turn))
        pairs_dataset(rollouts, pairs.pairs, file=rows)
    PartialState().wait_for_everyone()
    trainer = StageDPOTrainer(policy, config, Dataset.from_file(str(rows)), peft_config=lora_config(args))
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))
    env_steps = sum(rollout.num_steps for rollout in signals)
    pair_yield = {stage: dict(counts) for stage, counts in pairs.yield_table.items()}
    save_phase(args, phase, trainer, env_steps, [rollout.seed for rollout in signals], pair_yield=pair_yield)


def interact(args: IPIArguments, config: StagePPOConfig, checkpoint: str, env: Any, plan: Any) -> None:
    """Phase 3: StA-PPO in the simulator."""
    policy = load_policy(args, checkpoint)
    if args.lora:
        policy.model = get_peft_model(policy.model, lora_config(args))
    count = config.num_iterations * config.episodes_per_iteration
    starts = Dataset.from_dict({"seed": list(range(INTERACTION_SEEDS, INTERACTION_SEEDS + count))})
    trainer = StagePPOTrainer(policy, config, env, plan, starts)
    trainer.train(resume_from_checkpoint=True)
    if not trainer.is_finished:  # SIGTERM: the same command continues
        sys.exit(143)
    save_phase(args, "interaction", trainer, trainer.env_steps, list(starts["seed"]))


def collect_demonstrations(args: IPIArguments, env: Any, plan: Any) -> TrajectoryFolder:
    """`num_demonstrations` successful ones, from as many seeds as that takes; an interrupted collection continues."""
    data = Path(args.output_dir) / "data"
    if PartialState().is_main_process and not (data / "demonstrations").exists():
        expert = load_actor("expert", args.task, noise=args.demonstration_noise)
        collect_dataset(
            env, expert.make, data / "demonstrations", plan, episodes=args.num_demonstrations, first_seed=DEMO_SEEDS,
            seed=args.seed, successes_only=True, name=expert.name, settings={"noise": args.demonstration_noise},
        )  # fmt: skip
    PartialState().wait_for_everyone()
    return TrajectoryFolder(data / "demonstrations", cache_dir=data / "_images").light()


def collect_rollouts(
    args: IPIArguments, policy: TokenPolicy, env: Any, plan: Any, folder: Path, first_seed: int
) -> None:
    """`rollouts_per_start` episodes from each of `preference_starts` initial states; an interrupted collection continues."""
    collect_dataset(
        env, lambda generator: policy_actor(policy, temperature=args.temperature, generator=generator), folder, plan,
        episodes=args.preference_starts * args.rollouts_per_start, episodes_per_seed=args.rollouts_per_start,
        first_seed=first_seed, seed=args.seed, settings={"temperature": args.temperature},
    )  # fmt: skip


def load_policy(args: IPIArguments, checkpoint: str) -> TokenPolicy:
    """A checkpoint, refused if it acts in other chunks than the environment, or would see its pictures blown up."""
    given = args.policy if checkpoint == args.init_checkpoint else {}
    folder = whole_checkpoint(checkpoint, Path(args.output_dir) / "base", **given)
    policy = TokenPolicy.from_pretrained(folder, **given)
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    policy.keep_statistics()
    if (policy.chunk_size, policy.action_dim) != (args.chunk_size, ACTION_DIM):
        raise ValueError(
            f"`{checkpoint}` must act in chunks of {args.chunk_size} x {ACTION_DIM} values, got {policy.chunk_size} x "
            f"{policy.action_dim}. Set `chunk_size`, or use another checkpoint."
        )
    if args.image_size < (least := policy.image_size or 0):
        raise ValueError(f"`image_size` must be at least {least} for `{checkpoint}`, got {args.image_size}.")
    return policy


def save_phase(args: IPIArguments, phase: str, trainer: Any, env_steps: int, seeds: list[int], **more: Any) -> None:
    """Save the checkpoint and what its training was; the training is then done."""
    trainer.save_model(str(Path(args.output_dir) / phase))
    if args.lora and PartialState().is_main_process:
        merge_checkpoint(Path(args.output_dir) / phase)
    record = {"history": trainer.state.log_history, "env_steps": env_steps, "seeds": sorted(set(seeds)), **more}
    if PartialState().is_main_process:
        phase_records(args).write_training(phase, record)
    PartialState().wait_for_everyone()


def evaluate_phase(
    args: IPIArguments, phase: str, config: Any, env: Any, plan: Any, *, started_from: str | None, wall_s: float
) -> None:
    """Evaluate the checkpoint, as it loads, on the held-out seeds, and write its card; the phase is then done."""
    if not PartialState().is_main_process:
        return
    out, records = Path(args.output_dir), phase_records(args)
    training = records.training(phase)
    seeds = range(EVAL_SEEDS, EVAL_SEEDS + args.eval_episodes)
    result, episodes = evaluate(
        load_policy(args, str(out / phase)), env, plan, seeds,
        temperature=args.temperature, seed=args.seed, train_seeds=training["seeds"],
    )  # fmt: skip
    result = result.for_phase(checkpoint=phase, env_steps=training["env_steps"], wall_s=wall_s)
    write_episodes(out / "evaluation" / f"{phase}.jsonl", episodes)
    write_model_card(
        out / phase, phase=phase, result=result, task=args.task, visuals=env.metadata["visuals"], started_from=started_from,
        method=None if getattr(config, "stage_aware", True) else PLAIN_METHODS[phase_turn(phase)[0]],
    )  # fmt: skip
    done = {"result": result.to_dict(), "history": training["history"], "pair_yield": training.get("pair_yield")}
    records.write(phase, done)


def film(args: IPIArguments, env: Any, plan: Any) -> None:
    """A success and a failure of every finished phase, at every step and in a larger picture."""
    videos = Path(args.output_dir) / "videos"
    missing = [phase for phase in phase_records(args).done if not list(videos.glob(f"{phase}_*.mp4"))]
    if not missing or not args.video_episodes or not PartialState().is_main_process or not can_film(env):
        return
    seeds = range(VIDEO_SEEDS, VIDEO_SEEDS + args.video_episodes)
    with closing(make_env(args.task, 1, num_workers=1, chunk_size=1, image_size=256, visuals=args.visuals)) as camera:
        for phase in missing:
            policy = load_policy(args, str(Path(args.output_dir) / phase))
            replays = film_policy(policy, env, camera, plan, seeds, temperature=args.temperature, seed=args.seed)
            save_success_and_failure(videos, phase, replays)


def report(args: IPIArguments, timing: dict[str, float]) -> None:
    """Write `results.json` and the report from the phases that are done."""
    if not PartialState().is_main_process:
        return
    out, done = Path(args.output_dir), phase_records(args).read()
    phases = {phase: record["result"] for phase, record in done.items()}
    visuals = next(iter(phases.values()))["metadata"]["visuals"]
    results = build_results(task=args.task, seed=args.seed, visuals=visuals, phases=phases)
    write_results(out / "results.json", results)
    write_report(
        out,
        results,
        {phase: record["history"] for phase, record in done.items()},
        episodes={phase: read_episodes(out / "evaluation" / f"{phase}.jsonl") for phase in done},
        pair_yields={phase: record["pair_yield"] for phase, record in done.items() if record["pair_yield"]},
        timing=timing,
        notes=[
            f"Command: `accelerate launch {shlex.join(sys.argv)}`; every setting is in `config.yaml`.",
            f"Imitation saw {args.num_demonstrations} demonstrations, few enough to leave the other phases something to do."
            if "imitation" in done
            else f"Started from `{args.init_checkpoint}`.",
            f"The policy sees {args.image_size} px images and acts in chunks of {args.chunk_size} steps; it is sampled at "
            f"temperature {args.temperature} in all phases and in evaluation.",
        ],
    )


def make(args: IPIArguments, chunk_size: int) -> Any:
    """The task's environments."""
    options = {"num_workers": args.num_workers, "image_size": args.image_size, "visuals": args.visuals}
    return make_env(args.task, args.num_envs, chunk_size=chunk_size, **options)


def rounds(args: IPIArguments, phases: Sequence[str]) -> list[str]:
    """`phases` with every round of preference. Example: with three of them `["preference"]` is `["preference", "preference-2", "preference-3"]`."""
    turns = {"preference": range(1, args.preference_rounds + 1)}
    return [in_round(phase, turn) for phase in phases for turn in turns.get(phase, (1,))]


def phase_records(args: IPIArguments) -> PhaseRecords:
    """What the run has done so far."""
    return PhaseRecords(Path(args.output_dir) / "evaluation", rounds(args, PHASES))


def trainer_config(args: IPIArguments, phase: str) -> Any:
    """The trainer's own configuration, with what the pipeline decides."""
    kind, _ = phase_turn(phase)
    cls = {"imitation": StageSFTConfig, "preference": StageDPOConfig, "interaction": StagePPOConfig}[kind]
    own = {name: as_number(value) for name, value in getattr(args, kind).items()}
    given = {"report_to": "none", "seed": args.seed, "use_cpu": not torch.cuda.is_available(), **own}
    for name in ("temperature", "eval_temperature"):
        if name in own:
            raise ValueError(f"`{kind}` must not have its own {name}, got {own[name]}. Use `temperature`.")
    given |= {} if kind == "imitation" else {"temperature": args.temperature}
    return make_config(cls, kind, output_dir=str(Path(args.output_dir) / phase / "training"), **given)


def lora_config(args: IPIArguments) -> LoraConfig | None:
    """Adapters on all linear layers, unless `lora` says where."""
    return LoraConfig(**{"target_modules": "all-linear"} | args.lora) if args.lora else None


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(set_entries(*TrlParser(IPIArguments).parse_args_and_config(return_remaining_strings=True)))
