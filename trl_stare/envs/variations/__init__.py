"""Named changes of a task, one axis at a time: what a policy that works should survive. See docs/evaluation.md."""

from trl_stare.envs.variations import actions, instructions, pictures, starts  # noqa: F401  (registers those we ship)
from trl_stare.envs.variations.registry import (
    Variation,
    get_variation,
    known_variations,
    register_variation,
    select_variations,
)

__all__ = ["Variation", "get_variation", "known_variations", "register_variation", "select_variations"]
