"""The network behind the metrics on garments: a small classifier of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from cmi_lightning.denoisers.weights import load_weights
from cmi_lightning.paths import ASSETS

WEIGHTS = ASSETS / "fashion_mnist_classifier.safetensors"
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class _Unit(nn.Module):
    """SiLU(norm(conv(x))), plus x where the shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.residual = channels_in == channels_out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class GarmentClassifier(nn.Module):
    """A convolutional classifier of Fashion-MNIST, for its features.

    Seven 3×3 convolutions with batch normalisation and SiLU, in four stages at 32², 16², 8² and 4²
    pixels with 16, 48, 96 and 64 channels. The mean over the last stage's pixels are the 64
    features that a linear layer classifies.

    Args:
        pretrained: with the weights that ship with the package, in evaluation mode and frozen.

    Example:
        >>> import torch
        >>> GarmentClassifier().embed(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 64])
    """

    image_shape, title = (1, 32, 32), "garment classifier"
    file: Path | None = None

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        stages = [(_Unit(1, 16),), (_Unit(16, 48, 2), _Unit(48, 48))]
        stages += [(_Unit(48, 96, 2), _Unit(96, 96)), (_Unit(96, 96, 2), _Unit(96, 64))]
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.head = nn.Linear(64, len(CLASSES))
        if pretrained:
            load_weights(self, WEIGHTS)
            self.file = WEIGHTS
            self.requires_grad_(False).eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the stages' feature maps of images (B, 1, 32, 32) in [0, 1], shallow to deep."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Return the features (B, 64) that are classified."""
        return self.features(x)[-1].mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, 10) of the classes."""
        logits: Tensor = self.head(self.embed(x))
        return logits
