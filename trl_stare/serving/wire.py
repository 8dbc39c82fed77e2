"""Messages as bytes: msgpack, with arrays as OpenPI's clients send them. Nothing that is read can run code.

An array is a map `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}`, in C order
(`openpi_client.msgpack_numpy`, github.com/Physical-Intelligence/openpi).
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
from torch import Tensor

DTYPES = ("|u1", "|b1", "<i4", "<i8", "<f2", "<f4", "<f8")
"""NumPy's names of what an array may hold: plain numbers, never objects."""

MOST_OBJECTS = 200_000
"""Maps, lists and what is in them, in one message: those of thousands of observations, and little memory. What is large is an array, whose
bytes are one object."""


def pack(message: Any) -> bytes:
    """Plain values, NumPy arrays and tensors as bytes.

    Raises:
        TypeError: for anything else.

    Example: `unpack(pack({"state": torch.zeros(2)}))["state"]` is `array([0., 0.], dtype=float32)`.
    """
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """The inverse of [`pack`]; tensors come back as arrays, which cannot be written to.

    Raises:
        ValueError: if `data` is no message; says why.
    """
    found = 0

    def count(value: Any) -> Any:  # one byte makes a map of 64: bytes alone do not bound what a message takes
        nonlocal found
        found += 1 + len(value)
        if found > MOST_OBJECTS:
            raise ValueError(f"a message must hold at most {MOST_OBJECTS} objects, got more")
        return value

    limit = {"max_array_len": MOST_OBJECTS, "max_map_len": MOST_OBJECTS}
    try:
        return msgpack.unpackb(data, object_hook=lambda value: _decode(count(value)), list_hook=count, **limit)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"a message must be msgpack, got {len(data)} bytes that are not: {error}.") from error


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray) or value.dtype.str not in DTYPES:
        raise TypeError(f"a message must hold plain values and arrays of {', '.join(DTYPES)}, got {type(value)}.")
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _decode(value: dict[Any, Any]) -> Any:
    """An array, where `value` is one."""
    if b"__npgeneric__" in value:  # a NumPy scalar, as OpenPI's clients send it
        return value.get(b"data")
    if b"__ndarray__" not in value:
        return value
    data, dtype, shape = (value.get(name) for name in (b"data", b"dtype", b"shape"))
    if dtype not in DTYPES:
        raise ValueError(f"an array must be of {', '.join(DTYPES)}, got {dtype!r}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array must have a list of sizes as its shape, got {shape!r}")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        got = f"{len(data)} bytes" if isinstance(data, bytes) else repr(type(data))
        raise ValueError(f"an array of shape {shape} and type {dtype} must have {expected} bytes, got {got}")
    return np.frombuffer(data, dtype).reshape(shape)
