"""The server: one policy, any number of clients that take turns, and nothing a client sends can bring it down."""

from __future__ import annotations

import logging
import threading
import time
from http import HTTPStatus
from typing import Any

import torch
from websockets import Request as HTTPRequest
from websockets import Response
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from trl_stare.interfaces import VLAPolicy
from trl_stare.serving.protocol import Limits, Request, describe, read_request
from trl_stare.serving.wire import pack, unpack

logger = logging.getLogger(__name__)


class PolicyServer:
    """Serves a policy at `ws://host:port`, as OpenPI's server does: metadata first, then an answer for every request.

    A connection is a session with a generator of its own: the same requests over a new connection get the same answers, whatever other
    clients do. A request that is refused is answered by a text message that says why, and the connection goes on. Connections from web
    pages are refused, and so are messages over `limits.max_bytes`. There is neither a password nor encryption: keep it on loopback, and reach it
    from elsewhere through an SSH tunnel.

    Args:
        policy (`VLAPolicy`): who acts.
        host (`str`), port (`int`): where it listens; port 0 takes a free one.
        temperature (`float`), seed (`int`): of sampling, where a request says nothing.
        limits ([`Limits`], *optional*): what it takes.
        metadata: what clients are told besides, e.g. `task="StackCube-v1"`.

    Raises:
        ValueError: if `temperature` or a limit makes no sense. OSError: if the port is taken.

    Example:

    ```python
    >>> with PolicyServer(policy, port=0) as server, RemotePolicy(server.url) as remote:
    ...     remote.infer({"image": image, "state": state, "instruction": "stack the red cube"})["actions"].shape
    (4, 7)
    ```
    """

    def __init__(
        self,
        policy: VLAPolicy,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        limits: Limits | None = None,
        **metadata: Any,
    ):
        if temperature < 0:
            raise ValueError(f"`temperature` must be at least 0, got {temperature}.")
        self.policy, self.temperature, self.seed, self.limits = policy, temperature, seed, limits or Limits()
        self.metadata = describe(policy, temperature=temperature, seed=seed, limits=self.limits, **metadata)
        self._sizes = self.metadata["state_size"], self.metadata["num_cameras"]
        self._turn = threading.Lock()
        self._free = threading.BoundedSemaphore(self.limits.max_connections)
        self._sessions: set[ServerConnection] = set()
        self._server = serve(
            self._handle,
            host,
            port,
            # a page in a browser could otherwise reach a server on loopback: it always names its origin
            origins=[None],
            # pictures hardly shrink, and a small message must not become a large one
            compression=None,
            max_size=self.limits.max_bytes,
            max_queue=1,
            process_request=_health,
        )
        host, port = self._server.socket.getsockname()[:2]
        self.url = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"

    def serve_forever(self) -> None:
        """Answer until [`close`] is called from another thread, or the process is interrupted."""
        self._server.serve_forever()

    def close(self) -> None:
        """Take no more connections, and end those there are: clients are told 1001, going away."""
        self._server.shutdown()
        for connection in tuple(self._sessions):
            connection.close(1001, "the server was stopped")

    def __enter__(self) -> PolicyServer:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
        self._thread.join()

    def _handle(self, connection: ServerConnection) -> None:
        """One session, in its own thread."""
        peer = connection.remote_address
        if not self._free.acquire(blocking=False):
            connection.close(1013, f"at most {self.limits.max_connections} connections")
            return
        generator = torch.Generator().manual_seed(self.seed)
        logger.info("%s connected", peer)
        self._sessions.add(connection)
        try:
            connection.send(pack(self.metadata))
            for message in connection:
                connection.send(self._answer(message, generator))
        except ConnectionClosed as closed:
            logger.info("%s left in the middle: %s", peer, closed)
        finally:
            self._sessions.discard(connection)
            self._free.release()
            logger.info("%s gone", peer)

    def _answer(self, message: bytes | str, generator: torch.Generator) -> bytes | str:
        """The chunk, or, as text, what was wrong."""
        try:
            if isinstance(message, str):
                raise ValueError("a request must be a binary message, got text.")
            request = read_request(unpack(message), self.limits, *self._sizes)
            return pack(self._decide(request, generator))
        except ValueError as error:
            return str(error)
        except RuntimeError as error:  # PyTorch's, out of memory included
            logger.exception("the policy failed")
            return f"the policy failed: {error}"

    def _decide(self, request: Request, generator: torch.Generator) -> dict[str, Any]:
        """`actions` `[N, C, A]` robot units, `trace` and `logps` as sampled; without the dimension `N` for a single observation."""
        if request.reset:
            generator.manual_seed(self.seed if request.seed is None else request.seed)
        if request.obs is None:
            return {"reset": True}
        temperature = self.temperature if request.temperature is None else request.temperature
        with self._turn, torch.no_grad():
            began = time.perf_counter()
            sample = self.policy.act(self.policy.prepare(request.obs), temperature=temperature, generator=generator)
            infer_ms = 1000 * (time.perf_counter() - began)
        if not sample.actions.isfinite().all():
            raise RuntimeError("an action is not finite. Do not send it to a robot.")
        parts = {"actions": sample.actions, "trace": sample.trace, "logps": sample.logps}
        answer = {name: value[0] if request.single else value for name, value in parts.items()}
        return answer | {"server_timing": {"infer_ms": infer_ms}}


def _health(connection: ServerConnection, request: HTTPRequest) -> Response | None:
    """`GET /healthz`, what load balancers and OpenPI's clients ask."""
    return connection.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None
