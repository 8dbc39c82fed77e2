"""What a model under a LoRA takes of a device's memory."""

from __future__ import annotations

from typing import NamedTuple


class MemoryEstimate(NamedTuple):
    """Bytes on one device; what is kept, without temporaries, the allocator's gaps and the CUDA context (some gigabytes).

    Attributes:
        weights (`int`): the frozen model. adapters, gradients, optimizer (`int`): LoRA in float32, its gradients, AdamW's two moments.
        activations (`int`): what an update keeps for its backward pass, there while no rollout is.
        kv_cache (`int`): of a rollout, there while no update is.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    kv_cache: int

    @property
    def peak(self) -> int:
        """The larger one of update and rollout."""
        return sum(self[:4]) + max(self.activations, self.kv_cache)
