"""The efficiency protocols of papers, `conf/efficiency/*.yaml`: what they fix, and the calls that are timed.

Two kinds. `step`: one training step of a classifier, at the lengths and batches of the paper. `layer`: forward and
backward of one encoder layer, at the largest batch that fits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

import attention
from attention import Attention
from lra.efficiency.cases import BASELINE, table_options
from lra.errors import UserError
from lra.model import Block, build_classifier
from lra.module import objective
from lra.seeding import seed_all

FOLDER = Path(__file__).parents[2] / "conf" / "efficiency"
KINDS = ("step", "layer")


@dataclass(frozen=True)
class Case:
    """One column of a paper's table.

    batch        None: the largest power of two that fits
    logit_std    of a layer: spread of q kᵀ / √D where the approximation error is measured
    """

    task: str
    length: int
    batch: int | None = None
    classes: int = 2
    two_towers: bool = False
    logit_std: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.task}-{self.length}"


@dataclass(frozen=True)
class Protocol:
    """A paper's protocol. `steps`: of a whole training, for its hours; `settings`: options to measure, by attention."""

    name: str
    kind: str
    model: dict[str, Any]
    cases: list[Case]
    steps: int | None = None
    published: str | None = None
    settings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def options(self, name: str, case: Case) -> list[dict[str, Any]]:
        """Every option of an attention in a case, once for each of its settings."""
        plain = {**attention.options(name), **table_options(name, case.length, self.model["num_heads"])}
        return [{**plain, **changed} for changed in self.settings.get(name, [{}])]


def load(name: str, folder: Path = FOLDER) -> Protocol:
    """The protocol in `<name>.yaml`; UserError for one that is not there or says something else."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"--protocol {name} is unknown; known: {', '.join(names(folder))}")
    held: Any = OmegaConf.to_object(OmegaConf.load(path))
    unknown = sorted(held.keys() - {each.name for each in fields(Protocol)})
    if unknown or held.get("kind") not in KINDS or held.get("name") != name:
        wrong = unknown[0] if unknown else f"kind={held.get('kind')} or name={held.get('name')}"
        raise UserError(f"{path}: {wrong} is not possible; kinds are {', '.join(KINDS)}, its name is the file's")
    return Protocol(**{**held, "cases": [Case(**case) for case in held["cases"]]})


def names(folder: Path = FOLDER) -> list[str]:
    """The protocols that there are."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


Step = Callable[[], list[Tensor | None]]


def training_step(
    protocol: Protocol, case: Case, name: str, options: dict[str, Any], impl: str, device: torch.device
) -> Step:
    """One step of a fresh classifier on random tokens, as a cell takes it: AdamW, on a GPU bf16 and compiled."""
    cuda = device.type == "cuda"
    if cuda:
        torch._dynamo.reset()  # it compiles one function eight times, then leaves it eager without a word
    seed_all(0, "init")
    sizes = {**protocol.model, "max_length": case.length}
    model = build_classifier(
        sizes, name, {**options, "impl": impl}, num_classes=case.classes, two_towers=case.two_towers
    )
    model.to(device).train()
    assert case.batch is not None
    shape = (case.batch, 2, case.length) if case.two_towers else (case.batch, case.length)
    tokens = torch.randint(1, protocol.model["embedding_rows"], shape, device=device)
    labels = torch.randint(case.classes, (case.batch,), device=device)
    rate = torch.tensor(1e-4, device=device) if cuda else 1e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=cuda, capturable=cuda)
    compute = torch.compile(objective, dynamic=False) if cuda else objective

    def step() -> list[Tensor | None]:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            losses, auxiliary, _ = compute(model, tokens, labels)
        (losses.mean() + auxiliary).backward()
        optimizer.step()
        model.release()
        return [losses.detach()]

    return step


class Layer:
    """One encoder layer in float32 and its inputs at a batch that can change."""

    def __init__(self, protocol: Protocol, case: Case, core: Attention, device: torch.device):
        seed_all(0, "init")
        sizes = protocol.model
        self.block = Block(sizes["dim"], sizes["ffn_dim"], 0.0, core, bias=True).to(device).train()
        self.shape, self.device = (case.length, sizes["dim"]), device

    def call(self, batch: int) -> Step:
        """Forward and backward of the mean output on random inputs of `batch` sequences."""
        x = torch.randn(batch, *self.shape, device=self.device, requires_grad=True)
        mask = torch.ones(batch, self.shape[0], dtype=torch.bool, device=self.device)
        leaves = [x, *self.block.parameters()]

        def call() -> list[Tensor | None]:
            mean = self.block(x, mask).mean() + self.block.attention.auxiliary_loss().to(self.device)
            gradients = torch.autograd.grad(mean, leaves, allow_unused=True)
            self.block.attention.core.release()
            return list(gradients)

        return call


@torch.no_grad()
def approximation_error(core: Attention, case: Case, device: torch.device) -> float:
    """‖A v - Â v‖ / ‖A v‖ against softmax, mean over heads, of Gaussian q, k, v in float64; one sequence.

    q and k have standard deviation √logit_std, so that q kᵀ / √D has logit_std.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, core.num_heads, case.length, core.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(3))
    q, k = q * case.logit_std**0.5, k * case.logit_std**0.5
    softmax = attention.build(BASELINE, num_heads=core.num_heads, head_dim=core.head_dim, max_length=core.max_length)
    exact = softmax(q, k, v)
    approximate = core.to(device).double().eval()(q, k, v)
    error = (approximate - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)
    return float(error.mean())
