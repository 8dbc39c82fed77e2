"""A flow policy's decision as the row of integers that rollouts, datasets and collators carry for every policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FlowTrace(NamedTuple):
    """One denoising chain, reduced to what can be learnt from.

    Attributes:
        actions (`Tensor`): `[N, C, A]` float32, where the chain ended, normalised.
        before (`Tensor`): `[N, C, D]` float32, the latent at which the stochastic step was taken.
        after (`Tensor`): `[N, C, A]` float32, what it led to, in the dimensions that act; the others follow the ODE.
        index (`Tensor`): `[N]` int64, which step it was; -1 for a demonstration, which has no chain.
    """

    actions: Tensor
    before: Tensor
    after: Tensor
    index: Tensor


def pack(trace: FlowTrace) -> Tensor:
    """`[N, C * (2 A + D + 1)]` int64, one record per environment step: floats by their bits, exactly, and `index + 1`.

    The bits of a float32, read as an unsigned integer, are what the schema's non-negative int64 can hold without any rounding: the
    log-probabilities of training are then those of the rollout also from a dataset.

    Example: the float 1.0 is 0x3F800000 = 1065353216.
    """
    floats = torch.cat([trace.actions, trace.before, trace.after], dim=-1).float().contiguous()
    bits = floats.view(torch.int32).long() & 0xFFFFFFFF
    index = (trace.index + 1)[:, None, None].expand(*bits.shape[:2], 1)
    return torch.cat([bits, index], dim=-1).flatten(1)


def unpack(trace: Tensor, *, chunk_size: int, action_dim: int, latent_dim: int) -> FlowTrace:
    """Inverse of [`pack`].

    Raises:
        ValueError: `trace` `[N, L]` is of another size.
    """
    width = 2 * action_dim + latent_dim + 1
    if trace.ndim != 2 or trace.shape[1] != chunk_size * width:
        raise ValueError(
            f"`trace` must be `[N, {chunk_size * width}]` ({chunk_size} steps of {action_dim} of {latent_dim} dimensions), got "
            f"{[*trace.shape]}. Use traces of this checkpoint."
        )
    records = trace.unflatten(1, (chunk_size, width))
    bits = records[..., :-1]
    floats = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).contiguous().view(torch.float32)
    parts = floats.split([action_dim, latent_dim, action_dim], dim=-1)
    return FlowTrace(*parts, index=records[:, 0, -1] - 1)
