"""The three stages of IPI as TRL trainers: imitation, preference, interaction."""

from trl_stare.trainers.adapters import adapter_settings, get_policy_peft_config
from trl_stare.trainers.stage_dpo_config import StageDPOConfig
from trl_stare.trainers.stage_dpo_trainer import StageDPOTrainer
from trl_stare.trainers.stage_ppo_config import StagePPOConfig, preset_fields
from trl_stare.trainers.stage_ppo_trainer import StagePPOTrainer
from trl_stare.trainers.stage_sft_config import StageSFTConfig
from trl_stare.trainers.stage_sft_trainer import StageSFTTrainer

__all__ = [
    "StageDPOConfig",
    "StageDPOTrainer",
    "StagePPOConfig",
    "StagePPOTrainer",
    "StageSFTConfig",
    "StageSFTTrainer",
    "adapter_settings",
    "get_policy_peft_config",
    "preset_fields",
]
