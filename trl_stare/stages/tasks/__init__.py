"""One plan for every task we ship: names, thresholds and shared measures, no logic of their own.

Importing this registers them."""

from trl_stare.stages.tasks import pick_and_place

__all__ = ["pick_and_place"]
