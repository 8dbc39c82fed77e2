"""What OpenVLA costs at its real size: decisions of a rollout, updates of PPO and StA-TPO under a LoRA. Random weights, bfloat16.

    python benchmarks/openvla.py --json openvla.json              # openvla-7b, one GPU of 80 GB or more
    python benchmarks/openvla.py --size tiny --device cpu --batches 1,2     # the same code in seconds, its figures say nothing

Yardsticks for one Hopper card at half its peak: 110 environment steps/s of the policy that decides token by token, and 51 samples/s of
an update with a LoRA. Of every figure: the median of `--repeats`, FLOPs as PyTorch counts them in one run more, their share of
`--peak_tflops` (989: dense bfloat16 of an H100 or H200 by its data sheet), and the most memory that was allocated.
Updates double their micro-batch until the memory is full.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from trl_stare import OpenVLAConfig, OpenVLAProcessor
from trl_stare.losses import ppo_policy_loss
from trl_stare.policies import OpenVLAImageProcessor, OpenVLAOFTPolicy, OpenVLAPolicy, create_tiny_openvla
from trl_stare.policies.openvla.tiny import build_tokenizer

STATISTICS = {"toy": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
PROMPT_TOKENS = 32
LORA = {"r": 32, "lora_alpha": 16, "target_modules": "all-linear"}


def make_policy(size: str, device: torch.device, oft: dict[str, Any] | None) -> OpenVLAPolicy:
    """Of random weights, made on the device: openvla-7b on the CPU would take minutes and 30 GB."""
    torch.manual_seed(0)
    if size == "tiny":
        policy = create_tiny_openvla(STATISTICS, oft=oft)
        policy.model.to(device, torch.bfloat16)
        return policy
    config = OpenVLAConfig(norm_stats=STATISTICS, oft=oft)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    processor = OpenVLAProcessor(OpenVLAImageProcessor.of_config(config), build_tokenizer())
    return (OpenVLAPolicy if oft is None else OpenVLAOFTPolicy)(model, processor)


def make_inputs(policy: OpenVLAPolicy, batch: int) -> dict[str, Tensor]:
    """Noise to look at and a prompt of the usual length: how text is cut into tokens is not what is measured."""
    config, generator = policy.model.config, torch.Generator().manual_seed(0)
    text = torch.randint(1000, 20000, (batch, PROMPT_TOKENS), generator=generator)
    images = torch.full((batch, config.num_image_tokens), config.image_token_id)
    ids = torch.cat([torch.full((batch, 1), policy.processor.tokenizer.bos_token_id), images, text], dim=1)
    pixels = torch.randint(0, 256, (batch, 3, *config.image_sizes), dtype=torch.uint8, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def measure(
    run: Callable[[], Any], count: int, name: str, device: torch.device, repeats: int, peak_tflops: float
) -> dict[str, float]:
    """Seconds of `run`, which does `count` of what `name` counts; the first run, which compiles and allocates, is left out."""
    is_gpu = device.type == "cuda"
    run()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        if is_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    with FlopCounterMode(display=False) as counter:
        run()
    median, flops = statistics.median(seconds), counter.get_total_flops()
    figures = {f"{name}_per_s": count / median, "seconds": median, "tflop": flops / 1e12}
    figures["share_of_peak"] = flops / median / (peak_tflops * 1e12)
    return figures | ({"peak_gb": torch.cuda.max_memory_allocated(device) / 1e9} if is_gpu else {})


def rollouts(policy: OpenVLAPolicy, batches: list[int], **how: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Whole decisions, and the reading of the prompt alone."""
    generator, kind = torch.Generator().manual_seed(0), "oft" if policy.model.config.oft else "openvla"
    for batch in batches:
        inputs = {name: value.to(policy.device) for name, value in make_inputs(policy, batch).items()}

        def act(inputs: dict[str, Tensor] = inputs) -> None:
            policy.act(inputs, temperature=1.0, generator=generator)

        @torch.no_grad()
        def prefill(inputs: dict[str, Tensor] = inputs) -> None:
            policy.forward(inputs, use_cache=True, logits_to_keep=1)

        yield f"{kind}/act/{batch}", measure(act, batch * policy.chunk_size, "env_steps", **how)
        if kind == "openvla":
            yield f"{kind}/prefill/{batch}", measure(prefill, batch, "prompts", **how)


