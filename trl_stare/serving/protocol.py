"""What a client may ask and what it is told first: requests checked field by field before a policy sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trl_stare.interfaces import Observation, VLAPolicy

PROTOCOL = "trl-stare/1"
"""First thing in the server's metadata; the number changes when old clients would misunderstand."""

ALIASES = {
    "observation/image": "image",
    "observation/wrist_image": "wrist_image",
    "observation/state": "state",
    "prompt": "instruction",
}
"""OpenPI's names of the same fields, as its LIBERO clients have them."""

FIELDS = ("image", "wrist_image", "state", "instruction", "temperature", "reset", "seed")

MAX_SEED = 2**64 - 1
"""PyTorch's."""


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        max_bytes (`int`): of one message. max_rows (`int`): observations in one request. max_pixels (`int`): height and width of an image.
        max_cameras (`int`): of one observation, where the policy takes any number. max_characters (`int`): of an instruction.
        max_connections (`int`): clients at a time.

    Raises:
        ValueError: if one is below 1.
    """

    max_bytes: int = 64 * 2**20
    max_rows: int = 256
    max_pixels: int = 2048
    max_cameras: int = 8
    max_characters: int = 4096
    max_connections: int = 16

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


class Request(NamedTuple):
    """What a client asks.

    Attributes:
        obs ([`Observation`] or `None`): `N` rows to act on; `None` if only `reset` is asked.
        single (`bool`): whether the client sent one observation without the dimension `N`, and wants one chunk.
        temperature (`float` or `None`): of sampling; `None` is the server's.
        reset (`bool`): begin sampling anew. seed (`int` or `None`): with this seed; `None` is the server's.
    """

    obs: Observation | None
    single: bool
    temperature: float | None
    reset: bool
    seed: int | None


def describe(policy: VLAPolicy, *, temperature: float, seed: int, limits: Limits, **more: Any) -> dict[str, Any]:
    """What a client is told when it connects.

    Args:
        policy (`VLAPolicy`): that is served. temperature (`float`), seed (`int`): of sampling, where a request says nothing.
        limits ([`Limits`]): of the server.
        more: what only the caller knows: `task`, `control_mode`, `model`, ...

    Returns:
        `protocol`, `action_dim`, `chunk_size`, `image_size` and `state_size` (`None` where the policy names none), `num_cameras` (`None`
        where it takes any number), `temperature`, `seed`, `limits`, and `more`.
    """
    return {
        "protocol": PROTOCOL,
        "action_dim": policy.action_dim,
        "chunk_size": policy.chunk_size,
        "image_size": getattr(policy, "image_size", None),
        "num_cameras": getattr(policy, "num_cameras", 1),
        "state_size": getattr(policy, "state_size", None),
        "temperature": temperature,
        "seed": seed,
        "limits": asdict(limits),
        **more,
    }


def read_request(message: Any, limits: Limits, state_size: int | None = None, num_cameras: int | None = 1) -> Request:
    """Check a message, and turn it into what a policy takes.

    Args:
        message: as [`unpack`] gave it: `image` `[H, W, 3]` or `[N, H, W, 3]` uint8, `instruction` (one for all rows, or a list of `N`),
            `state` `[P]` or `[N, P]`, `temperature`, `reset`, `seed`; the fields of `ALIASES` too. Others are refused. Of several cameras
            `image` is `[cameras, H, W, 3]` or `[N, cameras, H, W, 3]`; the second of two may come as a `wrist_image` of its own.
        limits ([`Limits`]): what is too much.
        state_size (`int`, *optional*): `P`, where it is known.
        num_cameras (`int`, *optional*): what the policy looks through; `None` for any number: of several `N` must be given then, for
            `[2, H, W, 3]` are two observations of one camera.

    Raises:
        ValueError: names the field, what it must be, and what came.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"a request must be a map, got {type(message).__name__}.")
    given = {ALIASES.get(name, name): value for name, value in message.items()}
    if unknown := [str(name) for name in given if name not in FIELDS]:
        raise ValueError(f"a request must hold only {', '.join((*FIELDS, *ALIASES))}, got {', '.join(unknown)}.")
    temperature = _number(given, "temperature")
    reset, seed = given.get("reset", False), given.get("seed")
    if not isinstance(reset, bool):
        raise ValueError(f"`reset` must be true or false, got {reset!r}.")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED or not reset):
        raise ValueError(f"`seed` must be an integer from 0 to 2^64 - 1, given with `reset`, got {seed!r}.")
    if reset and "image" not in given:
        return Request(None, False, temperature, reset, seed)
    images, single = _images(given, limits, num_cameras)
    state = _state(given.get("state"), single, len(images), state_size)
    instructions = _instructions(given.get("instruction"), len(images), limits)
    return Request(Observation(images, instructions, state), single, temperature, reset, seed)


