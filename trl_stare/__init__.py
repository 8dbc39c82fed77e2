"""trl-stare: fine-tune vision-language-action policies stage by stage (STARE-VLA, arXiv 2512.05107) with Hugging Face TRL."""

import warnings
from importlib import import_module
from multiprocessing import parent_process
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "StageSFTConfig": "trl_stare.trainers",
    "StageSFTTrainer": "trl_stare.trainers",
    "StageDPOConfig": "trl_stare.trainers",
    "StageDPOTrainer": "trl_stare.trainers",
    "StagePPOConfig": "trl_stare.trainers",
    "StagePPOTrainer": "trl_stare.trainers",
    "SimulatedTask": "trl_stare.envs",
    "make_env": "trl_stare.envs",
    "register_task": "trl_stare.tasks",
    "Stage": "trl_stare.stages",
    "StagePlan": "trl_stare.stages",
    "get_plan": "trl_stare.stages",
    "TokenPolicy": "trl_stare.policies",
    "HFVLMPolicy": "trl_stare.policies",
    "FlowPolicy": "trl_stare.policies",
    "OpenVLAConfig": "trl_stare.policies",
    "OpenVLAForActionPrediction": "trl_stare.policies",
    "OpenVLAProcessor": "trl_stare.policies",
    "evaluate": "trl_stare.evaluation.evaluate",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: TRL takes seconds, and ManiSkill need not be there at all."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trl_stare' has no attribute {name!r}. Public names: {sorted(_PUBLIC)}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# After `import trl_stare` transformers' Auto classes must know our models. A simulator's worker process never loads one, and
# does without the three seconds and 150 MB that transformers takes.
if parent_process() is None:
    try:
        import_module("trl_stare.policies")
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            f"transformers cannot load policies here ({error}). Run `python -m trl_stare.envs.doctor` for the cause.",
            stacklevel=2,
        )
