"""StA-PPO in the simulator, for any checkpoint: one process or many.

    accelerate launch recipes/ppo.py --model outputs/ipi/preference --output_dir outputs/ppo --num_train_epochs 20
    accelerate launch recipes/ppo.py --config recipes/configs/ppo_smoke.yaml --output_dir outputs/ppo_smoke
    accelerate launch --config_file recipes/accelerate/cpu2.yaml --max_restarts 2 recipes/ppo.py --config recipes/configs/ppo_smoke.yaml

Every field of `StagePPOConfig` is a flag (`--stage_aware False` is plain PPO), or a line of a file given as `--config FILE`. The
same command with the same `--output_dir` continues where it stopped: killed at any moment, the run ends with the same weights.
LoRA is `--use_peft --lora_target_modules all-linear`; an adapter that `--model` brings along is first merged, into `OUTPUT_DIR/base`.
The trained policy is in `OUTPUT_DIR/policy`, with its evaluation on its card; the episodes it learned from are listed in
`OUTPUT_DIR/episodes.jsonl`. Several processes, and what is in that file: docs/interaction.md.
"""

import logging
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed
from trl import ModelConfig, TrlParser

from trl_stare import (
    StagePPOConfig,
    StagePPOTrainer,
    StageSFTConfig,
    StageSFTTrainer,
    TokenPolicy,
    evaluate,
    get_plan,
    make_env,
)
from trl_stare.actors import load_actor
from trl_stare.checkpoints import checkpoint_folder
from trl_stare.data import TrajectoryFolder, collect_dataset
from trl_stare.evaluation import PLAIN_METHODS, file_digests, write_episodes, write_model_card
from trl_stare.policies import norm_stats
from trl_stare.policies.adapters import whole_checkpoint
from trl_stare.runs import claim_checkpoint, claim_folder, set_entries, training_settings
from trl_stare.tasks import import_tasks
from trl_stare.trainers import adapter_settings, get_policy_peft_config, preset_fields

logger = logging.getLogger("ppo")

# Every use of a seed has a range of its own, as in recipes/ipi.py: nothing that is evaluated was ever trained on.
EVAL_SEEDS, DEMO_SEEDS, TRAIN_SEEDS = 0, 100_000, 300_000
NEW_IMAGE_SIZE = 64
"""Pixels of a side of the pictures of a new small VLA."""
FREE = ("eval_episodes", "num_envs", "num_workers", "task_module", "model")
"""May differ when a run is continued; the checkpoint is known by its files, wherever they are."""
IMITATED = ("task", "demonstrations", "imitation", "image_size", "chunk_size", "visuals")
"""What a new small VLA is made of."""