def updates(policy: OpenVLAPolicy, limit: int, **how: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """A LoRA's PPO update and StA-TPO step, backward and AdamW included, with micro-batches of 1, 2, 4, ... until memory is full."""
    policy.model = get_peft_model(policy.model, LoraConfig(**LORA)).train()
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for kind, make in (("ppo", _ppo_loss), ("sta-tpo", _preference_loss)):
        batch = 1 if kind == "ppo" else 2  # a pair has two sides
        while batch <= limit:
            loss = make(policy, batch)

            def step(loss: Callable[[], Tensor] = loss) -> None:
                with torch.autocast(policy.device.type, torch.bfloat16):
                    value = loss()
                value.backward()
                optimizer.step()
                optimizer.zero_grad()

            try:
                yield f"lora/{kind}/{batch}", measure(step, batch, "samples", **how)
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                break
            batch *= 2


def _ppo_loss(policy: OpenVLAPolicy, batch: int) -> Callable[[], Tensor]:
    inputs = make_inputs(policy, batch)
    trace = torch.randint(0, policy.bins.num_bins, (batch, policy.num_tokens))
    logps = torch.full((batch, policy.num_tokens), -5.5, device=policy.device)
    mask, advantages = torch.ones_like(logps, dtype=torch.bool), torch.ones(batch, device=policy.device)
    settings = {"clip_range": 0.2, "level": "action", "action_dim": policy.action_dim}
    return lambda: ppo_policy_loss(policy.evaluate(inputs, trace).logps, logps, advantages, mask, **settings).loss


def _preference_loss(policy: OpenVLAPolicy, batch: int) -> Callable[[], Tensor]:
    """The first half of the decisions is chosen; the reference is scored once, before training, and not part of a step."""
    inputs = make_inputs(policy, batch)
    trace = torch.randint(0, policy.bins.num_bins, (batch, policy.num_tokens))
    half = batch // 2

    def loss() -> Tensor:
        score = policy.score(inputs, trace)
        return -torch.nn.functional.logsigmoid(score[:half].mean() - score[half:].mean())

    return loss


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, show, and write the figures."""
    device = torch.device(args.device)
    how = {"device": device, "repeats": args.repeats, "peak_tflops": args.peak_tflops}
    batches = [int(batch) for batch in args.batches.split(",")]
    found = {"size": args.size, "device": device.type, "torch": torch.__version__, "machine": platform.platform()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    rows, console = {}, Console()
    for oft in (None, {"chunk_size": args.oft_chunk}):
        policy = make_policy(args.size, device, oft)
        parts = [rollouts(policy, batches, **how)] + (
            [updates(policy, args.largest_update, **how)] if oft is None else []
        )
        for part in parts:
            for name, figures in part:
                rows[name] = figures
                console.print(name, {key: float(f"{value:.4g}") for key, value in figures.items()})
                if args.json:  # what was measured is kept, whatever comes
                    args.json.write_text(json.dumps(found | {"figures": rows}, indent=1) + "\n")
        del policy, parts, part
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found | {"figures": rows}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--size", choices=("openvla-7b", "tiny"), default="openvla-7b", help="of the model")
    parser.add_argument("--device", default="cuda", help="where it runs")
    parser.add_argument("--batches", default="1,8,32,64", help="environments that act at once")
    parser.add_argument("--largest_update", type=int, default=256, help="micro-batch at which doubling ends")
    parser.add_argument(
        "--oft_chunk", type=int, default=5, help="steps of OpenVLA-OFT's chunk: 5 for Bridge, 8 for LIBERO"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measurements")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the card, dense bfloat16")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
