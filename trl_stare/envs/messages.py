"""What ManiSkill says while it builds a scene, said once.

On the CPU a scene is built anew for every episode. Without this, three hundred episodes of a Bridge task come with more than a
thousand lines about ManiSkill's own assets, each of which says what the line before it said.
"""

from __future__ import annotations

import logging


class Once(logging.Filter):
    """Lets a message pass the first time, of each level.

    Example: of the warnings "a", "b", "a" the first two pass.
    """

    def __init__(self):
        super().__init__()
        self._passed: set[tuple[int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` says what none before it has said."""
        message = record.levelno, record.getMessage()
        is_new = message not in self._passed
        self._passed.add(message)
        return is_new


def tell_once() -> None:
    """Let ManiSkill's logger say each message once in this process."""
    # the object, not its name: ManiSkill's ends in a space
    from mani_skill import logger

    if not any(isinstance(known, Once) for known in logger.filters):
        logger.addFilter(Once())
