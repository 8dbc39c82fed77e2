"""Names of pi0's tensors in checkpoints, where transformers would rename them twice."""

from __future__ import annotations

import re

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

PARENT = "embed_action_time."


def rename_once() -> None:
    """Let transformers put [`PARENT`] before LeRobot's names only where it is not.

    The mapping of transformers 5.23 (`conversion_mapping.py`, "pi0") finds `state_proj` also in `embed_action_time.state_proj`, as
    the tensors of an adapter are called: these would be sought under `embed_action_time.embed_action_time.state_proj`, not be found,
    and begin anew as random numbers. Versions without a mapping have nothing to mend.
    """
    if rules := get_checkpoint_conversion_mapping("pi0"):
        register_checkpoint_conversion_mapping("pi0", [_anchored(rule) for rule in rules], overwrite=True)


def _anchored(rule: WeightRenaming) -> WeightRenaming:
    """`rule`, or in its place one that does not apply behind [`PARENT`]."""
    sources, targets = getattr(rule, "source_patterns", []), getattr(rule, "target_patterns", [])
    if len(sources) == 1 and targets == [PARENT + sources[0]]:
        return WeightRenaming(source_patterns=f"(?<!{re.escape(PARENT)}){sources[0]}", target_patterns=targets[0])
    return rule
