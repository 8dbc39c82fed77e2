"""Vision-language-action policies behind the [`~trl_stare.interfaces.VLAPolicy`] protocol."""

from trl_stare.policies.action_tokens import ActionBins, norm_stats
from trl_stare.policies.tiny import StareVLAConfig, StareVLAForActionPrediction, StareVLAProcessor
from trl_stare.policies.token_policy import TokenPolicy

__all__ = [
    "ActionBins",
    "StareVLAConfig",
    "StareVLAForActionPrediction",
    "StareVLAProcessor",
    "TokenPolicy",
    "norm_stats",
]
