"""Policies that denoise continuous actions instead of writing tokens: pi0."""

from trl_stare.policies.flow.lerobot import LEROBOT_NAMES, lerobot_name, load_lerobot_pi0
from trl_stare.policies.flow.memory import estimate_flow_memory
from trl_stare.policies.flow.policy import FlowPolicy, FlowSettings
from trl_stare.policies.flow.processing import FlowProcessor
from trl_stare.policies.flow.renaming import rename_once
from trl_stare.policies.flow.tiny import create_tiny_pi0

rename_once()

__all__ = [
    "LEROBOT_NAMES",
    "FlowPolicy",
    "FlowProcessor",
    "FlowSettings",
    "create_tiny_pi0",
    "estimate_flow_memory",
    "lerobot_name",
    "load_lerobot_pi0",
]
