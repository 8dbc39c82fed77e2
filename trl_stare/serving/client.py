"""The other end of a [`PolicyServer`]: asks it, or is a policy wherever one acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from trl_stare.interfaces import ActionSample, Observation
from trl_stare.serving.protocol import PROTOCOL
from trl_stare.serving.wire import pack, unpack


class RemotePolicy:
    """A policy that acts elsewhere. It can play and be evaluated as a local one, with the same actions; it cannot be trained.

    Args:
        url (`str`): of a [`PolicyServer`].
        timeout (`float`): seconds to wait for the server.

    Attributes:
        metadata (`dict`): what the server told of itself, see [`describe`]. chunk_size (`int`): `C`. action_dim (`int`): `A`.

    Raises:
        ConnectionError: if there is no such server, or it leaves. TimeoutError: if it does not answer.

    Example: `evaluate(RemotePolicy("ws://127.0.0.1:8000"), env, plan, range(100), temperature=1.0, seed=0)`.
    """

    def __init__(self, url: str = "ws://127.0.0.1:8000", *, timeout: float = 60.0):
        self.url, self.timeout, self._generator = url, timeout, None
        try:
            # the server is trusted with the size of its answers
            self._connection = connect(url, compression=None, max_size=None, open_timeout=timeout, proxy=None)
        except OSError as error:
            raise ConnectionError(f"`url` must be that of a running policy server, got {url}: {error}.") from error
        self.metadata: dict[str, Any] = self._receive()
        if self.metadata.get("protocol") != PROTOCOL:
            raise ConnectionError(f"{url} must speak {PROTOCOL}, got {self.metadata.get('protocol')!r}.")
        self.chunk_size, self.action_dim = self.metadata["chunk_size"], self.metadata["action_dim"]

    def infer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask once, see [`read_request`] for the fields; arrays may be NumPy's or tensors.

        Returns:
            `actions` `[C, A]` or `[N, C, A]` in robot units, `trace`, `logps`, `server_timing`.

        Raises:
            ValueError: if the server refuses the request or the policy failed, with its words. ConnectionError: if it leaves. TimeoutError:
                if it does not answer.
        """
        message, most = pack(dict(request)), self.metadata["limits"]["max_bytes"]
        if len(message) > most:
            raise ValueError(f"`request` must have at most {most} bytes, got {len(message)}. Ask in parts.")
        try:
            self._connection.send(message)
        except ConnectionClosed as closed:
            raise ConnectionError(f"{self.url} closed the connection: {closed}.") from closed
        return self._receive()

    def reset(self, seed: int | None = None) -> None:
        """Begin sampling anew, with `seed` or the server's."""
        self.infer({"reset": True, "seed": seed})

    def prepare(self, obs: Observation) -> dict[str, Any]:
        """What [`act`] sends: the server's policy makes its own inputs of it."""
        inputs = {"image": obs.images, "instruction": list(obs.instructions)}
        return inputs if obs.state is None else inputs | {"state": obs.state}

    def act(
        self, inputs: dict[str, Any], *, temperature: float, generator: torch.Generator | None = None
    ) -> ActionSample:
        """One chunk a row. A `generator` that was not seen before begins sampling with its seed: fresh, it gives what it would locally."""
        request = {**inputs, "temperature": float(temperature)}
        if generator is not None and generator is not self._generator:
            self._generator = generator
            request |= {"reset": True, "seed": generator.initial_seed()}
        answer = self.infer(request)
        actions, trace, logps = (_tensor(answer[name]) for name in ("actions", "trace", "logps"))
        return ActionSample(actions, trace, logps, features=torch.zeros(len(actions), 0))

    def close(self) -> None:
        """Leave."""
        self._connection.close()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._connection.recv(self.timeout)
        except TimeoutError as error:
            self.close()  # the answer may still come, and would be taken for that to the next request
            raise TimeoutError(f"{self.url} must answer within {self.timeout:g} s, and did not.") from error
        except ConnectionClosed as closed:
            raise ConnectionError(f"{self.url} closed the connection: {closed}.") from closed
        if isinstance(message, str):
            raise ValueError(f"{self.url} refused: {message}")
        return unpack(message)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array.copy())
