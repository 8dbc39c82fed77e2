"""A VLA that acts in tokens, as the trainers see it: bins, sampling and scoring around a model that gives action logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_stare.interfaces import ActionEval, ActionSample, Observation
from trl_stare.policies.action_tokens import imitation_loss
from trl_stare.policies.pretrained import PretrainedPolicy


class Bins(Protocol):
    """Between robot units and bins: [`ActionBins`] of the small VLA, [`BinnedActions`] of OpenVLA."""

    num_bins: int

    def encode(self, actions: Tensor) -> Tensor:
        """`[..., A]` robot units -> `[..., A]` bins."""

    def decode(self, bins: Tensor) -> Tensor:
        """`[..., A]` bins -> `[..., A]` robot units."""


class TokenPolicy(PretrainedPolicy):
    """A [`~trl_stare.interfaces.VLAPolicy`] whose decisions are `C * A` bins. Load any of them with [`from_pretrained`].

    A subclass says what its model sees ([`prepare`]) and how likely its bins are ([`action_logits`]). It decides on all bins at
    once, unless it overrides [`act`] as well.

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`): saved together.
        bins ([`Bins`]): between robot units and bins. chunk_size (`int`): `C`. action_dim (`int`): `A`.
        unnorm_key (`str`): which of the checkpoint's statistics `bins` come from.
    """

    def __init__(
        self, model: Any, processor: Any, bins: Bins, *, chunk_size: int, action_dim: int, unnorm_key: str | None
    ):
        self.model, self.processor, self.bins = model, processor, bins
        self.chunk_size, self.action_dim, self.unnorm_key = chunk_size, action_dim, unnorm_key

    @staticmethod
    def create_tiny(norm_stats: dict[str, Any], **config: Any) -> TokenPolicy:
        """A new small VLA with random weights, see [`StareVLAPolicy.create_tiny`]."""
        return TokenPolicy._classes["stare_vla"].create_tiny(norm_stats, **config)

    def prepare(self, obs: Observation) -> dict[str, Tensor]:
        """Model inputs with first dimension `N` on the CPU; images stay uint8."""
        raise NotImplementedError

    def action_logits(self, inputs: dict[str, Tensor], trace: Tensor | None) -> tuple[Tensor, Tensor]:
        """Differentiable `[N, L, num_bins]` logits, lowest bin first, and `[N, F]` features for a value head.

        `trace` `[N, L]` are the decisions to score; `None` when [`act`] asks, which a model that decides at once allows.
        """
        raise NotImplementedError

    @torch.no_grad()
    def act(
        self, inputs: dict[str, Tensor], *, temperature: float, generator: torch.Generator | None = None
    ) -> ActionSample:
        """Sample every bin from `softmax(logits / temperature)`; temperature 0 takes the best."""
        logits, features = self.action_logits(inputs, None)
        trace, logps = sample_bins(logits, temperature, generator)
        return ActionSample(self.decode(trace), trace, logps, features.float().cpu())

    def evaluate(self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float = 1.0) -> ActionEval:
        """Log-probabilities and entropies `[N, L]` of `trace`, differentiable."""
        logits, features = self.action_logits(inputs, trace)
        logps = F.log_softmax(logits.float() / temperature, dim=-1)
        chosen = logps.gather(-1, trace.to(logps.device)[..., None]).squeeze(-1)
        return ActionEval(chosen, -(logps.exp() * logps).sum(-1), features)

    def action_logps(self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float = 1.0) -> Tensor:
        """`[N, L, num_bins]` log-probabilities of every bin, given the bins of `trace` before it."""
        return F.log_softmax(self.action_logits(inputs, trace)[0].float() / temperature, dim=-1)

    def score(
        self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        """`[N]` log-likelihood over the action vocabulary of the chunk, or of its tokens in `mask` `[N, L]`."""
        logps = self.evaluate(inputs, trace, temperature=temperature).logps
        return (logps if mask is None else logps * mask.to(logps)).sum(-1)

    def imitation_loss(
        self, inputs: dict[str, Tensor], trace: Tensor, mask: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Scalar loss of imitating the tokens of `trace` in `mask` `[N, L]`; mean over decisions or weighted by `[N]`."""
        logits, _ = self.action_logits(inputs, trace)
        soft_bins = getattr(self.model.config, "soft_bins", 0.0)
        trace, mask = trace.to(logits.device), mask.to(logits.device)
        weight = None if weight is None else weight.to(logits.device)
        return imitation_loss(logits, trace, soft_bins=soft_bins, weight=weight, mask=mask)

    def encode(self, actions: Tensor) -> Tensor:
        """`[N, C, A]` robot units -> `[N, C * A]` bins."""
        return self.bins.encode(actions).flatten(1)

    def decode(self, trace: Tensor) -> Tensor:
        """`[N, C * A]` bins -> `[N, C, A]` float32 robot units."""
        return self.bins.decode(trace.view(len(trace), self.chunk_size, self.action_dim)).float()


def sample_bins(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """`[N, L, bins]` logits -> sampled bins and their log-probabilities, `[N, L]` on the CPU, where `generator` lives.

    Temperature 0 takes the best bin; its log-probability is that at temperature 1.

    Raises:
        RuntimeError: if the model answers values that are not finite, whose best bin would be a motion at full scale.
    """
    logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1).cpu()
    if temperature:
        n, length, bins = logps.shape
        trace = torch.multinomial(logps.exp().view(-1, bins), 1, generator=generator).view(n, length)
    else:
        trace = logps.argmax(dim=-1)
    chosen = logps.gather(-1, trace[..., None]).squeeze(-1)
    if not chosen.isfinite().all():
        raise RuntimeError(
            "the model's logits must be finite, got NaN or infinity. Look for NaN in its weights, and for overflow in its `dtype`."
        )
    return trace, chosen
