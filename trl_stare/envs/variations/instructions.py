"""The same task in other words."""

from __future__ import annotations

from trl_stare.envs.registry import SimulatedTask
from trl_stare.envs.variations.registry import Variation, register_variation

PARAPHRASES = {
    "StackCube-v1": "put the red block on top of the green one",
    "PickCube-v1": "grasp the red block and keep it at the target position",
    "PlaceSphere-v1": "drop the blue ball into the container",
    "PushCube-v1": "slide the blue block onto the red and white circle",
    "PullCube-v1": "drag the blue block onto the red and white circle",
    "LiftPegUpright-v1": "make the stick stand on its end",
    "PegInsertionSide-v1": "push the orange tip of the stick into the opening of the box",
    "PutCarrotOnPlateInScene-v1": "move the carrot onto the dish",
    "PutSpoonOnTableClothInScene-v1": "lay the spoon on the cloth",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": "place the green cube on top of the yellow one",
    "PutEggplantInBasketScene-v1": "move the aubergine into the yellow drying rack",
}
"""Task -> its instruction with other verbs and nouns. A task that is not here is told its own instruction as "your task: ..."."""


def paraphrase(task: SimulatedTask) -> str:
    """Other words for the same. Example: `"put the red block on top of the green one"`."""
    return PARAPHRASES.get(task.name, f"your task: {task.instruction}")


def ask_politely(task: SimulatedTask) -> str:
    """The instruction inside a sentence. Example: `"could you please put carrot on plate?"`."""
    return f"could you please {task.instruction}?"


register_variation(Variation("instruction/paraphrase", "other verbs and nouns", instruct=paraphrase))
register_variation(
    Variation("instruction/polite", '"could you please ...?" around the task\'s own words', instruct=ask_politely)
)
