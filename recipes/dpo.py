"""StA-TPO on stored trajectories and stage pairs, for any checkpoint: one process or many.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/dpo.py --model outputs/ipi/imitation \
        --trajectories data/rollouts --preferences data/pairs --output_dir outputs/dpo --step_micro_batch_size 32

`ddp.yaml`, `zero2.yaml` and `zero3.yaml` with `--num_processes N` train on N GPUs, or on a CPU in N processes. Every field of
`StageDPOConfig` is a flag (`--loss_type ipo --objective tpo-mean`), or a line of a file given as `--config FILE`; LoRA is
`--use_peft --lora_target_modules q_proj v_proj`. The same command with the same `--output_dir` continues where it stopped.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config

from trl_stare import StageDPOConfig, StageDPOTrainer, TokenPolicy
from trl_stare.data import load_pairs, load_trajectories, pairs_dataset


@dataclass
class DPOArguments:
    """What to train on what; how is said by `StageDPOConfig` and TRL's `ModelConfig`."""

    model: str = field(metadata={"help": "Checkpoint that is trained and is its own reference (folder or Hub id)."})
    trajectories: str = field(metadata={"help": "Folder of `save_trajectories`."})
    preferences: str = field(metadata={"help": "Folder of `save_pairs`, made from these trajectories."})
    unnorm_key: str | None = field(
        default=None, metadata={"help": "Which of the checkpoint's statistics; not needed where there is one."}
    )


def main(args: DPOArguments, config: StageDPOConfig, model_args: ModelConfig) -> None:
    """Train, and save to `output_dir`."""
    set_seed(config.seed)  # LoRA's first weights are random
    policy = TokenPolicy.from_pretrained(
        args.model,
        args.unnorm_key,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    )
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.task_type = None  # PEFT's tasks are those of text models
    pairs = pairs_dataset(load_trajectories(args.trajectories), load_pairs(args.preferences))
    trainer = StageDPOTrainer(policy, config, pairs, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or last_whole_checkpoint(config.output_dir))
    trainer.save_model(config.output_dir)
    trainer.end()


def last_whole_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that has its state, which is written last: a run killed while saving leaves one without."""
    whole = [file.parent for file in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


if __name__ == "__main__":
    main(*TrlParser((DPOArguments, StageDPOConfig, ModelConfig)).parse_args_and_config())
