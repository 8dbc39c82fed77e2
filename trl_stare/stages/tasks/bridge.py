"""Plans of SimplerEnv's four Bridge tasks on ManiSkill3."""

from __future__ import annotations

import math

from trl_stare.stages.registry import register_plan
from trl_stare.stages.tasks.pick_and_place import pick_and_place_plan


def native_radius(half_length: float, half_width: float) -> float:
    """Sideways test of the four tasks, metres: half the diagonal of the target's bounding box and 3 mm.

    From `_evaluate` in ManiSkill's `bridge_dataset_eval/base_env.py`; the bounding boxes below are from the assets'
    `info_bridge_custom_v0.json` and `info_bridge_custom_baked_tex_v0.json`.

    Example: `native_radius(0.055, 0.055)`, the plate, is 0.0808.
    """
    return math.hypot(half_length, half_width) + 0.003


PLATE_RADIUS = native_radius(0.055, 0.055)
"""`bridge_plate_objaverse_larger`: 0.0808 m."""
TOWEL_RADIUS = native_radius(0.05, 0.05)
"""`table_cloth_generated_shorter`: 0.0737 m."""
CUBE_RADIUS = native_radius(0.015, 0.015)
"""`baked_yellow_cube_3cm`: 0.0242 m."""
BASKET_RADIUS = native_radius(0.065, 0.04)
"""`dummy_sink_target_plane`, the invisible floor of the basket: 0.0793 m."""
PLATE_HEIGHT = 0.002
"""Metres above rest from which a carrot near the plate is over it. A carrot beside the plate is at 0, one that lies on it at 0.004
or more: success asks for contact, so the usual 0.02 would call its way down a step back."""

register_plan(pick_and_place_plan("PutCarrotOnPlateInScene-v1", radius=PLATE_RADIUS, over_height=PLATE_HEIGHT))
register_plan(pick_and_place_plan("PutSpoonOnTableClothInScene-v1", radius=TOWEL_RADIUS))
register_plan(pick_and_place_plan("StackGreenCubeOnYellowCubeBakedTexInScene-v1", radius=CUBE_RADIUS, last="Stack"))
register_plan(pick_and_place_plan("PutEggplantInBasketScene-v1", radius=BASKET_RADIUS))
