"""One plan for every task we ship: names, thresholds and shared measures, no logic of their own.

Importing this registers them."""

from trl_stare.stages.tasks import bridge, peg, pick_and_place, push

__all__ = ["bridge", "peg", "pick_and_place", "push"]
