"""Scores that kvpress's own policies give to small random tensors, for tests/mechanisms/golden_test.cpp.

    pip install kvpress==0.5.5 torch transformers numpy
    python tests/data/make/kvpress_scores.py tests/data/golden/kvpress

Writes q.npy [6, 150, 16], k.npy and v.npy [2, 150, 16] (f32, as they are after rotation), and for every policy one file
NAME.npy [2, 150] of its scores. kvpress is run as published; what it asks of a model is played by a stub without a
rotary embedding (cos 1, sin 0), whose queries before rotation are those of q.npy. ChunkKV returns kept entries instead
of scores: its file holds 1 for an entry that stayed, 0 for one that went. KVzap's and Fast KVzip's networks are random, with
the numbers that the test draws, and Fast KVzip's file is bytes, 1 for an entry that stays.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from kvpress.presses import expected_attention_press, non_causal_attention_press, snapkv_press
from kvpress.presses.chunkkv_press import ChunkKVPress
from golden_case import Random
from kvpress.presses.cur_press import CURPress
from kvpress.presses.expected_attention_press import ExpectedAttentionPress
from kvpress.presses.fastkvzip_press import FastKVzipGate, FastKVzipPress
from kvpress.presses.keydiff_press import KeyDiffPress
from kvpress.presses.knorm_press import KnormPress
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel, KVzapPress
from kvpress.presses.lagkv_press import LagKVPress
from kvpress.presses.non_causal_attention_press import NonCausalAttnPress
from kvpress.presses.observed_attention_press import ObservedAttentionPress
from kvpress.presses.snapkv_press import SnapKVPress
from kvpress.presses.tova_press import TOVAPress

h, g, n, d = 6, 2, 150, 16
torch.manual_seed(7)
q = 1.5 * torch.randn(1, h, n, d)
k = torch.randn(1, g, n, d)
v = torch.randn(1, g, n, d)

hidden = torch.arange(n, dtype=torch.float32).view(1, n, 1)  # a hidden state is the number of its token


def queries(module, states):
    return q[:, :, states[0, :, 0].long()]


for press in (expected_attention_press, non_causal_attention_press, snapkv_press):
    press.get_prerope_query_states = queries


def rotary(x, position_ids):
    shape = (1, position_ids.shape[1], d)
    return torch.ones(shape), torch.zeros(shape)


module = SimpleNamespace(
    config=SimpleNamespace(num_attention_heads=h, num_key_value_heads=g), head_dim=d, rotary_emb=rotary, layer_idx=0
)
kwargs = {"position_embeddings": (torch.ones(1, n, d), torch.zeros(1, n, d))}
logits = q @ k.repeat_interleave(h // g, dim=1).transpose(2, 3) / d**0.5
attentions = logits.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)

presses = {
    "knorm": KnormPress(),
    "keydiff": KeyDiffPress(),
    "cur": CURPress(),
    "lagkv": LagKVPress(lag_size=32),
    "lagkv_cross": LagKVPress(lag_size=32, cross_scoring=True),
    "noncausal": NonCausalAttnPress(chunk_size=50),
    "expected_attention": ExpectedAttentionPress(),
    "expected_attention_eps": ExpectedAttentionPress(epsilon=0.01),
    "observed_attention": ObservedAttentionPress(),
    "snapkv": SnapKVPress(window_size=32),
    "tova": TOVAPress(),
}

out = sys.argv[1]
for name, x in (("q", q), ("k", k), ("v", v)):
    np.save(f"{out}/{name}.npy", x[0].numpy())
for name, press in presses.items():
    given = attentions if name == "observed_attention" else None
    scores = press.score(module, hidden, k.clone(), v.clone(), given, kwargs)
    np.save(f"{out}/{name}.npy", scores[0].expand(g, n).float().numpy())

# 1 − r = 0.5: 4 of 8 chunks. Values carry their token's number through the cut.
numbered = torch.arange(n, dtype=torch.float32).view(1, 1, n, 1).expand(1, g, n, d)
kept = ChunkKVPress(press=SnapKVPress(window_size=32, compression_ratio=0.5)).compress(
    module, hidden, k, numbered, None, kwargs
)[1][0, :, :, 0].long()
stayed = torch.zeros(g, n).scatter_(1, kept, 1.0)
np.save(f"{out}/chunkkv.npy", stayed.numpy())

width, inner = 12, 20
random = Random(29)
drawn = lambda *shape: torch.tensor(random.normal(*shape), dtype=torch.float32)
x, w, b, w1, b1, w2, b2 = (drawn(*s) for s in ((n, width), (g, width), (g,), (inner, width), (inner,), (g, inner), (g,)))
for name, weights in (("kvzap", [w, b]), ("kvzap_mlp", [w1, b1, w2, b2])):
    press = KVzapPress(model_type="linear" if len(weights) == 2 else "mlp")
    config = KVzapConfig(input_dim=width, output_dim=g, hidden_dim=None if len(weights) == 2 else inner, n_modules=1)
    press.kvzap_model = KVzapModel(config)
    for mine, given in zip(press.kvzap_model.parameters(), weights):
        mine.data = given
    scores = press.score(module, x[None], k, v, None, {})[0].detach().contiguous()
    np.save(f"{out}/{name}.npy", scores.numpy())

gate = FastKVzipGate(0, width, g, h // g, torch.float32)
for mine, shape in (
    (gate.q_proj.weight, (h * 16, width)), (gate.q_proj.bias, (h * 16,)), (gate.k_proj.weight, (g * 16, width)),
    (gate.b, (g, 1, h // g)), (gate.k_base, (g, 1, 16, 16)), (gate.q_norm.weight, (16,)), (gate.k_norm.weight, (16,)),
):
    mine.data = drawn(*shape)
module.config._attn_implementation = "sdpa"
press = FastKVzipPress(compression_ratio=0.6)
press.gates, press.score_val = [gate], [None]
with torch.no_grad():
    press._score_fast(module, x[None])
press.compress_post(SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(self_attn=module)])))
stayed = np.ones((g, n), np.uint8)
stayed[module.masked_key_indices[1], module.masked_key_indices[2]] = 0
np.save(f"{out}/fast_kvzip.npy", stayed)
