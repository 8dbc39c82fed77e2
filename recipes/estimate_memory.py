"""What a run of an OpenVLA or a pi0 under a LoRA takes of a GPU's memory, before anything is loaded.

    python recipes/estimate_memory.py --config recipes/configs/openvla_7b_bridge_ppo.yaml
    python recipes/estimate_memory.py --config recipes/configs/openvla_oft_bridge_sft.yaml --update_batch 16 --num_shards 4
    python recipes/estimate_memory.py --config recipes/configs/pi0_bridge_ppo.yaml --sizes_of lerobot/pi0_base --chunk_size 5

Fields of the configuration that it knows (`lora_r`, `lora_target_modules`, `num_envs`, `gradient_checkpointing`, `oft`, `lerobot`) are taken
from the file; what would make a table of something else is refused: of an OpenVLA, adapters on some of the layers. What is not in the
table: temporaries, the allocator's gaps and the CUDA context, together some gigabytes.
"""

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PI0Config
from trl import TrlParser

from trl_stare import OpenVLAConfig
from trl_stare.policies import MemoryEstimate, estimate_flow_memory, estimate_memory

logger = logging.getLogger("estimate_memory")

OPENVLA_7B, PI0_BASE = "openvla/openvla-7b", "lerobot/pi0_base"
KNOWN = {OPENVLA_7B: OpenVLAConfig, PI0_BASE: PI0Config}


@dataclass
class MemoryArguments:
    """Which model, and how much of what at once."""

    sizes_of: str | None = field(
        default=None,
        metadata={
            "help": f"Checkpoint whose sizes count; only its config is read. {OPENVLA_7B} and {PI0_BASE} are known."
        },
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA."})
    update_batch: int = field(default=8, metadata={"help": "Decisions of one micro-batch of an update."})
    num_envs: int = field(default=64, metadata={"help": "Environments of each process: decisions made at once."})
    prompt_tokens: int = field(default=32, metadata={"help": "Tokens of the prompt without the image."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers in the backward pass."})
    num_shards: int = field(default=1, metadata={"help": "GPUs that weights are divided among; 1 for DDP."})
    oft: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of `OFTSettings`."})
    lerobot: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of `PI0Config`; a file that has them is of pi0."}
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "Steps of pi0's chunk; the published 50 by default."}
    )
    score_draws: int = field(default=1, metadata={"help": "Of a flow policy's preferences; 4 by default there."})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "As PEFT reads it."})

    def read_config(self) -> OpenVLAConfig | PI0Config:
        """The sizes, with the changes that were given.

        Raises:
            ValueError: neither an OpenVLA nor a pi0, or something of one asked of the other.
        """
        name = self.sizes_of or (PI0_BASE if self.lerobot else OPENVLA_7B)
        config = KNOWN[name]() if name in KNOWN else AutoConfig.from_pretrained(name)
        if isinstance(config, PI0Config):
            if self.oft or self.gradient_checkpointing:
                raise ValueError(f"`oft` and `gradient_checkpointing` must be left out for pi0, got {name}.")
            chunk = {} if self.chunk_size is None else {"chunk_size": self.chunk_size}
            for key, value in (self.lerobot | chunk).items():
                setattr(config, key, value)
        elif isinstance(config, OpenVLAConfig):
            if self.lerobot or self.lora_target_modules != "all-linear":
                raise ValueError(
                    f"`lora_target_modules` must be 'all-linear' for {name}, and `lerobot` left out, got {self.lora_target_modules!r} "
                    f"and {self.lerobot}. A configuration of pi0 may need `--sizes_of {PI0_BASE}`."
                )
            config.oft = self.oft or config.oft
        else:
            raise ValueError(f"`sizes_of` must be an OpenVLA or a pi0, got {config.model_type!r} in {name}.")
        return config


def estimate(args: MemoryArguments) -> MemoryEstimate:
    """By the function for the model."""
    config = args.read_config()
    sizes = {"lora_rank": args.lora_r, "update_batch": args.update_batch, "rollout_batch": args.num_envs}
    sizes |= {"prompt_tokens": args.prompt_tokens, "num_shards": args.num_shards}
    if isinstance(config, PI0Config):
        own = {"target_modules": args.lora_target_modules, "num_draws": args.score_draws}
        return estimate_flow_memory(config, **sizes, **own)
    return estimate_memory(config, **sizes, gradient_checkpointing=args.gradient_checkpointing)


def main(args: MemoryArguments) -> MemoryEstimate:
    """Log the table."""
    found = estimate(args)
    rows = {
        "weights (bfloat16)": found.weights,
        f"adapters (LoRA, r {args.lora_r}, float32)": found.adapters,
        "gradients": found.gradients,
        "optimiser (AdamW)": found.optimizer,
        f"activations (update of {args.update_batch} decisions)": found.activations,
        f"KV cache (rollout of {args.num_envs} environments)": found.kv_cache,
        "largest sum": found.peak,
    }
    lines = [f"| {name} | {size / 1e9:.2f} |" for name, size in rows.items()]
    logger.info("\n".join(["| on each GPU | GB |", "|---|---|", *lines]))
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments, others = TrlParser(MemoryArguments).parse_args_and_config(return_remaining_strings=True)
    # fields of the file that are of no use here are among the others, flags must not be
    unknown = [name for name in others if name.startswith("--") and name in sys.argv]
    if unknown:
        raise SystemExit(f"unknown flags: {' '.join(unknown)}")
    main(arguments)
