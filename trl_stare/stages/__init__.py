"""Stages of a task: what they are, which one is current, where a trajectory crossed them, what they cost and earn."""

from trl_stare.stages import tasks as _tasks  # noqa: F401  (registers the plans we ship)
from trl_stare.stages.diagnosis import Finding, PlanReport, check
from trl_stare.stages.measures import succeeded
from trl_stare.stages.registry import get_plan, register_plan
from trl_stare.stages.segments import Segment, segment, stage_per_step, stage_success
from trl_stare.stages.shaping import shaped_reward
from trl_stare.stages.spec import POTENTIAL_FORMS, Stage, StagePlan

__all__ = [
    "POTENTIAL_FORMS",
    "Finding",
    "PlanReport",
    "Segment",
    "Stage",
    "StagePlan",
    "check",
    "get_plan",
    "register_plan",
    "segment",
    "shaped_reward",
    "stage_per_step",
    "stage_success",
    "succeeded",
]
