"""What PyTorch's attention takes on this GPU for the shapes that bench/cuda/attend_sm90.cu times, medians of CUDA events.

    python3 bench/peers/torch_cuda.py [dense] [flex] [copy] [LIBRARY.so] [backward LIBRARY.so]
"""
import ctypes, sys, warnings
import events
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

warnings.filterwarnings("ignore")


def median_ms(f, times=15):
    return events.median_ms(f, times, hidden=500_000)


def inputs(batch, heads, kv, n, d, dv):
    new = lambda h, w: torch.randn(batch, h, n, w, device="cuda", dtype=torch.bfloat16)
    return new(heads, d), new(kv, d), new(kv, dv)


def dense(d, dv, backend, heads=16, kv=16):
    row = []
    for causal, n in ((True, 4096), (True, 16384), (True, 32768), (False, 4096), (False, 16384)):
        batch = max(1, 16384 // n)
        q, k, v = inputs(batch, heads, kv, n, d, dv)
        flop = 2 * batch * heads * n * n * (d + dv) / (2 if causal else 1)
        try:
            with sdpa_kernel(backend):
                ms = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv))
            row.append(f"{'causal' if causal else 'full'} {n // 1024}k {ms:.3f} ms {flop / ms / 1e9:.0f}")
        except Exception as e:
            row.append(f"{'causal' if causal else 'full'} {n // 1024}k none ({str(e).splitlines()[0][:40]})")
    print(f"{backend.name:20} {d}/{dv} {heads}/{kv} | " + " | ".join(row), flush=True)


def flex(d, window=1024):
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
    f = torch.compile(flex_attention, dynamic=False)
    n, heads, block = 32768, 16, 128
    q, k, v = inputs(1, heads, heads, n, d, d)
    causal = lambda b, h, i, j: i >= j
    blocks, row = n // block, []
    for density in (1.0, 0.5, 0.21, 0.11, 0.06):
        keep = (torch.rand(1, heads, blocks, blocks, device="cuda") < density).tril(-1)
        diagonal = torch.eye(blocks, device="cuda", dtype=torch.bool).expand(1, heads, -1, -1)
        def pack(m):
            return m.sum(-1).int(), m.int().argsort(dim=-1, descending=True, stable=True).int()
        num, idx = pack(diagonal)
        full_num, full_idx = pack(keep)
        mask = BlockMask.from_kv_blocks(num, idx, full_num, full_idx, BLOCK_SIZE=block, mask_mod=causal, seq_lengths=(n, n))
        ms = median_ms(lambda: f(q, k, v, block_mask=mask), 9)
        real = (int(num.sum()) + int(full_num.sum())) * block * block
        row.append(f"{density:.2f} {ms:.3f} ms {4 * d * real / ms / 1e9:.0f}")
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, n, n)
    row.append(f"window {median_ms(lambda: f(q, k, v, block_mask=mask), 9):.3f} ms")
    print(f"flex {d} 32k | " + " | ".join(row), flush=True)


