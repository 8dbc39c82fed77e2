"""Vision-language-action policies behind the [`~trl_stare.interfaces.VLAPolicy`] protocol."""

from trl_stare.policies.action_tokens import ActionBins, norm_stats
from trl_stare.policies.autoregressive import AutoregressivePolicy
from trl_stare.policies.hf_vlm import HFVLMPolicy
from trl_stare.policies.normalization import ActionStatistics, BinnedActions
from trl_stare.policies.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    OpenVLAImageProcessor,
    OpenVLAPolicy,
    OpenVLAProcessor,
    create_tiny_openvla,
)
from trl_stare.policies.tiny import StareVLAConfig, StareVLAForActionPrediction, StareVLAPolicy, StareVLAProcessor
from trl_stare.policies.token_policy import TokenPolicy

__all__ = [
    "ActionBins",
    "ActionStatistics",
    "AutoregressivePolicy",
    "BinnedActions",
    "HFVLMPolicy",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAPolicy",
    "OpenVLAProcessor",
    "StareVLAConfig",
    "StareVLAForActionPrediction",
    "StareVLAPolicy",
    "StareVLAProcessor",
    "TokenPolicy",
    "create_tiny_openvla",
    "norm_stats",
]
