"""Learning rates: what a step's is, of a run's peak or base, warm-up and length."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

SCHEDULES = ("onecycle_linear", "rsqrt", "cosine")


def factor(schedule: str, step: int, warmup: int, steps: int) -> float:
    """The rate of a step, as a multiple of the base rate, by the original code's formulas.

    rsqrt    min(1, t / w) / √max(t, w): the base is √w times the peak
    cosine   min(1, t / w) · ½ (1 + cos(π · max(0, t − w) / steps))
    """
    rising = min(1.0, step / warmup)
    if schedule == "rsqrt":
        return rising / math.sqrt(max(step, warmup))
    return rising * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / steps))


def build_schedule(optimizer: Optimizer, training: Any) -> LRScheduler:
    """The schedule of a `lra.config.TrainingConfig`, one `step()` an optimiser step.

    onecycle_linear   base / 25 → base over the warm-up → base / 25e4, both linear, betas constant
    rsqrt, cosine     see `factor`
    """
    schedule, warmup, steps = training.schedule, training.warmup_steps, training.steps
    if schedule != "onecycle_linear":
        return LambdaLR(optimizer, lambda step: factor(schedule, step, warmup, steps))
    return OneCycleLR(
        optimizer,
        max_lr=training.learning_rate,
        total_steps=steps,
        pct_start=warmup / steps,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
