"""Token policies that decide one action value after the other, each having read the last, as a language model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_stare.interfaces import ActionSample
from trl_stare.policies.token_policy import Bins, TokenPolicy, sample_bins


class AutoregressivePolicy(TokenPolicy):
    """A [`TokenPolicy`] over a causal vision-language model: the prompt is read once, then `C * A` tokens with its KV cache.

    Rollout and training see one distribution: the softmax over the action vocabulary alone, without top-k or top-p. (`generate`
    keeps the 50 likeliest tokens unless told otherwise, so that its samples are not the ones that a loss over 256 bins scores.)

    Before its first action the policy is tested: one that answers noise and a black image alike is refused.

    Args:
        action_token_ids (`Sequence[int]`): vocabulary id of each bin, lowest bin first.
        model, processor, bins, chunk_size, action_dim, unnorm_key: see [`TokenPolicy`].

    Raises:
        ValueError: `action_token_ids` are not one distinct id of the vocabulary per bin.
    """

    def __init__(self, model: Any, processor: Any, bins: Bins, *, action_token_ids: Sequence[int], **sizes: Any):
        super().__init__(model, processor, bins, **sizes)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        ids = torch.as_tensor(list(action_token_ids))
        if len(ids) != bins.num_bins or len(ids.unique()) != len(ids) or ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(
                f"`action_token_ids` must be {bins.num_bins} distinct ids below {vocabulary}, got {len(ids)}, "
                f"{len(ids.unique())} of them distinct, from {ids.min().item()} to {ids.max().item()}."
            )
        self.action_token_ids = ids
        self.num_tokens = self.chunk_size * self.action_dim
        self._tested = False

    def forward(self, inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Any, Tensor]:
        """The model's output with logits of the last `logits_to_keep` positions, and its last hidden states `[N, S, F]`."""
        output = self.model(**inputs, **kwargs, output_hidden_states=True)
        return output, output.hidden_states[-1]

    def extend(self, inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """`inputs` with `tokens` `[N, K]` behind every prompt."""
        mask = F.pad(inputs["attention_mask"], (0, tokens.shape[1]), value=1)
        return inputs | {"input_ids": torch.cat([inputs["input_ids"], tokens], dim=1), "attention_mask": mask}

    def next_inputs(self, tokens: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """What the model reads beside its cache: `tokens` `[N, 1]`, and the mask `[N, S]` up to and with them."""
        return {"input_ids": tokens, "attention_mask": attention_mask}

    def action_logits(self, inputs: dict[str, Tensor], trace: Tensor | None) -> tuple[Tensor, Tensor]:
        """One forward pass over prompt and tokens; features are the hidden state that predicts the first token."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        ids = self.action_token_ids.to(self.device)
        inputs = self.extend(inputs, ids[trace.to(self.device)[:, :-1]])
        output, hidden = self.forward(inputs, use_cache=False, logits_to_keep=self.num_tokens)
        return output.logits[..., ids], hidden[:, -self.num_tokens]

    @torch.no_grad()
    def act(
        self, inputs: dict[str, Tensor], *, temperature: float, generator: torch.Generator | None = None
    ) -> ActionSample:
        """Sample every token from `softmax(action logits / temperature)`; temperature 0 takes the best."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        training = self.model.training
        self.model.eval()  # in training mode gradient checkpointing would switch the cache off
        try:
            if not self._tested:
                self._require_sight(inputs)
                self._tested = True
            return self._decide(inputs, temperature, generator)
        finally:
            self.model.train(training)

    def _decide(
        self, inputs: dict[str, Tensor], temperature: float, generator: torch.Generator | None
    ) -> ActionSample:
        ids, mask = self.action_token_ids.to(self.device), inputs["attention_mask"]
        output, hidden = self.forward(inputs, use_cache=True, logits_to_keep=1)
        features, bins, logps = hidden[:, -1], [], []
        for step in range(self.num_tokens):
            chosen, logp = sample_bins(output.logits[:, -1:, ids], temperature, generator)
            bins.append(chosen)
            logps.append(logp)
            if step + 1 < self.num_tokens:
                mask = F.pad(mask, (0, 1), value=1)
                token = self.next_inputs(ids[chosen.to(self.device)], mask)
                cache = output.past_key_values
                output = self.model(**token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        trace = torch.cat(bins, dim=1)
        return ActionSample(self.decode(trace), trace, torch.cat(logps, dim=1), features.float().cpu())

    def _require_sight(self, inputs: dict[str, Tensor]) -> None:
        """Raise unless noise and a black image lead to different action probabilities, on the path that acts."""
        one = {name: value[:1] for name, value in inputs.items()}
        noise = torch.rand(one["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
        noise = (noise * 255 if one["pixel_values"].dtype == torch.uint8 else 2 * noise - 1).to(one["pixel_values"])
        first, second = (
            self._decide(one | {"pixel_values": pixels}, 0.0, None) for pixels in (noise, torch.zeros_like(noise))
        )
        # rounding within one dtype is deterministic here; what comes from the image is orders of magnitude larger
        if torch.equal(first.trace, second.trace) and torch.allclose(first.logps, second.logps, rtol=0, atol=1e-6):
            raise ValueError(
                f"`model` must look at the image, got the same action probabilities for noise and for a black image from "
                f"{type(self.model).__name__}. Check that `pixel_values` reach the first forward pass."
            )
