"""ε-MSE of the shipped prior on Fashion-MNIST's 10,000 test images, at 20 evenly spaced times.

    python benchmarks/prior_loss.py [--precision fp32] [--times 25:975]

Two sets of times are evenly spaced: 0, 53, …, 999 (both ends, the default, and the harder one: at
t = 0 the noise of σ = 0.01 on textured pixels can hardly be told from texture) and the midpoints
25, 75, …, 975.
"""

from __future__ import annotations

import argparse

import torch

from cmi_lightning.data.fashion import FashionMNIST
from cmi_lightning.denoisers import Autocast, Denoiser, shipped_prior


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--times", default="0:999", help="first:last of the 20 times")
    parser.add_argument("--count", type=int, default=10_000, help="test images")
    args = parser.parse_args()
    first, last = map(int, args.times.split(":"))

    prior: Denoiser = shipped_prior("fashion-mnist")
    if args.precision == "bf16":
        prior = Autocast(prior, torch.bfloat16)
    data = FashionMNIST(train=False)
    images = torch.stack([data[i]["x"] for i in range(args.count)])
    generator = torch.Generator().manual_seed(0)
    losses = []
    for time in torch.linspace(first, last, 20).round().long().tolist():
        level, total = prior.schedule[time], 0.0
        for x0 in images.split(250):
            noise = torch.randn(x0.shape, generator=generator)
            x = level.alpha * x0 + level.sigma * noise
            epsilon = (x - level.alpha * prior(x, level).x0) / level.sigma
            total += float((epsilon - noise).square().flatten(1).mean(1).sum())
        losses.append(total / len(images))
        print(f"t = {time:3d}: {losses[-1]:.5f}", flush=True)
    print(f"mean of {len(losses)} times: {sum(losses) / len(losses):.5f}")


if __name__ == "__main__":
    main()
