"""The positive control: a small convolutional network that does learn Pathfinder, so that what fails is the model."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lra.data import TrainingOrder
from lra.seeding import seed_all

SYMMETRIES = 8
"""Of the square: turned and mirrored images have the same label."""


@dataclass(frozen=True)
class Recipe:
    """Size and training of the network.

    width          channels at full resolution; twice as many after each halving
    blocks         residual blocks of two convolutions at each resolution
    epochs         passes over the training images, at least 1
    learning_rate  peak of AdamW's one-cycle schedule
    """

    width: int = 64
    blocks: tuple[int, ...] = (3, 3, 3)
    epochs: int = 16
    batch_size: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """right: of each test image, after the last step; there is no choice of a checkpoint."""

    right: np.ndarray
    parameters: int
    train_loss: float  # mean of the last epoch
    seconds: float

    def summary(self) -> dict[str, float]:
        """What a record keeps of it."""
        return {"parameters": self.parameters, "train_loss": self.train_loss, "seconds": self.seconds}


class Residual(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x))))), then ReLU; where the shape changes, x through a 1×1 convolution."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.branch(x))


class Network(nn.Module):
    """Images (B, 1, side, side) in 0 … 1 to logits (B, classes): a residual network with a mean at its end."""

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        channels = recipe.width
        layers: list[nn.Module] = [
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
        for stage, blocks in enumerate(recipe.blocks):
            for block in range(blocks):
                out = recipe.width << stage
                layers.append(Residual(channels, out, 2 if stage and not block else 1))
                channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


def train(
    train_images: tuple[np.ndarray, np.ndarray],
    test_images: tuple[np.ndarray, np.ndarray],
    recipe: Recipe,
    device: torch.device,
    num_classes: int = 2,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Result:
    """Train on images (n, side, side) uint8 with labels (n,); `on_epoch` gets the epochs done and the last one's loss.

    Every eighth of a batch is turned and mirrored in another way, since labels do not change with that.
    """
    started = time.perf_counter()
    images, labels = _load(train_images, device)
    seed_all(recipe.seed, "control")
    network = Network(recipe, num_classes).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = min(recipe.batch_size, len(labels))
    steps = len(labels) // batch  # of an epoch
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * steps + 1, pct_start=0.2
    )
    order = TrainingOrder(len(labels), batch, recipe.seed, device)
    index = torch.empty(batch, dtype=torch.long, device=device)
    mean = 0.0
    for epoch in range(recipe.epochs):
        total = torch.zeros((), device=device)
        for step in range(epoch * steps, (epoch + 1) * steps):
            order.write(step, index)
            with _autocast(device):
                logits = network(_scaled(symmetric(images[index])))
            loss = functional.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        mean = float(total) / steps
        on_epoch(epoch + 1, mean)
    right = _right(network.eval(), *_load(test_images, device), recipe.batch_size)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Result(right, parameters, mean, time.perf_counter() - started)


def symmetric(images: Tensor) -> Tensor:
    """A batch (B, side, side) of which every eighth is turned and mirrored in another of the eight ways, in order."""
    parts = []
    for way, part in enumerate(images.chunk(SYMMETRIES)):
        part = torch.rot90(part, way % 4, (1, 2))
        parts.append(part.flip(2) if way >= 4 else part)
    return torch.cat(parts)


@torch.no_grad()
def _right(network: nn.Module, images: Tensor, labels: Tensor, batch: int) -> np.ndarray:
    guesses = []
    for part in images.split(batch):
        with _autocast(images.device):
            guesses.append(network(_scaled(part)).argmax(1))
    return (torch.cat(guesses) == labels).cpu().numpy()


def _load(split: tuple[np.ndarray, np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = split
    return torch.tensor(images, device=device), torch.tensor(labels, device=device).long()


def _scaled(images: Tensor) -> Tensor:
    scaled = images[:, None].float() / 255
    return scaled.contiguous(memory_format=torch.channels_last)


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
