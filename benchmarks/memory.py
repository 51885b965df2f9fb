"""Peak memory and seconds per step of FFHQ's network, with and without checkpointing.

    python benchmarks/memory.py                                    every case, as a Markdown table
    python benchmarks/memory.py --methods DPS --batches 1 --size 128

The network is guided-diffusion's for FFHQ (93.6 million parameters) with random weights; what it
computes is meaningless, what it costs is not. Each case runs in a process of its own: the network
is built, then one step, t = 500 of the 1,000-step chain, is taken on super-resolution ×4.

Memory is what the step needs beyond the process with its network: on the CPU the growth of the
largest resident set (VmHWM), on a GPU the growth of the largest sum of allocated
tensors. Seconds are the step's, a little more than those of the steps that would follow it.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from cmi_lightning.denoisers import NetworkDenoiser, card_unet
from cmi_lightning.guidance import CMI, DPS, Guidance
from cmi_lightning.information import Lanczos
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Downsample
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM
from cmi_lightning.step import Cost, Step

METHODS: dict[str, list[Guidance]] = {
    "none": [],
    "DPS": [DPS()],
    "CMI+DPS": [DPS(), CMI(interval=1)],
    "CMI+DPS, autograd": [DPS(), CMI(interval=1, estimator=Lanczos(derivative="autograd"))],
    "CMI+DPS, difference": [DPS(), CMI(interval=1, estimator=Lanczos(derivative="difference"))],
}
INDEX = 500


def random_network(checkpoint: bool, device: str) -> NetworkDenoiser:
    """The FFHQ network, its zero-initialised layers made small random ones."""
    torch.manual_seed(0)
    with torch.device(device):
        network = card_unet("ffhq-256", checkpoint)
        for p in network.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, std=0.1 * p[0].numel() ** -0.5)
    return NetworkDenoiser(network, None, image_shape=(3, None, None))


def peak(device: str) -> float:
    """Largest memory so far, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:  # of this program alone: ru_maxrss starts at the parent's size
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10  # type: ignore[index]
    except (OSError, TypeError):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(method: str, checkpoint: bool, batch: int, size: int, device: str) -> dict[str, float]:
    """Take one step and return its memory in MiB and its seconds."""
    denoiser = random_network(checkpoint, device)
    sampler = Sampler(denoiser, DDPM("learned"), METHODS[method])
    like = torch.zeros(batch, 3, size, size, device=device)
    noise = SampleNoise(0, [str(i) for i in range(batch)])
    x = noise.normal("image", 0, like).clamp(-1, 1)
    problem = Problem.simulate(x, Downsample(4), 0.05, noise)
    before, cost = peak(device), Cost()
    t, s = sampler.schedule[INDEX], sampler.schedule[INDEX - 1]
    started = time.perf_counter()
    step = Step(INDEX, x, t, s, problem, denoiser, noise, sampler.differentiable, cost)
    x = sampler.advance(step)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if not x.isfinite().all():
        raise RuntimeError(f"{method}: the result is not finite.")
    return {
        "memory": peak(device) - before,
        "network": before,
        "seconds": seconds,
        "forwards": cost.forwards,
        "vjps": cost.vjps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--checkpoint", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**options.case)))
        return
    print(f"{options.size}x{options.size}, {options.device}, {torch.get_num_threads()} threads")
    print("| method | checkpoint | batch | memory, MiB | seconds | forwards | vjps |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for batch in options.batches:
        for method in options.methods:
            for checkpoint in options.checkpoint:
                case = {
                    "method": method,
                    "checkpoint": checkpoint == "on",
                    "batch": batch,
                    "size": options.size,
                    "device": options.device,
                }
                command = [sys.executable, __file__, "--case", json.dumps(case)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"| {method} | {checkpoint} | {batch} | failed ({done.returncode}) |")
                    print(done.stderr[-2000:], file=sys.stderr)
                    continue
                r = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {method} | {checkpoint} | {batch} | {r['memory']:.0f} | {r['seconds']:.1f} "
                    f"| {r['forwards']:g} | {r['vjps']:g} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
