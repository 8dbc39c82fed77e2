"""A real policy over loopback: the same actions as locally, and a server that survives its clients."""

import socket
import threading
import urllib.request
from contextlib import closing

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from trl_stare.envs import make_env
from trl_stare.evaluation import evaluate
from trl_stare.interfaces import Observation
from trl_stare.policies import TokenPolicy, create_tiny_openvla, create_tiny_pi0
from trl_stare.serving import Limits, PolicyServer, RemotePolicy, pack, unpack
from trl_stare.stages import get_plan

TASK = "StackCube-v1"
STATS = {
    TASK: {
        "action": {"scale": [0.7, 0.7, 0.7, 1.0, 1.0, 1.0, 1.0]},
        "state": {"mean": [0.0] * 8, "std": [1.0] * 8},
    }
}
LIMITS = Limits(max_bytes=200_000, max_connections=3)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    policy = TokenPolicy.create_tiny(STATS, image_size=32, chunk_size=10)
    policy.model.eval()
    return policy


@pytest.fixture(scope="module")
def server(policy):
    with PolicyServer(policy, port=0, limits=LIMITS, task=TASK, control_mode="pd_ee_delta_pose") as server:
        yield server


@pytest.fixture
def remote(server):
    with RemotePolicy(server.url, timeout=20) as remote:
        yield remote


def observation(n: int) -> Observation:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, ("stack the red cube",) * n, torch.randn(n, 8, generator=generator))


def one() -> dict:
    obs = observation(1)
    return {"image": obs.images[0], "state": obs.state[0], "instruction": obs.instructions[0]}


def test_the_handshake_says_what_is_served(server, remote):
    told = remote.metadata
    assert {name: told[name] for name in ("protocol", "task", "action_dim", "chunk_size", "control_mode")} == {
        "protocol": "trl-stare/1",
        "task": TASK,
        "action_dim": 7,
        "chunk_size": 10,
        "control_mode": "pd_ee_delta_pose",
    }
    assert (told["image_size"], told["state_size"], told["temperature"], told["seed"]) == (32, 8, 1.0, 0)
    assert told["limits"]["max_bytes"] == 200_000
    assert server.url.startswith("ws://127.0.0.1:")
    health = urllib.request.urlopen(server.url.replace("ws", "http") + "/healthz", timeout=20)
    assert health.read() == b"OK\n"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_remote_policy_samples_as_the_local_one(policy, remote, temperature):
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    for n in (2, 1):
        local = policy.act(policy.prepare(observation(n)), temperature=temperature, generator=ours)
        far = remote.act(remote.prepare(observation(n)), temperature=temperature, generator=theirs)
        assert all(torch.equal(getattr(local, name), getattr(far, name)) for name in ("actions", "trace", "logps"))


SCALED = {"q01": [-1.0] * 7, "q99": [1.0] * 7}


@pytest.mark.parametrize(
    ("make", "settings", "told", "cameras"),
    [
        (create_tiny_openvla, {"oft": {"chunk_size": 2, "num_images": 2, "state_size": 7}}, (2, 7), 2),
        (create_tiny_openvla, {"oft": {"chunk_size": 2}}, (1, None), None),
        (create_tiny_openvla, {}, (1, None), None),
        (create_tiny_pi0, {}, (None, 7), 3),
        (create_tiny_pi0, {}, (None, 7), None),
    ],
)
def test_cameras_and_proprioception_are_those_of_the_policy(make, settings, told, cameras):
    policy = make({"any": {"action": SCALED, "state": SCALED, "proprio": SCALED}}, **settings)
    shape = (2, 28, 28, 3) if cameras is None else (2, cameras, 28, 28, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    obs = Observation(images, ("stack", "lift"), None if told[1] is None else torch.rand(2, told[1]))
    with PolicyServer(policy, port=0) as server, RemotePolicy(server.url, timeout=20) as remote:
        assert (remote.metadata["num_cameras"], remote.metadata["state_size"]) == told
        local = policy.act(policy.prepare(obs), temperature=0.0, generator=None)
        far = remote.act(remote.prepare(obs), temperature=0.0)
        assert torch.equal(far.actions, local.actions)
        if obs.state is not None:
            with pytest.raises(ValueError, match=r"refused: `state` must be \[7\] or \[N, 7\], got none"):
                remote.act(remote.prepare(obs._replace(state=None)), temperature=0.0)
        if told[0] == 2:
            one = {"observation/image": images[0, 0], "observation/wrist_image": images[0, 1], "prompt": "stack"}
            answer = remote.infer(one | {"observation/state": obs.state[0], "temperature": 0.0})
            np.testing.assert_allclose(answer["actions"], local.actions[0], atol=1e-5)


def test_a_session_is_its_own_and_a_reset_begins_it_anew(server, remote):
    first, second = (remote.infer(one())["actions"] for _ in range(2))
    assert first.shape == (10, 7) and first.dtype == np.float32 and not np.array_equal(first, second)
    remote.reset()
    with RemotePolicy(server.url, timeout=20) as other:
        assert np.array_equal(other.infer(one())["actions"], first)  # whatever the first client did
    assert np.array_equal(remote.infer(one())["actions"], first)
    remote.reset(1)
    assert not np.array_equal(remote.infer(one())["actions"], first)


def test_evaluation_through_it_is_local_evaluation(policy, remote):
    plan = get_plan(TASK)
    with closing(make_env(TASK, num_envs=2, num_workers=1, chunk_size=10, image_size=32)) as env:
        local, far = (
            evaluate(actor, env, plan, [5, 6], temperature=1.0, seed=4, progress=False) for actor in (policy, remote)
        )
    assert far[1] == local[1] and far[0].stages == local[0].stages


def test_wrong_requests_are_answered_and_the_session_goes_on(remote):
    with pytest.raises(ValueError, match=r"refused: `state` must be numbers of shape \[8\], got \[2\]"):
        remote.infer(one() | {"state": np.zeros(2)})
    with pytest.raises(ValueError, match=r"refused: `image` must be uint8"):
        remote.infer(one() | {"image": np.zeros((32, 32))})
    assert remote.infer(one())["actions"].shape == (10, 7)


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (b"\xc1", "a message must be msgpack, got 1 bytes"),
        (pack(one())[:-1], "a message must be msgpack"),
        ("reset", "must be a binary message, got text"),
        (pack(3), "a request must be a map, got int"),
    ],
)
def test_broken_messages_are_answered_as_openpis_server_does_it(server, message, answer):
    with connect(server.url, compression=None) as connection:
        connection.recv(20)
        connection.send(message)
        assert answer in connection.recv(20)
        connection.send(pack(one()))
        assert unpack(connection.recv(20))["actions"].shape == (10, 7)


