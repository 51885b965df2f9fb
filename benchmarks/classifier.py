"""The garment classifier of the metrics: how it was trained, and how good it is.

    python benchmarks/classifier.py train [--epochs 8] [--output classifier.safetensors]
    python benchmarks/classifier.py test  [--weights classifier.safetensors]

Trained on Fashion-MNIST's training images less the last 1,024, as the prior; ``train`` looks at
those alone, ``test`` gives the accuracy on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cmi_lightning.callbacks.classifier import CLASSES, WEIGHTS, GarmentClassifier
from cmi_lightning.data.fashion import DEBIAN_FOLDER, NUM_HELD_OUT, FashionMNIST
from cmi_lightning.denoisers.weights import load_weights

BATCH, PEAK, WARMUP, DECAY, SMOOTHING = 128, 3e-3, 0.15, 0.05, 0.05
AVERAGE, SHIFT, SEED = 0.998, 1, 0


def read(train: bool, root: str | None) -> tuple[Tensor, Tensor]:
    """Return 8-bit images (N, 1, 32, 32) and labels (N,)."""
    images = FashionMNIST(train, root).pixels
    folder = Path(root).expanduser() if root else DEBIAN_FOLDER
    if not folder.is_dir():
        folder = Path("~/.cache/cmi-lightning/FashionMNIST/raw").expanduser()
    with gzip.open(folder / f"{'train' if train else 't10k'}-labels-idx1-ubyte.gz") as file:
        labels = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).copy())
    if len(labels) != len(images):
        raise SystemExit(f"{len(labels)} labels for {len(images)} images in '{folder}'.")
    return images, labels.long()


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images (B, 1, H, W) and move each by up to SHIFT pixels both ways."""
    batch, _, height, width = x.shape
    x = F.pad(x, (SHIFT,) * 4)[:, 0]
    move = torch.randint(2 * SHIFT + 1, (2, batch, 1), generator=generator)
    rows, columns = move[0] + torch.arange(height), move[1] + torch.arange(width)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return x[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


@torch.no_grad()
def predict(network: GarmentClassifier, images: Tensor) -> Tensor:
    """Return the logits (N, 10) of 8-bit images."""
    return torch.cat([network.eval()(x.float() / 255) for x in images.split(500)])


def accuracy(network: GarmentClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified right."""
    return (predict(network, images).argmax(1) == labels).float().mean().item()


def train(args: argparse.Namespace) -> None:
    images, labels = read(True, args.root)
    images, held_out = images[:-NUM_HELD_OUT], images[-NUM_HELD_OUT:]
    labels, held_out_labels = labels[:-NUM_HELD_OUT], labels[-NUM_HELD_OUT:]
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = GarmentClassifier(pretrained=False).to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE), use_buffers=True
    )
    optimizer = torch.optim.AdamW(network.parameters(), PEAK, weight_decay=DECAY)
    total, step = args.epochs * (len(images) // BATCH), 0
    started = time.perf_counter()
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {total:,} steps")
    for epoch in range(args.epochs):
        losses = []
        network.train()
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(rows) < BATCH:
                break
            warm = min(1.0, (step + 1) / (WARMUP * total))
            done = max(0.0, step / total - WARMUP) / (1 - WARMUP)
            cosine = 0.5 * (1 + math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = PEAK * warm * cosine
            x = (augment(images[rows], generator).float() / 255).to(
                memory_format=torch.channels_last
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                logits = network(x)
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(network)
            losses.append(float(loss.detach()))
            step += 1
        right = accuracy(average.module, held_out, held_out_labels)
        seconds = time.perf_counter() - started
        loss_mean = sum(losses) / len(losses)
        print(
            f"epoch {epoch + 1}: loss {loss_mean:.4f}, held out {right:.4f}, {seconds:.0f} s",
            flush=True,
        )
        save_file(
            {name: value.contiguous() for name, value in average.module.state_dict().items()},
            args.output,
        )


def test(args: argparse.Namespace) -> None:
    network = GarmentClassifier(pretrained=False)
    load_weights(network, args.weights)
    images, labels = read(False, args.root)
    logits = predict(network, images)
    right = logits.argmax(1) == labels
    error = math.sqrt(right.float().var().item() / len(right))
    print(
        f"{args.weights}: {Path(args.weights).stat().st_size:,} bytes, SHA-256 "
        f"{hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()}"
    )
    print(f"accuracy on {len(right):,} test images: {right.float().mean():.4f} ± {error:.4f}")
    print(f"cross-entropy: {F.cross_entropy(logits, labels):.4f}")
    for i, name in enumerate(CLASSES):
        print(f"  {name:12s} {right[labels == i].float().mean():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, run in (("train", train), ("test", test)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--root", help="folder of Fashion-MNIST's *-ubyte.gz files")
        if name == "train":
            command.add_argument("--epochs", type=int, default=8)
            command.add_argument("--threads", type=int, default=1)
            command.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
            command.add_argument("--output", default="classifier.safetensors")
        else:
            command.add_argument("--weights", default=str(WEIGHTS))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