def pairs(library):
    """cuDNN and heed (a library built from bench/cuda/attend_sm90.cu) in turn: both then run at the clocks that both cause."""
    heed = ctypes.CDLL(library).heed_attend
    shapes = [(d, d_v, 16, 16, variants) for d, d_v, variants in ((128, 128, (0, 1)), (64, 64, (0, 1)), (96, 96, (0,)), (192, 128, (0,)), (256, 256, (0,)))] + [(128, 128, 32, 8, (0, 1))]
    scratch = torch.empty(1 << 24, device="cuda", dtype=torch.uint8)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    for d, d_v, heads, kv, variants in shapes:
        for causal, n in ((True, 4096), (True, 8192), (True, 16384), (True, 32768), (False, 4096), (False, 16384)):
            batch = max(1, 16384 // n)
            q, k, v = inputs(batch, heads, kv, n, d, d_v)
            out, lse = torch.empty(batch, heads, n, d_v, device="cuda"), torch.empty(batch, heads, n, device="cuda")
            q_offsets = torch.arange(batch * heads + 1, device="cuda") * n
            k_offsets = torch.arange(batch * kv + 1, device="cuda") * n
            def cudnn():
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv)
            def ours(variant):
                e = heed(variant, pointer(q), pointer(k), pointer(v), pointer(q_offsets), pointer(k_offsets), batch, heads, kv, n, n, d, d_v, int(causal), 0,
                         pointer(out), pointer(lse), pointer(scratch), ctypes.c_int64(scratch.numel()), stream)
                assert e == 0, e
            runs = [cudnn] + [lambda x=x: ours(x) for x in variants]
            times = [[] for _ in runs]
            for turn in range(14 if n < 32768 else 8):
                for i, f in enumerate(runs):
                    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    torch.cuda._sleep(500_000)
                    a.record(); f(); b.record(); b.synchronize()
                    if turn > 1:
                        times[i].append(a.elapsed_time(b))
            flop = 2 * batch * heads * n * n * (d + d_v) / (2 if causal else 1)
            ms = [sorted(t)[len(t) // 2] for t in times]
            ours(0)
            error = ((out - cudnn().float()).norm() / out.norm()).item()
            print(f"{d}/{d_v} {heads}/{kv} {'causal' if causal else 'full'} {n // 1024}k cudnn {ms[0]:.3f} ms {flop / ms[0] / 1e9:.0f} | "
                  + " | ".join(f"{x}: {t:.3f} ms {flop / t / 1e9:.0f} ({ms[0] / t:.2f})" for x, t in zip(variants, ms[1:])) + f" | differ {error:.1e}", flush=True)


def backward(library, variants=8, quick=False):
    """Gradients, likewise; FLOP are 10 d a pair. cuDNN reads and writes bf16, heed reads f32 outputs and writes f32 gradients."""
    heed = ctypes.CDLL(library).heed_attend_backward
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    scratch = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    for d, heads, kv in ((128, 16, 16), (64, 16, 16), (96, 16, 16), (128, 32, 8)):
        for causal, n in ((True, 16384), (False, 16384)) if quick else ((True, 4096), (True, 8192), (True, 16384), (True, 32768), (False, 4096), (False, 16384)):
            batch = max(1, 16384 // n)
            q, k, v = (x.requires_grad_() for x in inputs(batch, heads, kv, n, d, d))
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q.detach(), *(x.detach().repeat_interleave(heads // kv, 1) for x in (k, v)), None, True, 0.0, causal)
            out, lse = out.float().contiguous(), lse.float().contiguous().view(batch, heads, n)
            d_out = torch.randn(batch, heads, n, d, device="cuda")
            d_out_bf16 = d_out.bfloat16()
            grads = [torch.empty(x.shape, device="cuda") for x in (q, k, v)]
            q_offsets = torch.arange(batch * heads + 1, device="cuda") * n
            k_offsets = torch.arange(batch * kv + 1, device="cuda") * n
            loss = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv)
            def cudnn():
                return torch.autograd.grad(loss, (q, k, v), d_out_bf16, retain_graph=True)
            def ours(variant):
                p = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out, lse, d_out, q_offsets, k_offsets, *grads, scratch)]
                return heed(variant, *p[:8], batch, heads, kv, n, n, d, int(causal), *p[8:], ctypes.c_int64(scratch.numel()), stream)
            there = [x for x in range(variants) if ours(x) == 0]
            runs = [cudnn] + [lambda x=x: ours(x) for x in there]
            times = [[] for _ in runs]
            for turn in range(9 if n < 32768 else 6):
                for i, f in enumerate(runs):
                    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    torch.cuda._sleep(1_000_000)
                    a.record(); f(); b.record(); b.synchronize()
                    if turn > 1:
                        times[i].append(a.elapsed_time(b))
            flop = 10 * batch * heads * n * n * d / (2 if causal else 1)
            ms = [sorted(t)[len(t) // 2] for t in times]
            ours(0)
            errors = " ".join(f"{((x - y.float()).norm() / x.norm()).item():.1e}" for x, y in zip(grads, cudnn()))
            print(f"backward {d} {heads}/{kv} {'causal' if causal else 'full'} {n // 1024}k cudnn {ms[0]:.3f} ms {flop / ms[0] / 1e9:.0f} | "
                  + " | ".join(f"{x}: {t:.3f} ms {flop / t / 1e9:.0f} ({ms[0] / t:.2f})" for x, t in zip(there, ms[1:])) + f" | differ {errors}", flush=True)


def copy():
    a = torch.randint(0, 255, (1 << 30,), device="cuda", dtype=torch.uint8)
    b = torch.empty_like(a)
    print(f"copy of 1 GiB, read and write: {2 * a.numel() / median_ms(lambda: b.copy_(a)) / 1e9:.2f} TB/s", flush=True)


what = sys.argv[1:] or ["copy", "dense", "flex"]
print(torch.__version__, torch.cuda.get_device_name(), torch.backends.cudnn.version(), flush=True)
if "copy" in what:
    copy()
if "dense" in what:
    for d, dv in ((128, 128), (64, 64), (96, 96), (192, 128), (256, 256)):
        for backend in (SDPBackend.CUDNN_ATTENTION,) + ((SDPBackend.FLASH_ATTENTION,) if d in (64, 128) else ()):
            dense(d, dv, backend)
    dense(128, 128, SDPBackend.CUDNN_ATTENTION, 32, 8)
for library in what:
    if library.endswith(".so"):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            if "backward" in what:
                backward(library, quick="quick" in what)
            else:
                pairs(library)
if "flex" in what:
    flex(128)
