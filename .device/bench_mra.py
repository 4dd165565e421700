"""Per-kernel device times of MRA, its ratio to SDPA, and a sweep over walks."""
import json, os, sys, time
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.profiler import ProfilerActivity, profile
import attention
from kernels.mra import triton as F
from kernels.mra import triton_backward as R
from kernels.mra.triton import Walk

T0 = time.time()
OUT = os.environ.get("OUT", ".")
LIMIT = float(os.environ.get("LIMIT", "75"))

def inputs(n, heads=2, dim=32, tokens=131072):
    g = torch.Generator(device="cuda").manual_seed(0)
    shape = (tokens // n, heads, n, dim)
    return [torch.randn(shape, device="cuda", generator=g).bfloat16().requires_grad_() for _ in range(3)], torch.randn(shape, device="cuda", generator=g).bfloat16()

def graph_ms(call, reps=20):
    s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for _ in range(3): call()
    torch.cuda.current_stream().wait_stream(s)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): call()
    times = []
    for _ in range(reps):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); g.replay(); g.replay(); g.replay(); b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b) / 3)
    return sorted(times)[len(times) // 2]

def kernels_us(call, reps=6):
    call(); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(reps): call()
        torch.cuda.synchronize()
    r = {}
    for e in p.key_averages():
        r[e.key] = (e.device_time_total / reps, e.count // reps)
    return r

def steps(module, qkv, cot):
    def both():
        out = module(*qkv)
        return torch.autograd.grad(out, qkv, cot)
    def fwd():
        with torch.no_grad(): return module(*qkv)
    return fwd, both

record = {}
for n in (1024, 4096, 16384):
    qkv, cot = inputs(n)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        f, b = steps(lambda *x: sdpa(*x), qkv, cot)
        base = graph_ms(f), graph_ms(b)
    print(f"N={n} sdpa fwd {base[0]:.3f} both {base[1]:.3f}", flush=True)
    for name in ("mra", "mra_s"):
        m = attention.build(name, num_heads=2, head_dim=32, max_length=n, impl="triton")
        f, b = steps(m, qkv, cot)
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated(); b(); torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        mine = graph_ms(f), graph_ms(b)
        print(f"N={n} {name} fwd {mine[0]:.4f} both {mine[1]:.4f} ratio {mine[1]/base[1]:.4f} peak {peak:.1f} MiB  t={time.time()-T0:.0f}s", flush=True)
        ks = kernels_us(b)
        record[f"{n} {name}"] = dict(sdpa=base, mine=mine, peak=peak, kernels=ks)
        print("   " + ", ".join(f"{k[:28]} {u:.1f}us x{c}" for k, (u, c) in sorted(ks.items(), key=lambda t: -t[1][0]) if u > 0.5), flush=True)
json.dump(record, open(f"{OUT}/bench.json", "w"), indent=1)

class Override:
    def __init__(self, kernel, **kw): self.kernel, self.kw = kernel, kw
    def __getitem__(self, grid):
        kw = dict(self.kw); scale = kw.pop("grid", None)
        def launch(*a, **k):
            k.update(kw); return self.kernel[grid](*a, **k)
        return launch

sweep = {}
data = {n: inputs(n) for n in (1024, 4096, 16384)}
ms = {n: attention.build("mra", num_heads=2, head_dim=32, max_length=n, impl="triton") for n in data}
def show(label, names, lengths=(1024, 4096, 16384)):
    if time.time() - T0 > LIMIT: print("time limit"); return
    for n in lengths:
        qkv, cot = data[n]
        try: ks = kernels_us(steps(ms[n], qkv, cot)[1], reps=4)
        except Exception as e:
            print(label, n, "failed", str(e)[:150]); continue
        row = {k: round(ks[k][0], 1) for k in names if k in ks}
        sweep[str((label, n))] = row
        print("sweep", label, n, row, f"t={time.time()-T0:.0f}s", flush=True)

def override(module, name, label, lengths=(1024, 4096, 16384), **kw):
    kernel = getattr(module, name)
    setattr(module, name, Override(kernel, **kw))
    show(label, [name], lengths)
    setattr(module, name, kernel)

from kernels.mra import triton_select as S
for w in (8, 4): override(S, "rank_kernel", f"rank warps {w}", (4096,), num_warps=w)
for w in (1, 2): override(S, "rank_kernel", f"rank warps {w}", (1024,), num_warps=w)
for st in (1, 3): override(R, "coarse_kernel", f"coarse stages {st}", (4096, 16384), num_stages=st)
override(R, "coarse_kernel", "coarse warps 4", (4096, 16384), num_warps=4)
for p in (1024, 4096):
    S.PAIRS = p; show(f"pairs {p}", ["digits_kernel", "tally_kernel", "finish_kernel"])
S.PAIRS = 2048
for w in (2, 8):
    for k in ("digits_kernel", "tally_kernel", "finish_kernel"): setattr(S, k, Override(getattr(S, k), num_warps=w))
    show(f"pass warps {w}", ["digits_kernel", "tally_kernel", "finish_kernel"])
    for k in ("digits_kernel", "tally_kernel", "finish_kernel"): setattr(S, k, getattr(S, k).kernel)
for rc in ((16, 64), (32, 64), (32, 128), (64, 64)):
    S.SCORE_ROWS, S.SCORE_CHUNK = rc; show(f"scores {rc}", ["scores_kernel"], (16384,))
for rc in ((16, 32), (32, 64), (16, 64)):
    S.COARSE_ROWS, S.COARSE_CHUNK = rc; show(f"coarse sums {rc}", ["coarse_sums_kernel"])
for w in (1, 4): override(S, "columns_kernel", f"columns warps {w}", (1024, 4096, 16384), num_warps=w)
for w in (2,): override(S, "pool_kernel", f"pool warps {w}", (4096,), num_warps=w); override(R, "summarise_kernel", f"summarise warps {w}", (4096,), num_warps=w)
configs = [(32,1,4),(32,1,6),(32,1,9),(32,2,4)]
for c in configs:
    for t in (F.ATTEND, R.QUERIES, R.KEYS): t[32] = Walk(*c)
    show(str(c), ("attend_kernel", "queries_kernel", "keys_kernel"))
json.dump(sweep, open(f"{OUT}/sweep.json", "w"), indent=1)