def _images(given: Mapping[str, Any], limits: Limits, cameras: int | None) -> tuple[Tensor, bool]:
    """`[N, H, W, 3]`, of several cameras `[N, cameras, H, W, 3]`; and whether it was one observation, without the dimension `N`."""
    pictures = _pictures("image", given.get("image"), limits, cameras)
    apart = given.get("wrist_image") is not None
    if apart:
        wrist = _pictures("wrist_image", given["wrist_image"], limits, cameras)
        if cameras not in (None, 2):
            raise ValueError(
                f"`wrist_image` must be left out, got one. This policy looks through {_number_of(cameras)}."
            )
        if wrist.shape != pictures.shape or wrist.ndim > 4:
            raise ValueError(
                f"`wrist_image` must have the shape of `image`, [H, W, 3] or [N, H, W, 3], got {[*wrist.shape]} and {[*pictures.shape]}."
            )
        pictures = np.stack([pictures, wrist], axis=-4)
    several = apart or (pictures.ndim == 5 if cameras is None else cameras > 1)
    dims = 4 if several else 3  # of one observation
    single = pictures.ndim == dims
    if pictures.ndim not in (dims, dims + 1) or (several and cameras not in (None, pictures.shape[-4])):
        raise ValueError(f"{_wanted('image', cameras)}, got uint8 {[*pictures.shape]}.")
    if not single and len(pictures) > limits.max_rows:
        raise ValueError(
            f"`image` must hold at most {limits.max_rows} observations, got {len(pictures)}. Ask in parts."
        )
    if several and cameras is None and pictures.shape[-4] > limits.max_cameras:
        raise ValueError(f"`image` must be of at most {limits.max_cameras} cameras, got {pictures.shape[-4]}.")
    images = torch.from_numpy(pictures.copy())
    return (images[None] if single else images), single


def _pictures(name: str, image: Any, limits: Limits, cameras: int | None) -> np.ndarray:
    """The field `name`, whose last three dimensions are a picture's."""
    wanted = _wanted(name, cameras)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{wanted}, got {'none' if image is None else type(image).__name__}.")
    if image.dtype != np.uint8 or image.ndim not in (3, 4, 5) or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"{wanted}, got {image.dtype} {[*image.shape]}.")
    if max(image.shape[-3:-1]) > limits.max_pixels:
        raise ValueError(
            f"`{name}` must have at most {limits.max_pixels} pixels a side, got {[*image.shape]}. Make it smaller."
        )
    return image


def _wanted(name: str, cameras: int | None) -> str:
    shapes = "[H, W, 3] or [N, H, W, 3]"
    if cameras is None and name == "image":
        shapes = "[H, W, 3], [N, H, W, 3] or [N, cameras, H, W, 3]"
    elif cameras != 1 and name == "image":
        shapes = f"[{cameras}, H, W, 3] or [N, {cameras}, H, W, 3], of {_number_of(cameras)}"
    return f"`{name}` must be uint8, {shapes}"


def _number_of(cameras: int) -> str:
    return "one camera" if cameras == 1 else f"{cameras} cameras"


def _state(state: Any, single: bool, rows: int, size: int | None) -> Tensor | None:
    if state is None:
        if size:
            raise ValueError(f"`state` must be [{size}] or [N, {size}], got none. This policy needs proprioception.")
        return None
    shape = "[P]" if single else f"[{rows}, P]"
    wanted = f"`state` must be numbers of shape {shape.replace('P', str(size)) if size else shape}"
    if not isinstance(state, np.ndarray) or state.dtype.kind not in "fiu":
        raise ValueError(f"{wanted}, got {getattr(state, 'dtype', type(state).__name__)}.")
    if (
        state.ndim != (1 if single else 2)
        or (not single and len(state) != rows)
        or size not in (None, state.shape[-1])
    ):
        raise ValueError(f"{wanted}, got {[*state.shape]}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite then, and refused
        state = state.astype(np.float32)
    if not np.isfinite(state).all():
        raise ValueError(f"{wanted}, got values that are not finite in float32.")
    state = torch.from_numpy(state)
    return state[None] if single else state


def _instructions(instruction: Any, rows: int, limits: Limits) -> tuple[str, ...]:
    given = [instruction] * rows if isinstance(instruction, str) else instruction
    if not isinstance(given, list) or len(given) != rows or not all(isinstance(text, str) for text in given):
        raise ValueError(f"`instruction` must be a string, or a list of {rows}, got {str(instruction)[:80]!r}.")
    if (longest := max(map(len, given))) > limits.max_characters:
        raise ValueError(f"`instruction` must have at most {limits.max_characters} characters, got {longest}.")
    return tuple(given)


def _number(given: Mapping[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be a number, at least 0, got {value!r}.")
    return float(value)
