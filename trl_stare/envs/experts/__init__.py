"""Scripted demonstrators: they read signals and emit the actions a policy would, one environment step at a time.

An expert here is a function of the present state alone. So it recovers by itself from whatever noise threw it off, and what
it does can be imitated from a single image.
"""

from trl_stare.envs.experts.peg import LiftPegUprightExpert, PegInsertionExpert
from trl_stare.envs.experts.pick_and_place import PickAndPlaceExpert
from trl_stare.envs.experts.push import PushExpert
from trl_stare.envs.experts.widowx import WidowXExpert

__all__ = ["LiftPegUprightExpert", "PegInsertionExpert", "PickAndPlaceExpert", "PushExpert", "WidowXExpert"]
