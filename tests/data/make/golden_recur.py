"""Linear attention's recurrences by flash-linear-attention's plain references, for tests/kernels/golden_recur_test.cpp.

    pip install torch==2.11.0 einops numpy
    python tests/data/make/golden_recur.py CODE tests/data/golden/recur

CODE is a folder with a checkout of fla-org/flash-linear-attention at bc3b101 as fla-org+flash-linear-attention; its files are
loaded one by one, without the package and its kernels. Inputs are the numbers that the test draws. NAME.npy is f32
[heads, rows + d, d_v]: outputs, then the last state.
"""

import importlib.util
import sys

import numpy as np
import torch
from golden_case import Random

code, out = sys.argv[1:]
h, n, d, d_v = 2, 40, 16, 8
random = Random(23)


def drawn(*shape, unit=False):
    x = torch.tensor(random.normal(h, *shape), dtype=torch.float32)
    return x / x.norm(dim=-1, keepdim=True) if unit else x


q, k, v = drawn(n, d), drawn(n, d, unit=True), drawn(n, d_v)
by_row, by_channel = (-0.2 * drawn(*shape).abs() for shape in ((n,), (n, d)))
beta = torch.tensor(random.uniform(h * n).reshape(h, n), dtype=torch.float32)
a = drawn(n, d, unit=True)
b, state = -0.5 * a, drawn(d, d_v)


def naive(path, name):
    spec = importlib.util.spec_from_file_location("naive", f"{code}/fla-org+flash-linear-attention/fla/ops/{path}/naive.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return getattr(made, name)


def save(name, o, last, head_first=False):
    o = o[0] if head_first else o[0].transpose(0, 1)
    np.save(f"{out}/{name}.npy", torch.cat([o, last[0]], 1).numpy())
    print(name, float(o.abs().mean()))


given = {"initial_state": state[None], "output_final_state": True}
rows = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, n, h, …]
flip = lambda x: x.transpose(0, 1)[None]
positive = [flip(x.abs() + 0.05) for x in (q, k)] + [rows[2]]
save("linear", *naive("linear_attn", "naive_recurrent_linear_attn")(*rows, **given))
o, (last, _) = naive("linear_attn", "naive_recurrent_linear_attn")(*positive, output_final_state=True, normalize=True)
save("normalised", o, last)
save("simple-gla", *naive("simple_gla", "naive_recurrent_simple_gla")(*rows, flip(by_row), **given))
save("gla", *naive("gla", "naive_recurrent_gla")(*rows, flip(by_channel), **given))
heads = [x[None] for x in (q, k, v)]
save("delta", *naive("delta_rule", "delta_rule_recurrence")(*heads, beta[None], **given), head_first=True)
save("gated-delta", *naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(*rows, flip(beta), flip(by_row), **given))
save("kda", *naive("kda", "naive_recurrent_kda")(*rows, flip(by_channel), flip(beta), **given))
dplr = naive("generalized_delta_rule/dplr", "dplr_recurrence")
save("dplr", *dplr(*heads, a[None], b[None], by_channel[None], **given), head_first=True)
