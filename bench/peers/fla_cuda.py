"""What flash-linear-attention takes on this GPU for the recurrences that bench/cuda/recur_sm90.cu and recur_backward_sm90.cu time:
1 × 32768 tokens, 16 heads of 128, bf16, medians of CUDA events, after its autotuning.

    PYTHONPATH=/path/to/flash-linear-attention python3 bench/peers/fla_cuda.py [linear] [gla] [delta] [gated_delta] [backward]

Triton compiles for minutes at first: TRITON_CACHE_DIR keeps what it compiled.
"""
import sys
import events
import torch
import torch.nn.functional as F

TOKENS, HEADS, D = 32768, 16, 128


def median_ms(f):
    return events.median_ms(f, times=9, hidden=2_000_000)


def problem(name):
    """The call, and what it has gradients of."""
    new = lambda *tail: torch.randn(1, TOKENS, HEADS, *tail, device="cuda")
    # Log decays as in our bench: one in twenty is -1, the others -0.2 |x|.
    decays = lambda *tail: torch.where(torch.rand(1, TOKENS, HEADS, *tail, device="cuda") < 0.05, -1.0, -0.2 * new(*tail).abs())
    q, k, v = (new(D).bfloat16() for _ in range(3))
    k = F.normalize(k.float(), dim=-1).bfloat16()
    beta = new().sigmoid().bfloat16()
    if name == "linear":
        from fla.ops.linear_attn import chunk_linear_attn
        return [q, k, v], lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)
    if name == "gla":
        from fla.ops.gla import chunk_gla
        return [q, k, v, decays(D)], lambda q, k, v, g: chunk_gla(q, k, v, g, scale=1.0)
    if name == "delta":
        from fla.ops.delta_rule import chunk_delta_rule
        return [q, k, v, beta], lambda q, k, v, beta: chunk_delta_rule(q, k, v, beta, scale=1.0)
    if name == "gated_delta":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        return [q, k, v, decays(), beta], lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)
    raise SystemExit(f"unknown problem '{name}'")


def main(words):
    backward = "backward" in words
    for name in [w for w in words if w != "backward"] or ["linear", "gla", "delta", "gated_delta"]:
        inputs, call = problem(name)
        with torch.no_grad():
            text = f"{name:12} forward {median_ms(lambda: call(*inputs)):.3f} ms"
        if backward:
            for x in inputs:
                x.requires_grad_()
            d_out = torch.randn(1, TOKENS, HEADS, D, device="cuda").bfloat16()
            both = lambda: torch.autograd.grad(call(*inputs)[0], inputs, d_out)
            text += f", with gradients {median_ms(both):.3f} ms"
        print(text, flush=True)


main(sys.argv[1:])
