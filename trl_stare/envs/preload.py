"""What every worker needs, imported once: the server process that imports this forks a worker in milliseconds.

Nothing here may start a thread or open Vulkan: neither survives a fork.
"""

from trl_stare.envs.vulkan import select_vulkan_driver

select_vulkan_driver()

import mani_skill.envs  # noqa: E402, F401

import trl_stare.envs.group  # noqa: E402, F401
