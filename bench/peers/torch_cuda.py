"""What PyTorch's attention takes on this GPU for the shapes that bench/cuda/attend_sm90.cu times, medians of CUDA events.

    python3 bench/peers/torch_cuda.py [dense] [flex] [copy]
"""
import sys, warnings
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

warnings.filterwarnings("ignore")


def median_ms(f, times=15):
    for _ in range(3):
        f()
    out = []
    for _ in range(times):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); b.synchronize()
        out.append(a.elapsed_time(b))
    return sorted(out)[len(out) // 2]


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
if "flex" in what:
    flex(128)
