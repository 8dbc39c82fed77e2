"""Other people's formats: ManiSkill's recordings come in, LeRobot's datasets come in and go out."""

from trl_stare.data.interop.lerobot import export_lerobot, import_lerobot
from trl_stare.data.interop.maniskill import ManiSkillEpisode, ManiSkillRecording, load_maniskill, replay_maniskill

__all__ = [
    "ManiSkillEpisode",
    "ManiSkillRecording",
    "export_lerobot",
    "import_lerobot",
    "load_maniskill",
    "replay_maniskill",
]
