#!/usr/bin/env python3
"""PyTorch's scaled_dot_product_attention in bf16 on the CPU, at the shapes of bench/attend.cpp: useful GFLOP/s.

    bench/peers/sdpa.py [threads] [longest]
"""
import sys
import time

import torch

threads = int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads()
longest = int(sys.argv[2]) if len(sys.argv) > 2 else 16384
torch.set_num_threads(threads)
torch.manual_seed(0)
print(f"PyTorch {torch.__version__} SDPA bf16, {threads} threads, 8 heads")
for d in (64, 128, 256):
    for n in (1024, 4096, 16384):
        if n > longest:
            continue
        q, k, v = (torch.randn(1, 8, n, d, dtype=torch.bfloat16) for _ in range(3))
        rates = []
        for causal in (False, True):
            best, begin, runs = 1e9, time.perf_counter(), 0
            while runs < 2 or (runs < 6 and time.perf_counter() - begin < 0.3):
                start = time.perf_counter()
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
                best, runs = min(best, time.perf_counter() - start), runs + 1
            rates.append(4 * 8 * d * n * (n + 1) / (2 if causal else 1) / best * 1e-9)
        print(f"  d {d:3} n {n:6}  full {rates[0]:7.0f}  causal {rates[1]:7.0f}", flush=True)
