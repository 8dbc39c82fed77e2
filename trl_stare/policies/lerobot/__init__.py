"""SmolVLA and pi0.5: LeRobot's own networks behind the policy protocol, in an environment where LeRobot is (docs/flow.md)."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from trl_stare.policies.lerobot.configuration import LeRobotFlowConfig
from trl_stare.policies.lerobot.loading import load_lerobot_policy
from trl_stare.policies.lerobot.modeling import LeRobotFlowModel
from trl_stare.policies.lerobot.policy import LeRobotFlowPolicy
from trl_stare.policies.lerobot.processing import LeRobotFlowProcessor

AutoConfig.register(LeRobotFlowConfig.model_type, LeRobotFlowConfig)
AutoModelForImageTextToText.register(LeRobotFlowConfig, LeRobotFlowModel)
AutoProcessor.register(LeRobotFlowConfig, LeRobotFlowProcessor)

__all__ = ["LeRobotFlowConfig", "LeRobotFlowModel", "LeRobotFlowPolicy", "LeRobotFlowProcessor", "load_lerobot_policy"]
