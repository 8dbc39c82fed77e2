"""A token VLA as the trainers see it: bins, normalisation and sampling around a model that returns action logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_stare.interfaces import ActionEval, ActionSample, Observation
from trl_stare.policies.action_tokens import ActionBins
from trl_stare.policies.tiny import (
    StareVLAConfig,
    StareVLAForActionPrediction,
    StareVLAImageProcessor,
    StareVLAProcessor,
)
from trl_stare.policies.tiny.modeling import imitation_loss
from trl_stare.policies.tiny.processing import build_tokenizer


class TokenPolicy:
    """A [`~trl_stare.interfaces.VLAPolicy`] over a model whose forward gives `[N, L, num_bins]` action logits.

    Args:
        model (`PreTrainedModel`): e.g. [`StareVLAForActionPrediction`]; its config holds `norm_stats`.
        processor (`ProcessorMixin`): makes `input_ids` and `pixel_values`.
        unnorm_key (`str`, *optional*): which statistics to use; may be left out where the checkpoint has only one.

    Raises:
        ValueError: if `unnorm_key` is unknown (lists the known ones) or the statistics do not fit the model.
    """

    def __init__(self, model: Any, processor: Any, unnorm_key: str | None = None):
        self.model, self.processor = model, processor
        config, stats = model.config, model.config.norm_stats
        if unnorm_key is None and len(stats) == 1:
            unnorm_key = next(iter(stats))
        if unnorm_key not in stats:
            raise ValueError(f"`unnorm_key` must be one of {sorted(stats)}, got {unnorm_key!r}.")
        self.unnorm_key = unnorm_key
        self.chunk_size, self.action_dim = config.chunk_size, config.action_dim
        self.bins = ActionBins(
            scale=torch.tensor(stats[unnorm_key]["action"]["scale"]),
            num_bins=config.num_bins,
            action_dim=config.action_dim,
        )
        self.state_mean = torch.tensor(stats[unnorm_key]["state"]["mean"])
        self.state_std = torch.tensor(stats[unnorm_key]["state"]["std"])
        if len(self.state_mean) != config.state_size or not (self.state_std > 0).all():
            raise ValueError(
                f"`norm_stats[{unnorm_key!r}]['state']` must hold {config.state_size} means and positive std, got "
                f"{self.state_mean.tolist()} and {self.state_std.tolist()}."
            )
        self._tokenize = lru_cache(maxsize=256)(self._tokenize_one)

    @classmethod
    def from_pretrained(cls, folder: str | Path, unnorm_key: str | None = None, **kwargs: Any) -> TokenPolicy:
        """Load model and processor from a folder or a Hub id."""
        model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
        return cls(model, AutoProcessor.from_pretrained(folder), unnorm_key)

    @classmethod
    def create_tiny(
        cls,
        norm_stats: dict[str, Any],
        *,
        image_size: int = 64,
        chunk_size: int = 4,
        action_dim: int = 7,
        **config: Any,
    ) -> TokenPolicy:
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
        state = (obs.state - self.state_mean) / self.state_std
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "state": state}

    @torch.no_grad()
    def act(
        self, inputs: dict[str, Tensor], *, temperature: float, generator: torch.Generator | None = None
    ) -> ActionSample:
        """Sample every action token from `softmax(logits / temperature)`; temperature 0 takes the best."""
        output = self._forward(inputs)
        logps = F.log_softmax(output.logits.float() / (temperature or 1.0), dim=-1).cpu()
        if temperature:
            n, length, bins = logps.shape
            trace = torch.multinomial(logps.exp().view(-1, bins), 1, generator=generator).view(n, length)
        else:
            trace = logps.argmax(dim=-1)
        chosen = logps.gather(-1, trace[..., None]).squeeze(-1)
        return ActionSample(self.decode(trace), trace, chosen, output.features.float().cpu())

    def evaluate(self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float = 1.0) -> ActionEval:
        """Log-probabilities and entropies `[N, L]` of `trace`, differentiable."""
        output = self._forward(inputs)
        logps = F.log_softmax(output.logits.float() / temperature, dim=-1)
        chosen = logps.gather(-1, trace.to(logps.device)[..., None]).squeeze(-1)
        return ActionEval(chosen, -(logps.exp() * logps).sum(-1), output.features)

    def score(self, inputs: dict[str, Tensor], trace: Tensor) -> Tensor:
        """`[N]` log-likelihood of the chunk over the action vocabulary."""
        return self.evaluate(inputs, trace).logps.sum(-1)

    def imitation_loss(
        self, inputs: dict[str, Tensor], trace: Tensor, mask: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Scalar loss of imitating the tokens of `trace` in `mask` `[N, L]`; mean over decisions or weighted by `[N]`."""
        output = self._forward(inputs)
        soft_bins = getattr(self.model.config, "soft_bins", 0.0)
        trace, mask = trace.to(output.logits.device), mask.to(output.logits.device)
        return imitation_loss(output.logits, trace, soft_bins=soft_bins, weight=weight, mask=mask)

    def encode(self, actions: Tensor) -> Tensor:
        """`[N, C, A]` robot units -> `[N, C * A]` bins."""
        return self.bins.encode(actions).flatten(1)

    def decode(self, trace: Tensor) -> Tensor:
        """`[N, C * A]` bins -> `[N, C, A]` robot units."""
        return self.bins.decode(trace.view(len(trace), self.chunk_size, self.action_dim))

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write model and processor; [`from_pretrained`] reads them back exactly."""
        self.model.save_pretrained(folder, **kwargs)
        self.processor.save_pretrained(folder)

    def _forward(self, inputs: dict[str, Tensor]) -> Any:
        device = next(self.model.parameters()).device
        return self.model(**{name: value.to(device) for name, value in inputs.items()})

    def _tokenize_one(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = self.processor(text=list(instructions))
        return encoded["input_ids"], encoded["attention_mask"]
