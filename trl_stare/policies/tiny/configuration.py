"""Configuration of the small VLA."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig


class StareVLAConfig(PreTrainedConfig):
    """Configuration of [`StareVLAForActionPrediction`].

    Args:
        image_size (`int`): height and width of the image in pixels; a multiple of 8.
        conv_channels (`list[int]`): channels of the three strided, FiLM-conditioned convolutions.
        readout_channels (`int`): channels of the 1x1 convolution whose flattened output is the dense readout token.
        state_size (`int`): `P`, proprioceptive values.
        chunk_size (`int`): `C`, environment steps per decision. action_dim (`int`): `A`.
        num_bins (`int`): bins per action value. Odd, so that the middle bin is exactly "do not move".
        soft_bins (`float`): standard deviation, in bins, of the Gaussian target of the imitation loss; 0 is a one-hot target.
        action_token_ids (`list[int]`): vocabulary id of each bin, lowest action value first.
        query_token_ids (`list[int]`): placeholder ids, one per environment step of a chunk.
        image_token_id (`int`), state_token_id (`int`): placeholders of the readout token and of the state.
        text_config (`dict` or `LlamaConfig`): the decoder.
        norm_stats (`dict`): statistics that travel with the checkpoint, by `unnorm_key`:
            `{key: {"action": {"scale": [A]}, "state": {"mean": [P], "std": [P]}}}`.
    """

    model_type = "stare_vla"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self,
        image_size: int = 64,
        conv_channels: list[int] | None = None,
        readout_channels: int = 32,
        state_size: int = 8,
        chunk_size: int = 4,
        action_dim: int = 7,
        num_bins: int = 33,
        soft_bins: float = 0.5,
        action_token_ids: list[int] | None = None,
        query_token_ids: list[int] | None = None,
        image_token_id: int = 4,
        state_token_id: int = 5,
        text_config: dict[str, Any] | LlamaConfig | None = None,
        norm_stats: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.image_size, self.conv_channels = image_size, conv_channels or [16, 48, 96]
        self.readout_channels, self.state_size = readout_channels, state_size
        self.chunk_size, self.action_dim, self.num_bins, self.soft_bins = chunk_size, action_dim, num_bins, soft_bins
        self.action_token_ids, self.query_token_ids = action_token_ids or [], query_token_ids or []
        self.image_token_id, self.state_token_id = image_token_id, state_token_id
        if not isinstance(text_config, LlamaConfig):
            text_config = LlamaConfig(**(text_config or {}))
        self.text_config, self.norm_stats = text_config, norm_stats or {}
        super().__init__(**kwargs)
