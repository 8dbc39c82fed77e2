"""Imitation of stored demonstrations by any checkpoint: of all its weights, or by a LoRA that is merged into them at the end.

    python recipes/collect.py --task PutCarrotOnPlateInScene-v1 --episodes 140 --noise 0.08 --successes_only --image_size 224 \
        --output_dir data/carrot
    accelerate launch recipes/sft.py --config recipes/configs/openvla_7b_bridge_sft.yaml --demonstrations data/carrot \
        --output_dir outputs/carrot/sft

`--unnorm_key` says which of a published checkpoint's statistics scale the actions, `--new_statistics` takes them from the
demonstrations (another robot); what is saved holds these only, so that no later command needs a key. What LeRobot wrote (pi0) has
neither tokenizer nor statistics: `--tokenizer` names the one, the others are the demonstrations'. The same command with the same
`--output_dir` continues where it stopped. Pictures are mapped from the cache of `datasets`, a copy as large as the demonstrations
(`HF_DATASETS_CACHE` says where).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, TrlParser

from trl_stare import StageSFTConfig, StageSFTTrainer, TokenPolicy, get_plan
from trl_stare.checkpoints import checkpoint_folder
from trl_stare.data import TrajectoryFolder
from trl_stare.evaluation import file_digests
from trl_stare.files import dataset_digest
from trl_stare.policies import load_lerobot_policy, quantile_statistics
from trl_stare.policies.adapters import merge_adapter, whole_checkpoint
from trl_stare.policies.conventions import get_convention
from trl_stare.policies.pretrained import vla_settings
from trl_stare.runs import claim_checkpoint, set_entries, training_settings
from trl_stare.tasks import import_tasks
from trl_stare.trainers import adapter_settings, get_policy_peft_config

FREE = ("task_module", "model", "demonstrations")
"""May differ when a run is continued: checkpoint and demonstrations are known by what is in them, wherever they are."""


@dataclass
class SFTArguments:
    """Who imitates what; how is said by `StageSFTConfig` and TRL's `ModelConfig`."""

    model: str = field(metadata={"help": "Checkpoint to start from (folder or Hub id)."})
    demonstrations: str = field(metadata={"help": "Folder of demonstrations (see `recipes/collect.py`)."})
    unnorm_key: str | None = field(
        default=None, metadata={"help": "Which of the checkpoint's statistics; not needed where there is one."}
    )
    new_statistics: bool = field(
        default=False, metadata={"help": "Scale actions by the demonstrations, not by the checkpoint's statistics."}
    )
    action_convention: str | None = field(
        default=None, metadata={"help": "How actions become robot units, e.g. 'bridge'; default the checkpoint's."}
    )
    oft: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of `OFTSettings`: decide on a chunk in one forward pass."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Of a checkpoint that LeRobot wrote, e.g. 'google/paligemma-3b-pt-224' for pi0."},
    )
    lerobot: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Settings of such a checkpoint, e.g. `chunk_size`, `num_inference_steps`."},
    )
    task_module: str | None = field(
        default=None, metadata={"help": "Module, or its file, that registers tasks and policies of your own."}
    )


def main(args: SFTArguments, config: StageSFTConfig, model_args: ModelConfig) -> None:
    """Train, merge the adapter where there is one, and save to `output_dir`."""
    import_tasks(args.task_module)
    peft_config = get_policy_peft_config(model_args)
    if peft_config is not None and is_deepspeed_zero3_enabled():
        raise ValueError(
            "`use_peft` must be false under ZeRO-3, got true: no process has all weights to merge. Use `zero2.yaml`."
        )
    set_seed(config.seed)  # LoRA's first weights are random
    shown = TrajectoryFolder(args.demonstrations)
    policy = load(args, model_args, Path(config.output_dir))
    trainer = StageSFTTrainer(policy, config, shown, get_plan(shown[0].task), peft_config=peft_config)
    settings = training_settings(config) | asdict(args) | {"adapter": adapter_settings(model_args)}
    settings["weights"] = file_digests(checkpoint_folder(args.model, model_args.model_revision))
    settings["data"] = dataset_digest(args.demonstrations)
    checkpoint = claim_checkpoint(config.output_dir, settings, free=FREE)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or checkpoint)
    if peft_config is None:
        trainer.save_model(config.output_dir)
    elif PartialState().is_main_process:
        policy.model = merge_adapter(policy.model)
        policy.save_pretrained(config.output_dir)
    PartialState().wait_for_everyone()


def load(args: SFTArguments, model_args: ModelConfig, folder: Path) -> TokenPolicy:
    """The checkpoint with the settings that were given, and with one set of statistics; what is merged for it goes to `folder`."""
    options: dict[str, Any] = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if args.tokenizer is not None:
        convention = args.action_convention or "identity"
        return load_lerobot_policy(
            args.model,
            tokenizer=AutoTokenizer.from_pretrained(args.tokenizer),
            norm_stats=statistics_of(args, convention, "state"),
            settings=args.lerobot | {"flow": args.lerobot.get("flow", {}) | {"action_convention": convention}},
            revision=model_args.model_revision,
            **options,
        )
    checkpoint = whole_checkpoint(
        args.model, folder / "base", args.unnorm_key, revision=model_args.model_revision, **options
    )
    changes: dict[str, Any] = {"oft": args.oft} if args.oft else {}
    if args.action_convention is not None or args.new_statistics:
        changes |= changes_of_actions(args, AutoConfig.from_pretrained(checkpoint))
    key = None if args.new_statistics else args.unnorm_key
    policy = TokenPolicy.from_pretrained(checkpoint, key, **options, **changes)
    policy.keep_statistics()
    return policy


def changes_of_actions(args: SFTArguments, config: Any) -> dict[str, Any]:
    """How the checkpoint with this `config` is to act from now on: by another convention, or scaled by the demonstrations."""
    settings = vla_settings(config)
    if "action_convention" not in settings:
        raise ValueError(
            f"`model` must have an `action_convention`, got a {config.model_type!r} without. Leave out `action_convention` and "
            "`new_statistics`."
        )
    convention = args.action_convention or settings["action_convention"]
    statistics = {"norm_stats": statistics_of(args, convention, "proprio")} if args.new_statistics else {}
    return {"action_convention": convention} | statistics


def statistics_of(args: SFTArguments, convention: str, state_key: str) -> dict[str, Any]:
    """Of what the demonstrations did and of proprioception (under `state_key`), under the task's name."""
    shown = TrajectoryFolder(args.demonstrations, images=False)
    robot, labels = get_convention(convention), torch.cat([demonstration.labels for demonstration in shown])
    actions = quantile_statistics(labels if robot is None else robot.from_robot(labels))
    actions["mask"][-1] = False  # the gripper opens and closes, nothing between: OpenVLA leaves it as it is
    state = quantile_statistics(torch.cat([demonstration.state for demonstration in shown]))
    return {shown[0].task: {"action": actions, state_key: state}}


def parse() -> tuple[SFTArguments, StageSFTConfig, ModelConfig]:
    """`--config FILE` and flags over it, also of the entries of `oft` and `lerobot`: `--oft.chunk_size 8`."""
    parser = TrlParser((SFTArguments, StageSFTConfig, ModelConfig))
    args, config, model_args, flags = parser.parse_args_and_config(return_remaining_strings=True)
    return set_entries(args, flags), config, model_args


if __name__ == "__main__":
    main(*parse())
