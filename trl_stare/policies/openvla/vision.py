"""The vision towers of OpenVLA: timm's ViT, as far as OpenVLA runs it, under timm's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_stare.policies.openvla.configuration import OpenVLAConfig, VisionTower


class ViTAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[N, S, F]` -> `[N, S, F]`."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class ViTMLP(nn.Module):
    """Two layers with an exact GELU."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[N, S, F]` -> `[N, S, F]`."""
        return self.fc2(F.gelu(self.fc1(hidden)))


class LayerScale(nn.Module):
    """A learnt factor per channel; OpenVLA calls it `scale_factor`, because transformers renames `gamma`."""

    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[N, S, F]` -> `[N, S, F]`."""
        return hidden * self.scale_factor


class ViTBlock(GradientCheckpointingLayer):
    """Attention and MLP, each normalised before and scaled after."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.norm1 = nn.LayerNorm(tower.width, eps=1e-6)
        self.attn = ViTAttention(tower.width, tower.heads)
        self.ls1 = LayerScale(tower.width) if tower.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(tower.width, eps=1e-6)
        self.mlp = ViTMLP(tower.width, tower.mlp_width)
        self.ls2 = LayerScale(tower.width) if tower.layer_scale else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """`[N, S, F]` -> `[N, S, F]`."""
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
        return hidden + self.ls2(self.mlp(self.norm2(hidden)))


class AttentionPool(nn.Module):
    """SigLIP's pooling head. Never run: it is here so that a published checkpoint loads and saves without loss."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, tower.width))
        self.q = nn.Linear(tower.width, tower.width)
        self.kv = nn.Linear(tower.width, 2 * tower.width)
        self.proj = nn.Linear(tower.width, tower.width)
        self.norm = nn.LayerNorm(tower.width, eps=1e-6)
        self.mlp = ViTMLP(tower.width, tower.mlp_width)


class PatchEmbedding(nn.Module):
    """One linear map per patch."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.proj = nn.Conv2d(3, tower.width, tower.patch_size, tower.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[N, 3, H, W]` -> `[N, patches, F]`."""
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A ViT up to its second-to-last block, without the final norm: the features OpenVLA reads."""

    def __init__(self, tower: VisionTower, image_size: int):
        super().__init__()
        self.num_patches = (image_size // tower.patch_size) ** 2
        self.num_prefix = int(tower.class_token) + tower.register_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, tower.width)) if tower.class_token else None
        self.reg_token = (
            nn.Parameter(torch.zeros(1, tower.register_tokens, tower.width)) if tower.register_tokens else None
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, tower.width))
        self.patch_embed = PatchEmbedding(tower)
        self.blocks = nn.ModuleList(ViTBlock(tower) for _ in range(tower.depth))
        self.norm = nn.LayerNorm(tower.width, eps=1e-6)
        if tower.attention_pool:
            self.attn_pool = AttentionPool(tower)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[N, 3, H, W]`, normalised -> `[N, patches, F]`."""
        hidden = self.patch_embed(pixel_values) + self.pos_embed
        prefix = [token.expand(len(hidden), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        hidden = torch.cat([*prefix, hidden], dim=1)
        for block in self.blocks[:-1]:
            hidden = block(hidden)
        return hidden[:, self.num_prefix :]


class VisionBackbone(nn.Module):
    """One tower, or two whose features are concatenated patch by patch."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        self.towers = config.towers()
        self.featurizer = VisionTransformer(self.towers[0], config.image_sizes[0])
        if len(self.towers) == 2:
            self.fused_featurizer = VisionTransformer(self.towers[1], config.image_sizes[1])
        self.width = sum(tower.width for tower in self.towers)
        self.image_size, self.num_patches = config.image_sizes[0], self.featurizer.num_patches

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[N, 3, H, W]` uint8, or `[N, 3 * towers, H, W]` float as [`OpenVLAImageProcessor`] normalises it -> `[N, patches, F]`."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = self.normalize(pixel_values)
        expected = (3 * len(self.towers), self.image_size, self.image_size)
        if pixel_values.shape[1:] != expected:
            raise ValueError(
                f"`pixel_values` must be `[N, {', '.join(map(str, expected))}]`, or uint8 with 3 channels, got "
                f"{[*pixel_values.shape]}. Use the checkpoint's own processor."
            )
        pixel_values = pixel_values.to(self.featurizer.patch_embed.proj.weight.dtype)
        features = [self.featurizer(pixel_values[:, :3])]
        if len(self.towers) == 2:
            features.append(self.fused_featurizer(pixel_values[:, 3:]))
        return torch.cat(features, dim=-1)

    def normalize(self, images: Tensor) -> Tensor:
        """`[N, 3, H, W]` uint8 -> `[N, 3 * towers, H, W]` float32: to [0, 1], minus mean, by std, once per tower."""
        pixels = images.float().div(255)
        mean, std = (
            [torch.tensor(getattr(tower, name), device=images.device).view(3, 1, 1) for tower in self.towers]
            for name in ("mean", "std")
        )
        return torch.cat([(pixels - m) / s for m, s in zip(mean, std, strict=True)], dim=1)
