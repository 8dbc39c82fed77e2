"""Vision-language-action policies behind the [`~trl_stare.interfaces.VLAPolicy`] protocol."""

from trl_stare.policies.action_tokens import ActionBins, norm_stats
from trl_stare.policies.adapters import merge_checkpoint
from trl_stare.policies.autoregressive import AutoregressivePolicy
from trl_stare.policies.flow import FlowPolicy, FlowProcessor, create_tiny_pi0, estimate_flow_memory
from trl_stare.policies.hf_vlm import HFVLMPolicy
from trl_stare.policies.lerobot import load_lerobot_policy
from trl_stare.policies.memory import MemoryEstimate
from trl_stare.policies.normalization import ActionStatistics, BinnedActions, quantile_statistics, select_statistics
from trl_stare.policies.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    OpenVLAImageProcessor,
    OpenVLAOFTPolicy,
    OpenVLAPolicy,
    OpenVLAProcessor,
    create_tiny_openvla,
    estimate_memory,
)
from trl_stare.policies.tiny import StareVLAConfig, StareVLAForActionPrediction, StareVLAPolicy, StareVLAProcessor
from trl_stare.policies.token_policy import TokenPolicy

__all__ = [
    "ActionBins",
    "ActionStatistics",
    "AutoregressivePolicy",
    "BinnedActions",
    "FlowPolicy",
    "FlowProcessor",
    "HFVLMPolicy",
    "MemoryEstimate",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAOFTPolicy",
    "OpenVLAPolicy",
    "OpenVLAProcessor",
    "StareVLAConfig",
    "StareVLAForActionPrediction",
    "StareVLAPolicy",
    "StareVLAProcessor",
    "TokenPolicy",
    "create_tiny_openvla",
    "create_tiny_pi0",
    "estimate_flow_memory",
    "estimate_memory",
    "load_lerobot_policy",
    "merge_checkpoint",
    "norm_stats",
    "quantile_statistics",
    "select_statistics",
]
