"""The small VLA behind the policy protocol."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trl_stare.interfaces import Observation
from trl_stare.policies.action_tokens import ActionBins
from trl_stare.policies.normalization import select_statistics
from trl_stare.policies.tiny.configuration import StareVLAConfig
from trl_stare.policies.tiny.modeling import StareVLAForActionPrediction
from trl_stare.policies.tiny.processing import StareVLAImageProcessor, StareVLAProcessor, build_tokenizer
from trl_stare.policies.token_policy import TokenPolicy


class StareVLAPolicy(TokenPolicy, model_type="stare_vla"):
    """A [`TokenPolicy`] over [`StareVLAForActionPrediction`], which decides on a whole chunk in one forward pass.

    Args:
        model ([`StareVLAForActionPrediction`]): its config holds `norm_stats`.
        processor ([`StareVLAProcessor`]): makes `input_ids` and `pixel_values`.
        unnorm_key (`str`, *optional*): which statistics to use; may be left out where the checkpoint has only one.

    Raises:
        ValueError: if `unnorm_key` is unknown (lists the known ones) or the statistics do not fit the model.
    """

    def __init__(self, model: Any, processor: Any, unnorm_key: str | None = None):
        config = model.config
        unnorm_key = select_statistics(config.norm_stats, unnorm_key)
        stats = config.norm_stats[unnorm_key]
        bins = ActionBins(
            scale=torch.tensor(stats["action"]["scale"]), num_bins=config.num_bins, action_dim=config.action_dim
        )
        super().__init__(
            model,
            processor,
            bins,
            chunk_size=config.chunk_size,
            action_dim=config.action_dim,
            unnorm_key=unnorm_key,
        )
        self.state_mean = torch.tensor(stats["state"]["mean"])
        self.state_std = torch.tensor(stats["state"]["std"])
        if len(self.state_mean) != config.state_size or not (self.state_std > 0).all():
            raise ValueError(
                f"`norm_stats[{unnorm_key!r}]['state']` must hold {config.state_size} means and positive std, got "
                f"{self.state_mean.tolist()} and {self.state_std.tolist()}."
            )
        self._tokenize = lru_cache(maxsize=256)(self._tokenize_one)

    @classmethod
    def create_tiny(
        cls,
        norm_stats: dict[str, Any],
        *,
        image_size: int = 64,
        chunk_size: int = 4,
        action_dim: int = 7,
        **config: Any,
    ) -> StareVLAPolicy:
        """A new small VLA with random weights and the given statistics; `config` goes to [`StareVLAConfig`]."""
        num_bins = config.setdefault("num_bins", 33)
        config.setdefault("state_size", len(next(iter(norm_stats.values()))["state"]["mean"]))
        tokenizer = build_tokenizer(chunk_size, num_bins)
        text = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
        text |= {"num_key_value_heads": 4, "max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id}
        text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = StareVLAForActionPrediction(
            StareVLAConfig(
                image_size=image_size,
                chunk_size=chunk_size,
                action_dim=action_dim,
                action_token_ids=tokenizer.convert_tokens_to_ids([f"<action_{i}>" for i in range(num_bins)]),
                query_token_ids=tokenizer.convert_tokens_to_ids([f"<query_{i}>" for i in range(chunk_size)]),
                image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                state_token_id=tokenizer.convert_tokens_to_ids("<state>"),
                text_config=text | {"vocab_size": len(tokenizer)} | config.pop("text_config", {}),
                norm_stats=norm_stats,
                pad_token_id=tokenizer.pad_token_id,
                **config,
            )
        )
        return cls(model, StareVLAProcessor(StareVLAImageProcessor(image_size), tokenizer, chunk_size))

    def prepare(self, obs: Observation) -> dict[str, Tensor]:
        """Model inputs on the CPU; images stay uint8."""
        size = self.processor.image_processor.image_size
        if obs.images.shape[1:3] == (size, size):
            pixels = obs.images.permute(0, 3, 1, 2)
        else:
            pixels = self.processor.image_processor(list(obs.images.numpy()), return_tensors="pt")["pixel_values"]
        ids, mask = self._tokenize(tuple(obs.instructions))
        if obs.state is None:
            raise ValueError("`obs.state` must be `[N, P]`, got None. This policy needs proprioception.")
        if obs.state.shape[1] != len(self.state_mean):
            raise ValueError(
                f"`obs.state` must hold the {len(self.state_mean)} values of {self.unnorm_key!r}'s statistics, got {obs.state.shape[1]}. "
                "Is the checkpoint of another task?"
            )
        state = (obs.state - self.state_mean) / self.state_std
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "state": state}

    def action_logits(self, inputs: dict[str, Tensor], trace: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[N, L, num_bins]` and `[N, F]`; the bins do not depend on each other, so `trace` is not read."""
        output = self.model(**{name: value.to(self.device) for name, value in inputs.items()})
        return output.logits, output.features

    def _tokenize_one(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = self.processor(text=list(instructions))
        return encoded["input_ids"], encoded["attention_mask"]
