"""The simulated tasks we ship: what is read off each environment, and how it is shown to the policy.

Importing this registers them."""

from trl_stare.envs.tasks import bridge, peg, pick_and_place, push

__all__ = ["bridge", "peg", "pick_and_place", "push"]
