"""The simulated tasks we ship: what is read off each environment, and how it is shown to the policy.

Importing this registers them."""

from trl_stare.envs.tasks import pick_and_place

__all__ = ["pick_and_place"]
