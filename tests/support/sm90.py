"""Compile, without a GPU, every kernel that a call of an attention launches on an H100.

`compiled(call)` runs `call` on CPU tensors with launches replaced by compilation for sm_90, so that what is compiled
is exactly what the hosts of the kernels ask for: their constants, warps, stages and argument types. It needs a process
without TRITON_INTERPRET; as a script, this file compiles the named attentions and prints one JSON line.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = 232_448
"""Bytes that one program may have on an H100."""

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint32: "*u32",
}  # fmt: skip

LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one launch."""

    kernel: str
    shared: int
    registers: int
    local: int  # bytes of spills a thread
    fused: int  # fused multiply-adds of float32 in the program text, those of tensor cores not counted
    twofold: list[str]  # see `twofold_addresses`


def _argument(value: object) -> tuple[str, bool]:
    """Triton's type of a launch argument, and whether it is known to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], True
    if isinstance(value, int):
        return ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
    return "fp32", False


def compiled(call: Callable[[], object]) -> list[Compiled]:
    """Every distinct launch of `call`, compiled."""
    seen: dict[str, Compiled] = {}

    def compile_launch(self, *args, grid, warmup, **kwargs):
        names = [p.name for p in self.params]
        options = {key: kwargs.pop(key) for key in LAUNCH_OPTIONS if key in kwargs}
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        constants = {p.name: bound[p.name] for p in self.params if p.is_constexpr}
        signature = {n: "constexpr" if n in constants else _argument(bound[n])[0] for n in names}
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n not in constants and _argument(bound[n])[1]
        }
        key = repr((self.fn.__name__, sorted(constants.items(), key=repr), signature, options))
        if key in seen:
            return
        source = ASTSource(self, signature, {(names.index(n),): c for n, c in constants.items()}, divisible)
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        program = kernel.asm["ptx"]
        fused, twofold = program.count("fma.rn.f32"), twofold_addresses(program)
        resources = _resources(kernel.asm["cubin"])
        seen[key] = Compiled(self.fn.__name__, kernel.metadata.shared, *resources, fused, twofold)

    original = triton.JITFunction.run
    triton.JITFunction.run = compile_launch
    try:
        call()
    finally:
        triton.JITFunction.run = original
    return list(seen.values())


def twofold_addresses(program: str) -> list[str]:
    """Registers of a program text from which descriptors of shared memory in two layouts are made.

    A descriptor of wgmma is an address plus a constant that names the layout, in the upper half. Where two buffers of
    different layouts take turns at one address, ptxas 12.8, which comes with Triton 3.6, may lose the address of the
    second: the product reads whatever lies elsewhere, or what may not be read. It did so with LLN+Diag in bfloat16 at
    head_dim 64 and 128; not with every such program.
    """
    layouts: dict[str, set[int]] = {}
    for address, constant in re.findall(r"(?:or\.b64|add\.s64)\s+%rd\d+, (%rd\d+), (-?\d+);", program):
        layout = int(constant) % 2**64 >> 32
        if layout >> 30:  # bits 62 and 63, a swizzle
            layouts.setdefault(address, set()).add(layout)
    return [address for address, found in layouts.items() if len(found) > 1]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    assert registers, usage
    assert stack, usage
    return int(registers[1]), int(stack[1])


def compile_in_own_process(cases: list[list]) -> list[dict]:
    """`main` in a process that does not interpret."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests' / 'support'}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def tiers(default: list[list], grid: list[list]) -> pytest.MarkDecorator:
    """Parametrises a test of `cases`: those that `make test` compiles, and, by threes, the grid of `make test-all`."""
    threes = [grid[first : first + 3] for first in range(0, len(grid), 3)]
    names = ["default", *(f"grid{number}" for number in range(len(threes)))]
    slow = [pytest.param(cases, marks=pytest.mark.slow) for cases in threes]
    return pytest.mark.parametrize("cases", [default, *slow], ids=names)


def assert_compiles(cases: list[list], kernels: set[str], spills: float = float("inf")) -> list[dict]:
    """The cases launch these kernels, among others, and all compile and fit the shared memory; what `main` prints.

    spills   bytes of local memory that a thread of the main case, bf16 at head_dim 32, may have
    """
    reports = compile_in_own_process(cases)
    assert {report["kernel"] for report in reports} >= {f"{name}_kernel" for name in kernels}
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY, report
        if (report["dtype"], report["head_dim"]) == ("bfloat16", 32):
            assert report["local"] <= spills, f"spills: {report}"
    return reports


def main() -> None:
    """sm90.py OPS-JSON: a list of [attention, options, head_dim, dtype, masked] or [..., length], else of 256."""
    from inputs import padding, qkv

    import attention
    from kernels.common import dispatch

    dispatch._refusal = lambda q: None  # CPU tensors stand for those of the GPU
    reports = []
    for name, options, dim, dtype, masked, *lengths in json.loads(sys.argv[1]):
        module = attention.build(name, num_heads=2, head_dim=dim, max_length=65_536, impl="triton", **options)
        length = lengths[0] if lengths else 256
        inputs = qkv(2, 2, length, dim, dtype=getattr(torch, dtype), requires_grad=True)
        mask = padding(2, length) if masked else None

        def call(module=module, inputs=inputs, mask=mask):
            out = module(*inputs, mask)
            (out.float().square().sum() + module.auxiliary_loss()).backward()

        reports += [dict(attention=name, head_dim=dim, dtype=dtype, masked=masked, **asdict(c)) for c in compiled(call)]
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
