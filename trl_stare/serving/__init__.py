"""A policy behind a websocket, and the client that is a policy again. Needs the extra `serve`."""

from importlib.util import find_spec

if missing := [name for name in ("msgpack", "websockets") if find_spec(name) is None]:
    raise ImportError(f"`trl_stare.serving` needs {' and '.join(missing)}. Run: pip install 'trl-stare[serve]'")

from trl_stare.serving.client import RemotePolicy
from trl_stare.serving.protocol import PROTOCOL, Limits, Request, describe, read_request
from trl_stare.serving.server import PolicyServer
from trl_stare.serving.wire import pack, unpack

__all__ = [
    "PROTOCOL",
    "Limits",
    "PolicyServer",
    "RemotePolicy",
    "Request",
    "describe",
    "pack",
    "read_request",
    "unpack",
]
