"""A script for a process without TRITON_INTERPRET: find and compile variants for an H100 that is not there.

It prints one JSON object: `kernels`, by attention, without and with a mask, those that a training call launches; then
of one of them `ahead`, its variants that were compiled ahead, as many `launchers`, and `hits`, for each variant that
the call asks for whether Triton found it in its cache.
"""

import json
import pickle
from functools import partial

import torch
import triton
from inputs import padding, qkv
from triton.backends.compiler import GPUTarget

import attention
from kernels.common import compilation, dispatch

MASKS = (False, True)
KERNEL = "partial_moments_kernel"  # it has tuples and types among its constants, and compiles fast


class Absent:
    """The driver of a card that one can compile for."""

    launchers: int = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> None:
        self.launchers += 1


def step(name: str, masked: bool, length: int = 256) -> None:
    module = attention.build(name, num_heads=2, head_dim=32, max_length=length, impl="triton")
    inputs = qkv(2, 2, length, 32, dtype=torch.bfloat16, requires_grad=True)
    out = module(*inputs, padding(2, length) if masked else None)
    (out.float().square().sum() + module.auxiliary_loss()).backward()


def main() -> None:
    triton.runtime.driver.set_active(absent := Absent())
    dispatch._refusal = lambda q: None  # CPU tensors stand for those of the GPU
    # What a kernel would have written is NaN, or an index far outside, which torch does not take.
    torch.use_deterministic_algorithms(True)
    found = {}
    for name in attention.names():
        if "triton" in attention.build(name, num_heads=2, head_dim=32, max_length=256).implementations:
            both = [compilation.variants(lambda name=name, masked=masked: step(name, masked)) for masked in MASKS]
            found[name] = [sorted({variant.kernel for variant in some}) for some in both]

    ahead = [variant for variant in compilation.variants(lambda: step("lln", False)) if variant.kernel == KERNEL]
    for variant in ahead:
        pickle.loads(pickle.dumps(variant)).compile()
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    with compilation._unlaunched(lambda *, fn, **_: fn.name != KERNEL):
        step("lln", False)
    every = [variant for length in (512, 8192) for variant in compilation.variants(partial(step, "lln", False, length))]
    shared = {variant.key for variant in every if variant.kernel == "queries_kernel"}
    counts = {"ahead": len(ahead), "launchers": absent.launchers, "shared": len(shared)}
    print(json.dumps({"kernels": found, "hits": hits, **counts}))


if __name__ == "__main__":
    main()
