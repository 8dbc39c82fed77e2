"""What to do with a trained adapter."""

from __future__ import annotations

import copy
from typing import Any


def merge_adapter(model: Any) -> Any:
    """A plain model with the adapter's weights added in; `model` and its base stay as they are.

    Takes the memory of a second copy of the weights. (PEFT's `merge_and_unload` alone changes the base in place, and merging
    back does not restore it exactly in bfloat16.)

    Args:
        model (`PeftModel`): e.g. a LoRA over [`OpenVLAForActionPrediction`].
    """
    return copy.deepcopy(model).merge_and_unload()