@dataclass
class PresetArguments:
    """What has to be known before a `StagePPOConfig` can be made."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Named settings below the file and the flags: 'rl4vla-7b', 'small-cpu', or 'small-cpu-rare' where hardly an episode succeeds yet."
        },
    )


@dataclass
class PPOArguments(PresetArguments):
    """What to train where; how is said by `StagePPOConfig`."""

    model: str | None = field(default=None, metadata={"help": "Checkpoint to start from (folder or Hub id)."})
    demonstrations: int = field(
        default=0, metadata={"help": "Without `model`: a new small VLA that has imitated so many demonstrations."}
    )
    imitation: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of StageSFTConfig for that imitation."}
    )
    task: str = field(default="StackCube-v1", metadata={"help": "A registered task."})
    task_module: str | None = field(
        default=None, metadata={"help": "Module, or its file, of your own tasks and policies."}
    )
    unnorm_key: str | None = field(
        default=None, metadata={"help": "Which of the checkpoint's statistics; not needed where there is one."}
    )
    num_envs: int = field(default=16, metadata={"help": "Environments of each process, over its workers."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Workers of each process; default as cores allow, or the GPU."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels; default what `model` reads, or 64 for a new small VLA."}
    )
    chunk_size: int = field(default=4, metadata={"help": "Steps per decision of a new small VLA."})
    visuals: str | None = field(default=None, metadata={"help": "'light' (default on a CPU) or 'stock'."})
    num_starts: int = field(default=100_000, metadata={"help": "Episode starts to train on, taken in order."})
    eval_episodes: int = field(default=100, metadata={"help": "Held-out episodes of the final evaluation."})

    def __post_init__(self):
        if (self.model is None) == (self.demonstrations < 1):
            raise ValueError(
                f"one of `model` and `demonstrations` must be given, got {self.model!r} and {self.demonstrations}."
            )


def main(args: PPOArguments, config: StagePPOConfig, model_args: ModelConfig) -> None:
    """Train, save, evaluate."""
    import_tasks(args.task_module)
    plan, out = get_plan(args.task), Path(config.output_dir)
    if args.model is None:
        claim_folder(out / "imitated", {name: getattr(args, name) for name in IMITATED} | {"seed": config.seed})
        if not (out / "initial").exists():
            imitate(args, config, plan)
    set_seed(config.seed)
    policy = load(args, model_args, out)
    starts = Dataset.from_dict({"seed": range(TRAIN_SEEDS, TRAIN_SEEDS + args.num_starts)})
    held_out = Dataset.from_dict({"seed": range(EVAL_SEEDS, EVAL_SEEDS + args.eval_episodes)})
    with closing(make(args, policy.chunk_size, args.image_size or policy.image_size)) as env:
        trainer = StagePPOTrainer(policy, config, env, plan, starts, held_out)
        weights = {} if args.model is None else file_digests(checkpoint_folder(args.model, model_args.model_revision))
        settings = training_settings(config) | asdict(args) | {"weights": weights}
        settings["adapter"] = adapter_settings(model_args)
        claim_checkpoint(out, settings, free=FREE)
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or True)
        if trainer.is_finished:
            trainer.save_model(str(out / "policy"))
            if trainer.is_world_process_zero():
                report(args, config, trainer)
    trainer.end()


def load(args: PPOArguments, model_args: ModelConfig, out: Path) -> TokenPolicy:
    """The checkpoint, under a new adapter if one was asked for."""
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    checkpoint = whole_checkpoint(
        args.model or out / "initial", out / "base", args.unnorm_key, revision=model_args.model_revision, **options
    )
    policy = TokenPolicy.from_pretrained(checkpoint, args.unnorm_key, **options)
    if (peft_config := get_policy_peft_config(model_args)) is not None:
        policy.model = get_peft_model(policy.model, peft_config)
    return policy


def imitate(args: PPOArguments, config: StagePPOConfig, plan: Any) -> None:
    """`initial`: a small VLA, new but for having imitated a few scripted demonstrations, which also give its statistics."""
    out, state = Path(config.output_dir), PartialState()
    if state.is_main_process and not (out / "demonstrations").exists():
        with closing(make(args, chunk_size=1, image_size=args.image_size or NEW_IMAGE_SIZE)) as env:
            collect_dataset(
                env, load_actor("expert", args.task).make, out / "demonstrations", plan,
                episodes=args.demonstrations, first_seed=DEMO_SEEDS, successes_only=True, name="expert",
            )  # fmt: skip
    state.wait_for_everyone()
    shown = TrajectoryFolder(out / "demonstrations", cache_dir=out / "_images").light()
    stats = norm_stats(torch.cat([d.labels for d in shown]), torch.cat([d.state for d in shown]))
    set_seed(config.seed)
    policy = TokenPolicy.create_tiny(
        {args.task: stats}, image_size=args.image_size or NEW_IMAGE_SIZE, chunk_size=args.chunk_size
    )
    given = {"save_strategy": "no", "report_to": "none", "use_cpu": config.use_cpu, "seed": config.seed}
    trainer = StageSFTTrainer(policy, StageSFTConfig(str(out / "imitation"), **given | args.imitation), shown, plan)
    trainer.train()
    trainer.save_model(str(out / "imitation"))
    if state.is_main_process:
        (out / "imitation").rename(out / "initial")  # there whole or not at all
    state.wait_for_everyone()


def report(args: PPOArguments, config: StagePPOConfig, trainer: StagePPOTrainer) -> None:
    """Evaluate the policy as it loads, and write its card."""
    env, folder = trainer.env, Path(config.output_dir) / "policy"
    policy = TokenPolicy.from_pretrained(folder, args.unnorm_key)
    policy.model.eval().to(trainer.args.device)
    result, episodes = evaluate(
        policy, env, trainer.plan, trainer.eval_dataset["seed"],
        temperature=config.evaluation_temperature, seed=config.seed, train_seeds=trainer.train_dataset["seed"],
    )  # fmt: skip
    # not `train_runtime`, which is of the last session
    wall_s = sum(logs.get("time/iteration_s", 0.0) for logs in trainer.state.log_history)
    write_episodes(folder / "evaluation.jsonl", episodes)
    write_model_card(
        folder,
        phase="interaction",
        result=result.for_phase(checkpoint="policy", env_steps=trainer.env_steps, wall_s=wall_s),
        task=args.task,
        visuals=env.metadata["visuals"],
        started_from=args.model or f"a small VLA that imitated {args.demonstrations} scripted demonstrations",
        method=None if config.stage_aware else PLAIN_METHODS["interaction"],
    )
    logger.info("success_once %.3f of %d held-out episodes", result.success_once, len(episodes))


def make(args: PPOArguments, chunk_size: int, image_size: int | None) -> Any:
    """The task's environments."""
    return make_env(
        args.task,
        args.num_envs,
        num_workers=args.num_workers,
        chunk_size=chunk_size,
        image_size=image_size,
        visuals=args.visuals,
    )


def parse() -> tuple[PPOArguments, StagePPOConfig, ModelConfig]:
    """`--config FILE`, flags over it, and the preset below both.

    Which preset is read first and alone: without it the other settings need not make a valid `StagePPOConfig`.
    """
    chosen, *_ = TrlParser(PresetArguments, add_help=False).parse_args_and_config(return_remaining_strings=True)
    parser = TrlParser((PPOArguments, StagePPOConfig, ModelConfig))
    if chosen.preset is not None:
        parser.set_defaults(**preset_fields(chosen.preset))
    args, config, model_args, flags = parser.parse_args_and_config(return_remaining_strings=True)
    if config.push_to_hub:
        raise ValueError(
            "`push_to_hub` must be false, got true: the policy will be in `output_dir`/policy, apart from its data. "
            f"Train, then run: hf upload {config.hub_model_id or 'user/name'} {config.output_dir}/policy"
        )
    return set_entries(args, flags), config, model_args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*parse())