def test_a_failing_policy_is_told_and_served_on(policy, remote, monkeypatch, caplog):
    def fail(inputs, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy, "act", fail)
    with pytest.raises(ValueError, match="the policy failed: out of memory"):
        remote.infer(one())
    assert "the policy failed" in caplog.text
    monkeypatch.undo()
    act = policy.act

    def diverge(inputs, **kwargs):
        sample = act(inputs, **kwargs)
        return sample._replace(actions=sample.actions / 0)

    monkeypatch.setattr(policy, "act", diverge)
    with pytest.raises(ValueError, match="an action is not finite"):
        remote.infer(one())
    monkeypatch.undo()
    assert remote.infer(one())["actions"].shape == (10, 7)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_no_motion(policy, remote, monkeypatch, temperature):
    logits = policy.action_logits

    def overflow(inputs, trace):
        return torch.full_like(logits(inputs, trace)[0], torch.nan), torch.zeros(1, 1)

    monkeypatch.setattr(policy, "action_logits", overflow)
    with pytest.raises(ValueError, match="the policy failed: "):
        remote.infer(one() | {"temperature": temperature})


def test_large_messages_close_only_their_connection(server, remote):
    large = one() | {"image": np.zeros((300, 300, 3), np.uint8)}
    with pytest.raises(ValueError, match="at most 200000 bytes, got 270"):
        remote.infer(large)
    with connect(server.url, compression=None) as rude:
        rude.recv(20)
        rude.send(pack(large))
        with pytest.raises(ConnectionClosed, match="1009"):
            rude.recv(20)
    assert remote.infer(one())["actions"].shape == (10, 7)


def test_clients_that_leave_in_the_middle(server, remote):
    for leave in (lambda c: None, lambda c: c.send(pack(one())), lambda c: c.send(pack(one())[:50])):
        connection = connect(server.url, compression=None)
        connection.recv(20)
        leave(connection)
        connection.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake
        connection.close()
    raw = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    raw.sendall(b"GET / HTTP/1.1\r\nnonsense")
    raw.close()
    assert remote.infer(one())["actions"].shape == (10, 7)


def test_web_pages_and_crowds_are_turned_away(server):
    with pytest.raises(InvalidStatus, match="403"):
        connect(server.url, origin="http://example.com")
    crowd = []
    try:
        with pytest.raises(ConnectionError, match="at most 3 connections"):
            for _ in range(4):
                crowd.append(RemotePolicy(server.url, timeout=20))
    finally:
        for client in crowd:
            client.close()
    assert len(crowd) == 3


def test_clients_at_the_same_time_take_turns(server, policy):
    expected = policy.act(
        policy.prepare(observation(2)), temperature=1.0, generator=torch.Generator().manual_seed(8)
    ).actions
    answers = {}

    def ask(name):
        with RemotePolicy(server.url, timeout=20) as client:
            inputs = client.prepare(observation(2))
            answers[name] = client.act(inputs, temperature=1.0, generator=torch.Generator().manual_seed(8)).actions

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 3 and all(torch.equal(actions, expected) for actions in answers.values())


def test_a_server_that_is_not_there_or_silent():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises((ConnectionError, TimeoutError), match=str(port)):
            RemotePolicy(f"ws://127.0.0.1:{port}", timeout=0.3)
    with pytest.raises(ConnectionError, match="must be that of a running policy server"):
        RemotePolicy(f"ws://127.0.0.1:{port}", timeout=1)


def test_a_slow_answer_times_out(server, policy, monkeypatch):
    release = threading.Event()
    act = policy.act

    def wait(inputs, **kwargs):
        release.wait(20)
        return act(inputs, **kwargs)

    monkeypatch.setattr(policy, "act", wait)
    with RemotePolicy(server.url, timeout=20) as hasty, pytest.raises(TimeoutError, match="within 0.2 s"):
        hasty.timeout = 0.2  # a busy machine may take longer than that to connect
        hasty.infer(one())
    release.set()


def test_stopping_ends_the_sessions_of_clients_that_stay(policy):
    before = threading.active_count()
    with PolicyServer(policy, port=0, limits=LIMITS) as server:
        clients = [RemotePolicy(server.url, timeout=20) for _ in range(2)]
        assert all(client.infer(one())["actions"].shape == (10, 7) for client in clients)
    for client in clients:
        with pytest.raises(ConnectionError):
            client.infer(one())
        client.close()
    for thread in threading.enumerate()[before:]:
        thread.join(timeout=20)
    assert threading.active_count() <= before
