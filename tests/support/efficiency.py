"""What is measured, small enough for a CPU, and hand-made records of one measured call."""

from typing import Any

import attention
from attention import Attention
from lra.efficiency.cases import Case
from lra.efficiency.measure import KIND
from lra.record import SCHEMA, Record

H100 = "NVIDIA H100 80GB HBM3"


def case(name: str = "lln", length: int = 64, masked: bool = False, tokens: int = 128) -> Case:
    return Case(name, length, heads=2, head_dim=32, tokens=tokens, masked=masked)


def build(name: str, length: int = 64) -> Attention:
    return attention.build(name, num_heads=2, head_dim=32, max_length=length)


def row_record(
    attention: str = "lln",
    length: int = 1024,
    *,
    fwd_bwd_ms: float = 0.1,
    softmax_ms: float = 0.6,
    masked: bool = False,
    device: str = H100,
    status: str = "ok",
    passed: bool = True,
    anchors: dict[str, dict[str, float]] | None = None,
    **row: Any,
) -> Record:
    """A record as `Run` makes it, of 131,072 tokens in 2 heads of 32, whose forward takes a third of the time."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "status": status,
        "message": "",
        "check": {"error": 1e-3 if passed else 1.0, "allowed": 8e-3, "passed": passed},
        "row": {
            "attention": attention, "length": length, "heads": 2, "head_dim": 32, "tokens": 131_072,
            "masked": masked, "dtype": "bfloat16", "batch": 131_072 // length, "device": device,
            "copy_gb_per_s": 3000.0, "settings": {"rates": [2, 8], "gate": "top1"}, "impl": "triton",
            "timing": "graph", "fwd_ms": fwd_bwd_ms / 3, "fwd_bwd_ms": fwd_bwd_ms, "peak_mem_mib": 50.0,
            "baseline": {
                "forward": "cudnn", "training": "cudnn", "peak_mem_mib": 100.0,
                "fwd_ms": softmax_ms / 3, "fwd_bwd_ms": softmax_ms,
            },
        } | row,
        "anchors": anchors or {},
        "code": {"revision": "0123456789abcdef", "dirty": False},
        "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
