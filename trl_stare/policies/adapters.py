"""What to do with a trained adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from trl_stare.interfaces import ADAPTER_CONFIG_NAME
from trl_stare.policies.pretrained import PretrainedPolicy


def merge_adapter(model: Any) -> Any:
    """A plain model with the adapter's weights added in; `model` and its base stay as they are.

    Takes the memory of a second copy of the weights. (PEFT's `merge_and_unload` alone changes the base in place, and merging
    back does not restore it exactly in bfloat16.)

    Args:
        model (`PeftModel`, or a `PreTrainedModel` that `from_pretrained` loaded with an adapter): e.g. a LoRA over
            [`OpenVLAForActionPrediction`].
    """
    model = copy.deepcopy(model)
    if isinstance(model, PeftModel):
        return model.merge_and_unload()
    # transformers puts the layers of an adapter into the model itself, and has no way to take them out again
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    # what it renames when it saves, it noted while it loaded the adapter
    model._hf_peft_config_loaded, model._weight_conversions = False, None
    return model


def merge_checkpoint(folder: str | Path) -> None:
    """Put whole weights in the place of the adapter in `folder`, which needs its base no more; what else is there stays.

    Interrupted, it leaves the adapter: the same call does it again.

    Args:
        folder (`str` or `Path`): a checkpoint with a PEFT adapter.
    """
    policy = PretrainedPolicy.from_pretrained(folder)
    policy.model = merge_adapter(policy.model)
    policy.save_pretrained(folder)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ADAPTER_CONFIG_NAME):
        (Path(folder) / name).unlink(missing_ok=True)
