"""OpenVLA without remote code. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from trl_stare.policies.openvla.configuration import OFTSettings, OpenVLAConfig, VisionTower
from trl_stare.policies.openvla.memory import estimate_memory
from trl_stare.policies.openvla.modeling import OpenVLAForActionPrediction, OpenVLAOutput
from trl_stare.policies.openvla.oft import OpenVLAOFTPolicy
from trl_stare.policies.openvla.policy import OpenVLAPolicy
from trl_stare.policies.openvla.processing import OpenVLAImageProcessor, OpenVLAProcessor
from trl_stare.policies.openvla.tiny import create_tiny_openvla

AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction)
AutoImageProcessor.register(OpenVLAConfig, image_processor_classes={"pil": OpenVLAImageProcessor})
AutoProcessor.register(OpenVLAConfig, OpenVLAProcessor)

__all__ = [
    "OFTSettings",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAOFTPolicy",
    "OpenVLAOutput",
    "OpenVLAPolicy",
    "OpenVLAProcessor",
    "VisionTower",
    "create_tiny_openvla",
    "estimate_memory",
]
