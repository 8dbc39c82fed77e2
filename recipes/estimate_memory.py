"""What a run of an OpenVLA under a LoRA takes of a GPU's memory, before anything is loaded.

    python recipes/estimate_memory.py --config recipes/configs/openvla_7b_bridge_ppo.yaml
    python recipes/estimate_memory.py --config recipes/configs/openvla_oft_bridge_sft.yaml --update_batch 16 --num_shards 4

Fields of the configuration that it knows (`lora_r`, `num_envs`, `gradient_checkpointing`, `oft`) are taken from the file; of the rest
only what would make another table is read, and refused: another model than an OpenVLA, adapters on some of the layers. What is not in
the table: temporaries, the allocator's gaps and the CUDA context, together some gigabytes.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from trl import TrlParser

from trl_stare import OpenVLAConfig
from trl_stare.policies import MemoryEstimate, estimate_memory

logger = logging.getLogger("estimate_memory")

OPENVLA_7B = "openvla/openvla-7b"


@dataclass
class MemoryArguments:
    """Which model, and how much of what at once."""

    sizes_of: str = field(
        default=OPENVLA_7B,
        metadata={"help": "Checkpoint whose sizes count; only its config is read, openvla-7b's is known."},
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA on all linear layers."})
    update_batch: int = field(default=8, metadata={"help": "Decisions of one micro-batch of an update."})
    num_envs: int = field(default=64, metadata={"help": "Environments of each process: decisions made at once."})
    prompt_tokens: int = field(default=32, metadata={"help": "Tokens of the prompt without the image."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers in the backward pass."})
    num_shards: int = field(default=1, metadata={"help": "GPUs that weights are divided among; 1 for DDP."})
    oft: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of `OFTSettings`."})
    lerobot: dict[str, Any] = field(default_factory=dict, metadata={"help": "Not known: see docs/flow.md for pi0."})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "Nothing else is known."})

    def __post_init__(self):
        if self.lerobot:
            raise ValueError(
                "`config` must be of an OpenVLA, got one with `lerobot`. See docs/flow.md for what pi0 takes."
            )
        if self.lora_target_modules != "all-linear":
            raise ValueError(
                f"`lora_target_modules` must be 'all-linear', got {self.lora_target_modules!r}: the table is for these only."
            )


def main(args: MemoryArguments) -> MemoryEstimate:
    """Log the table."""
    config = OpenVLAConfig() if args.sizes_of == OPENVLA_7B else AutoConfig.from_pretrained(args.sizes_of)
    if not isinstance(config, OpenVLAConfig):
        raise ValueError(f"`sizes_of` must be an OpenVLA, got {config.model_type!r} in {args.sizes_of}.")
    config.oft = args.oft or config.oft
    estimate = estimate_memory(
        config,
        lora_rank=args.lora_r,
        update_batch=args.update_batch,
        rollout_batch=args.num_envs,
        prompt_tokens=args.prompt_tokens,
        gradient_checkpointing=args.gradient_checkpointing,
        num_shards=args.num_shards,
    )
    rows = {
        "weights (bfloat16)": estimate.weights,
        f"adapters (LoRA, r {args.lora_r}, float32)": estimate.adapters,
        "gradients": estimate.gradients,
        "optimiser (AdamW)": estimate.optimizer,
        f"activations (update of {args.update_batch} decisions)": estimate.activations,
        f"KV cache (rollout of {args.num_envs} environments)": estimate.kv_cache,
        "largest sum": estimate.peak,
    }
    lines = [f"| {name} | {size / 1e9:.2f} |" for name, size in rows.items()]
    logger.info("\n".join(["| on each GPU | GB |", "|---|---|", *lines]))
    return estimate


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(TrlParser(MemoryArguments).parse_args_and_config(return_remaining_strings=True)[0])
