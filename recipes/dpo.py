"""StA-TPO on stored trajectories and stage pairs, for any checkpoint: one process or many.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/dpo.py --model outputs/ipi/imitation \
        --trajectories data/rollouts --preferences data/pairs --output_dir outputs/dpo --step_micro_batch_size 32 \
        --centered true --learning_rate 1e-4
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/dpo.py --model user/policy --model_revision v1 \
        --trajectories user/stackcube-pairs --revision v1 --output_dir outputs/dpo --step_micro_batch_size 32

All data are checked before anything else is done. Episodes stay on disk; the rows that are trained on are written to
`output_dir/_pairs` and mapped from there, with the reference's scores beside them.

`ddp.yaml`, `fsdp.yaml`, `zero2.yaml` and `zero3.yaml` with `--num_processes N` train on N GPUs, or on a CPU in N processes. Every field of
`StageDPOConfig` is a flag (`--loss_type ipo --objective tpo-mean`), or a line of a file given as `--config FILE`; LoRA is
`--use_peft --lora_target_modules q_proj v_proj`; an adapter that `--model` brings along is first merged, into `OUTPUT_DIR/base`.
The same command with the same `--output_dir` continues where it stopped.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig, TrlParser

from trl_stare import StageDPOConfig, StageDPOTrainer, TokenPolicy
from trl_stare.checkpoints import checkpoint_folder
from trl_stare.data import (
    TrajectoryFolder,
    check_traces,
    load_pairs,
    pairs_dataset,
    stored_settings,
    validate_dataset,
)
from trl_stare.data.hub import find_dataset
from trl_stare.evaluation import file_digests
from trl_stare.files import dataset_digest
from trl_stare.policies.adapters import whole_checkpoint
from trl_stare.runs import claim_checkpoint, training_settings
from trl_stare.tasks import import_tasks
from trl_stare.trainers import adapter_settings, get_policy_peft_config

logger = logging.getLogger("dpo")

FREE = ("task_module", "model", "trajectories", "preferences", "revision")
"""May differ when a run is continued: checkpoint and data are known by what is in them, wherever they are."""


@dataclass
class DPOArguments:
    """What to train on what; how is said by `StageDPOConfig` and TRL's `ModelConfig`."""

    model: str = field(metadata={"help": "Checkpoint that is trained and is its own reference (folder or Hub id)."})
    trajectories: str = field(
        metadata={"help": "Folder of trajectories (see `recipes/collect.py`), or dataset repository on the Hub."}
    )
    preferences: str | None = field(
        default=None, metadata={"help": "Folder of their pairs (see `recipes/pairs.py`); default the repository's."}
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the dataset repository."})
    task_module: str | None = field(
        default=None, metadata={"help": "Module, or its file, that registers tasks and policies of your own."}
    )
    unnorm_key: str | None = field(
        default=None, metadata={"help": "Which of the checkpoint's statistics; not needed where there is one."}
    )


def main(args: DPOArguments, config: StageDPOConfig, model_args: ModelConfig) -> None:
    """Train, and save to `output_dir`."""
    import_tasks(args.task_module)
    set_seed(config.seed)  # LoRA's first weights are random
    peft_config = get_policy_peft_config(model_args)
    first = PartialState().is_local_main_process
    with PartialState().local_main_process_first():
        trajectories, preferences = find_data(args)
        if first:
            validate_dataset(trajectories, preferences)
            warn_of_other_temperatures(trajectories, config.temperature)
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    checkpoint = whole_checkpoint(
        args.model, Path(config.output_dir) / "base", args.unnorm_key, revision=model_args.model_revision, **options
    )
    # by all processes at once: ZeRO-3 divides the weights among them
    policy = TokenPolicy.from_pretrained(checkpoint, args.unnorm_key, **options)
    settings = training_settings(config) | asdict(args) | {"adapter": adapter_settings(model_args)}
    settings["weights"] = file_digests(checkpoint_folder(args.model, model_args.model_revision))
    settings["data"] = [dataset_digest(trajectories), dataset_digest(preferences)]
    rows = Path(config.output_dir) / "_pairs" / "pairs.arrow"
    with PartialState().local_main_process_first():
        if first:
            episodes = TrajectoryFolder(trajectories)
            check_traces(episodes, policy)
        # before another run's pairs are written over
        begun = claim_checkpoint(config.output_dir, settings, free=FREE)
        if first:
            pairs_dataset(episodes, load_pairs(preferences), file=rows)
    trainer = StageDPOTrainer(policy, config, Dataset.from_file(str(rows)), peft_config=peft_config)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or begun)
    trainer.save_model(config.output_dir)
    trainer.end()


def find_data(args: DPOArguments) -> tuple[Path, Path]:
    """The folders of trajectories and pairs."""
    trajectories, preferences = find_dataset(args.trajectories, args.preferences, revision=args.revision)
    if preferences is None:
        raise ValueError(f"`preferences` must be given, got None, and {args.trajectories!r} has none of its own.")
    return trajectories, preferences


def warn_of_other_temperatures(trajectories: Path, temperature: float) -> None:
    """Pairs say what a policy should do that is sampled as their episodes were."""
    notes = [note.get("collection", {}) for note in stored_settings(trajectories)[1]]
    others = sorted({note["temperature"] for note in notes if note.get("temperature", temperature) != temperature})
    if others:
        logger.warning(
            "`temperature` should be that of the rollouts, %s, got %s. Give `--temperature`.",
            " and ".join(map(str, others)),
            temperature,
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*TrlParser((DPOArguments, StageDPOConfig, ModelConfig)).parse_args_and_config())
