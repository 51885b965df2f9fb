"""ε-MSE of the shipped prior on Fashion-MNIST's 10,000 test images, at 20 evenly spaced times.

python benchmarks/prior_loss.py
"""

from __future__ import annotations

import torch

from cmi_lightning.data.fashion import FashionMNIST
from cmi_lightning.denoisers import shipped_prior


@torch.no_grad()
def main() -> None:
    prior, data = shipped_prior(), FashionMNIST(train=False)
    images = torch.stack([data[i]["x"] for i in range(len(data))])
    generator = torch.Generator().manual_seed(0)
    losses = []
    for time in torch.linspace(0, 999, 20).round().long().tolist():
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
