"""A checkpoint behind a websocket, for harnesses that bring their own simulator or robot. Needs `pip install trl-stare[serve]`.

    python recipes/serve_policy.py --model outputs/ipi/interaction --task StackCube-v1

Speaks as OpenPI's server does (msgpack, metadata first), so that its client works too; docs/evaluation.md says what is sent. Listens on
loopback only: there is neither a password nor encryption, so reach it from elsewhere through `ssh -L 8000:127.0.0.1:8000`.
"""

import logging
import signal
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser

from trl_stare import TokenPolicy
from trl_stare.envs import get_simulated_task
from trl_stare.runs import set_entries
from trl_stare.serving import Limits, PolicyServer
from trl_stare.tasks import import_tasks

logger = logging.getLogger("serve_policy")


@dataclass
class ServeArguments:
    """What to serve where."""

    model: str = field(metadata={"help": "Checkpoint (folder or Hub id)."})
    task: str = field(metadata={"help": "Registered task: clients are told its instruction and control mode."})
    task_module: str | None = field(
        default=None, metadata={"help": "Module, or its file, of your own tasks and policies."}
    )
    policy: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "How the checkpoint is loaded: `unnorm_key`, `dtype`, fields of its configuration."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Where to listen. Other than loopback is open to all."})
    port: int = field(default=8000, metadata={"help": "0 takes a free one."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, unless a request says; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Of sampling, in every new connection."})
    max_megabytes: int = field(default=64, metadata={"help": "Largest message."})
    max_connections: int = field(default=16, metadata={"help": "Clients at a time."})


def main(args: ServeArguments) -> None:
    """Load, and serve until interrupted."""
    import_tasks(args.task_module)
    task = get_simulated_task(args.task)
    policy = TokenPolicy.from_pretrained(args.model, **args.policy)
    policy.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    limits = Limits(max_bytes=args.max_megabytes * 2**20, max_connections=args.max_connections)
    server = PolicyServer(
        policy,
        args.host,
        args.port,
        temperature=args.temperature,
        seed=args.seed,
        limits=limits,
        model=args.model,
        task=task.name,
        instruction=task.instruction,
        control_mode=task.control_mode,
    )
    if args.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("%s is not loopback: whoever reaches it can use it.", args.host)
    logger.info("serving %s at %s", args.model, server.url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.close()  # the process would wait for clients that stay
        logger.info("stopped")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(set_entries(*HfArgumentParser(ServeArguments).parse_args_into_dataclasses(return_remaining_strings=True)))
