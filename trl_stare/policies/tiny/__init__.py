"""The small VLA that trains on two CPU cores. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from trl_stare.policies.tiny.configuration import StareVLAConfig
from trl_stare.policies.tiny.modeling import StareVLAForActionPrediction, StareVLAOutput
from trl_stare.policies.tiny.policy import StareVLAPolicy
from trl_stare.policies.tiny.processing import StareVLAImageProcessor, StareVLAProcessor

AutoConfig.register(StareVLAConfig.model_type, StareVLAConfig)
AutoModelForImageTextToText.register(StareVLAConfig, StareVLAForActionPrediction)
AutoImageProcessor.register(StareVLAConfig, image_processor_classes={"pil": StareVLAImageProcessor})
AutoProcessor.register(StareVLAConfig, StareVLAProcessor)

__all__ = [
    "StareVLAConfig",
    "StareVLAForActionPrediction",
    "StareVLAImageProcessor",
    "StareVLAOutput",
    "StareVLAPolicy",
    "StareVLAProcessor",
]
