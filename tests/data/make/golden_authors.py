"""What authors' own code chooses on random tensors, for tests/mechanisms/golden_test.cpp.

    pip install torch==2.11.0 triton==3.6.0 transformers==5.2.0 einops numpy
    TRITON_INTERPRET=1 python tests/data/make/golden_authors.py CODE tests/data/golden/authors

CODE is a folder with checkouts, a folder each, as OWNER+NAME:
    mit-han-lab+x-attention e379887, ByteDance-Seed+FlexPrefill a24b27b, thu-ml+SpargeAttn bfd980b, MoonshotAI+MoBA 61e456b,
    microsoft+MInference fb56c91, mit-han-lab+Quest 01c1623, Zefan-Cai+R-KV d15c976,
    FasterDecoding+SnapKV e216ddc, Zefan-Cai+KVCache-Factory c97f9d7, schwartz-lab-NLP+TOVA 9c7d09b,
    fla-org+flash-linear-attention bc3b101d, FFY0+DefensiveKV 9251b95, microsoft+SeerAttention aba03e3,
    jy-yuan+KIVI 876b4d2
Their Triton kernels run in Triton's interpreter; packages that only a GPU has are empty modules.

Written: for plans bytes [heads, tiles, blocks], 1 where a tile reads a block; for policies bytes [KV heads, keys], 1 for an
entry that stays.
"""

import importlib.util
import math
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import torch
from golden_case import Random, case

code, out = sys.argv[1], sys.argv[2]


class Anything(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name)

    def __call__(self, *_, **__):
        return self


def empty(*names):
    for name in names:
        sys.modules[name] = Anything(name)
        sys.modules[name].__path__ = []


def module(path, name=None):
    """A file as a module, whatever its package."""
    name = name or path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, f"{code}/{path}")
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def function(path, name, scope):
    """One function of a file whose imports cannot be had here."""
    import ast

    text = open(f"{code}/{path}").read()
    node = next(x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef) and x.name == name)
    node.decorator_list = []
    exec(compile(ast.Module([node], []), path, "exec"), scope)
    return scope[name]


def tensors(*shape, **more):
    return tuple(torch.tensor(x)[None] for x in case(*shape, **more))


def save(name, array):
    array = np.asarray(array)
    np.save(f"{out}/{name}.npy", array.astype(np.uint8 if array.dtype == bool else array.dtype))
    print(name, array.shape, round(float(array.mean()), 3))


def repeated(x, h):
    return x.repeat_interleave(h // x.shape[1], dim=1)


def stayed(kept, keys):
    """Bytes [heads, keys]: which rows of keys [1, heads, m, d] are among those of `kept`, a list of rows for each head."""
    return np.stack([(k[:, None] == x[None]).all(-1).any(-1).numpy() for k, x in zip(keys[0], kept)])


# Plans.


def xattention():
    """The first chunk holds all; on the CPU what it sends to "cuda" stays."""
    empty("xattn.src.kernels", "block_sparse_attn")
    packages = [types.ModuleType(n) for n in ("xattn", "xattn.src")]
    for p in packages:
        p.__path__ = []
        sys.modules[p.__name__] = p
    module("mit-han-lab+x-attention/xattn/src/utils.py", "xattn.src.utils")
    estimate = module("mit-han-lab+x-attention/xattn/src/Xattention.py").xattn_estimate
    to = torch.Tensor.to
    torch.Tensor.to = lambda self, where, *a, **k: self if where == "cuda" else to(self, where, *a, **k)
    q, k, _ = tensors(4, 2, 500, 500, 16, 16, seed=3, sharpness=3)
    for threshold in (0.6, 0.9):
        _, mask = estimate(q, repeated(k, 4), 32, 8, threshold=threshold, chunk_size=512, use_triton=False)
        save(f"xattention-{threshold}", mask[0].numpy())
    torch.Tensor.to = to


def flexprefill():
    ops = module("ByteDance-Seed+FlexPrefill/flex_prefill/ops/flex_prefill_attention.py")
    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors(4, 2, 512, 512, 16, 16, seed=5, sharpness=2))
    for tau in (0.0, 0.2):
        ops.causal_mask = None
        listed = ops.get_active_blocks(q, k, v, 32, 0.9, 2, 16, tau)
        mask = np.zeros((4, 16, 16), bool)
        for head, cells in enumerate(listed[0]):
            mask[head].reshape(-1)[cells.numpy()] = True
        save(f"flexprefill-{tau}", mask & np.tri(16, dtype=bool))


def spargeattn():
    empty("spas_sage_attn._qattn", "spas_sage_attn._fused")
    utils = module("thu-ml+SpargeAttn/spas_sage_attn/utils.py")
    q, k, _ = tensors(2, 1, 256, 256, 16, 16, seed=7, sharpness=1)
    random = Random(8)  # rows of a block lean one way, more in some blocks than in others
    lean = [torch.tensor(random.normal(x.shape[1], 16, 16), dtype=torch.float32).repeat_interleave(16, 1)[None] for x in (q, k)]
    share = torch.linspace(0, 3, 16).repeat_interleave(16)[None, None, :, None]
    q, k = q + share * lean[0], k + share * lean[1]
    save("spargeattn.q", q[0].numpy().astype(np.float16))
    save("spargeattn.k", k[0].numpy().astype(np.float16))
    q, k = q.half().float(), repeated(k.half().float(), 2)
    centred = k - k.mean(-2, keepdim=True)
    for name, more in (("cdf", {"cdfthreshd": 0.9}), ("topk", {"cdfthreshd": None, "topk": 0.3})):
        mask = utils.get_block_map_meansim(q, centred, is_causal=True, BLKQ=32, BLKK=16, simthreshd1=0.4, **more)
        save(f"spargeattn-{name}", mask[0].numpy())


def moba():
    """Values are unit vectors that say which block they are of: what comes out is what was read."""
    attend = module("MoonshotAI+MoBA/moba/moba_naive.py").moba_attn_varlen_naive
    q, k, _ = (x[0].transpose(0, 1) for x in tensors(4, 2, 300, 300, 16, 16, seed=9))
    k = k.repeat_interleave(2, dim=1)
    v = torch.eye(10).repeat_interleave(32, 0)[:300, None].expand(300, 4, 10)
    v = torch.nn.functional.pad(v, (0, 6))
    read = attend(q, k, v, torch.tensor([0, 300]), 300, 32, 3)
    save("moba", (read[..., :10] > 0).transpose(0, 1).numpy())


def minference():
    """The keys and distances that its kernel is given."""
    path = "microsoft+MInference/minference/modules/minference_forward.py"
    given = []
    q, k, v = tensors(4, 2, 300, 300, 16, 16, seed=11, sharpness=2)
    arange = torch.arange(64)
    scope = {
        "torch": torch, "math": math, "q_len": 300, "head_dim": 16,
        "LAST_Q_MASK": arange[None, None, :, None] >= arange[None, None, None, :],
        "vertical_slash_sparse_attention": lambda q, k, v, columns, slashes: given.append((columns, slashes)),
    }
    function(path, "sum_all_diagonal_matrix", scope)
    scope["self"] = types.SimpleNamespace(head_dim=16)
    # Of the functions of that name the one that scales its logits.
    import ast

    nodes = [
        x for x in ast.walk(ast.parse(open(f"{code}/{path}").read()))
        if isinstance(x, ast.FunctionDef) and x.name == "vertical_and_slash_kernel" and "sqrt(self.head_dim)" in ast.unparse(x)
    ]
    exec(compile(ast.Module([nodes[0]], []), path, "exec"), scope)
    for head in range(4):
        scope["vertical_and_slash_kernel"](q[:, head : head + 1], k[:, head // 2 : head // 2 + 1], v[:, :1], 40, 120)
    save("minference.columns", np.stack([np.sort(c.flatten().numpy()) for c, _ in given]).astype(np.int32))
    save("minference.slashes", np.stack([np.sort(s.flatten().numpy()) for _, s in given]).astype(np.int32))


def dsa():
    index = module("fla-org+flash-linear-attention/fla/ops/dsa/naive.py").naive_dsa_indexer
    random = Random(13)
    q, k, w = (torch.tensor(random.normal(*s), dtype=torch.float32) for s in ((8, 100, 6), (100, 6), (100, 8)))
    listed = index(q.transpose(0, 1)[None], k[None], w.abs()[None], 20, activation="relu")[0]
    mask = torch.zeros(100, 101, dtype=torch.bool).scatter_(1, listed % 101, True)[:, :100]
    save("dsa", mask.numpy())


def quest():
    """Page bounds as the authors' forward makes them, and which of all pages but the last its mask function takes."""
    mask = function(
        "mit-han-lab+Quest/evaluation/quest_attention.py", "local_heavy_hitter_mask", {"torch": torch}
    )
    q, k, _ = tensors(4, 2, 1, 288, 16, 16, seed=15)
    k = repeated(k, 4)
    sign = (q > 0) + (~(q > 0)) * -1
    most = (k * sign).reshape(1, 4, 18, 16, 16).amax(3).repeat_interleave(16, 2)
    weights = q.float() * sign @ most.transpose(2, 3)
    save("quest", mask(weights[..., :272], 80, 16)[0, :, 0, ::16].numpy())


# Policies; one query head for each KV head where the code has a set for each query head.


def policies():
    q, k, v = tensors(4, 4, 150, 150, 16, 16, seed=17)
    snap = module("FasterDecoding+SnapKV/snapkv/monkeypatch/snapkv_utils.py")
    factory = module("Zefan-Cai+KVCache-Factory/pyramidkv/pyramidkv_utils.py")
    kept = snap.SnapKVCluster(16, 60, 5, "avgpool").update_kv(k, q, v, None, 1)[0]  # with "maxpool" scores tie
    save("snapkv", stayed(kept[0], k))
    save("h2o", stayed(factory.H2OKVCluster(30, 60).update_kv(k, q, v, None, 1)[0][0], k))
    for layer in range(3):
        made = factory.PyramidKVCluster(3, 16, 60, 5, "avgpool", beta=5, layer_idx=layer)
        save(f"pyramidkv-{layer}", stayed(made.update_kv(k, q, v, None, 1)[0][0], k))
    wide = torch.cat([k[:, :2], 3 * k[:, 2:]], 1)  # heads of unlike sharpness
    for floor in (0.2, 0.5):
        ada = factory.AdaKVCluster(16, 7, "avgpool", 60, floor=floor, normalize=False)
        rows = ada.update_kv(wide, q, v)[0]
        save(f"adakv-{floor}", stayed(rows.split(ada.head_lens.tolist()), wide))
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    head = factory.HeadKVCluster(16, 7, "avgpool", 60, 0, 1, torch.round(scores * (44 // 1.2 * 4) + 44 - 44 // 1.2).int())
    rows = head.update_kv(k, q, v)[0]
    save("headkv", stayed(rows.split(head.head_lens.tolist()), k))


def r_kv():
    empty("rkv.modeling", "rkv.monkeypatch")
    package = types.ModuleType("rkv.compression")
    package.__path__ = []
    sys.modules["rkv.compression"] = package
    utils = module("Zefan-Cai+R-KV/rkv/utils.py", "rkv_utils")
    package.compute_attention_scores, package.cal_similarity = utils.compute_attention_scores, utils.cal_similarity
    made = module("Zefan-Cai+R-KV/rkv/compression/r1_kv.py", "rkv.compression.r1_kv").R1KV
    q, k, v = tensors(6, 2, 150, 150, 16, 16, seed=19)
    kept = made(budget=60, mix_lambda=0.1).update_kv(k, q[:, :, -8:], v)[0]
    save("r-kv", stayed(kept[0], k))


def tova():
    empty_cache = types.SimpleNamespace
    q, k, v = tensors(6, 2, 150, 150, 16, 16, seed=21)
    reduce = function(
        "schwartz-lab-NLP+TOVA/src/tova_cache.py", "reduce",
        {"torch": torch, "Optional": None, "Dict": dict, "Any": None, "Tuple": tuple, "int": int}
        | {n: __import__("typing").__dict__[n] for n in ("Optional", "Dict", "Any", "Tuple")},
    )
    cache = empty_cache(cache_size=60, key_cache=[k.clone()], value_cache=[v.clone()])
    weights = (q[:, :, -1:] @ repeated(k, 6).transpose(2, 3) / 4).softmax(-1)
    reduce(cache, 0, weights)
    save("tova", stayed(cache.key_cache[0][0], k))


def think():
    """The keys before the last 32 with the channels that go put to 0: which go."""
    prune = module("Zefan-Cai+KVCache-Factory/pyramidkv/pyramidkv_utils.py").key_pruner_query_driven
    q, k, _ = tensors(4, 4, 150, 150, 16, 16, seed=17)
    save("think", prune(k, q, 32, 0.4)[2][0].numpy())


def defensivekv():
    """A module of queries that are given, and the layer's pool as EfficientAdaScorerPress takes it; the norms in torch."""
    for name in ("efficient_ada_scorer_press", "efficient_ada_global_scorer_press", "base_press", "scorer_press"):
        made = types.ModuleType(f"kvpress.presses.{name}")
        for part in ("EfficientAdaScorerPress", "EfficientAdaGlobalScorerPress", "BasePress", "ScorerPress"):
            setattr(made, part, type(part, (), {"__annotations__": {}}))
        sys.modules[made.__name__] = made
    empty("kvpress", "kvpress.presses", "kvpress.ops", "kvpress.ops.vw_norm")
    press = module("FFY0+DefensiveKV/kvpress/presses/efficient_defensivekv_press.py").EfficientDefensiveKVPress(16, 5)
    press.compression_ratio, press.vwl1norm_triton = 0.6, press.vwl1norm
    q, k, v = tensors(6, 2, 150, 150, 16, 16, seed=25, sharpness=3)
    output = torch.tensor(Random(26).normal(12, 96), dtype=torch.float32)
    layer = types.SimpleNamespace(
        config=types.SimpleNamespace(num_attention_heads=6, num_key_value_heads=2, hidden_size=12), head_dim=16,
        num_key_value_groups=3, o_proj=types.SimpleNamespace(weight=output), q_proj=lambda x: x,
    )
    meta = types.SimpleNamespace(head_lens=[150, 150], bsz=1, num_key_value_heads=2)
    rows = q.transpose(1, 2).reshape(1, 150, 96)
    still = (torch.ones(1, 150, 16), torch.zeros(1, 150, 16))
    scores = press.score(layer, rows, k, v, None, {"metadata": meta, "position_embeddings": still})[0]
    stays = torch.zeros(300, dtype=torch.bool)
    stays[scores.topk(int(150 * (1 - 0.6) * 2)).indices] = True
    save("defensivekv", stays.view(2, 150).numpy())


def seer_attention():
    """Gates of blocks, [heads, tiles, blocks]: mean queries, largest and smallest keys, at the blocks' first tokens."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    empty("seer_attn", "seer_attn.modules", "seer_attn.modules.common", "flash_attn", "flash_attn.layers")
    empty("flash_attn.layers.rotary")
    common = sys.modules["seer_attn.modules.common"]
    common.apply_rotary_pos_emb, common.repeat_kv = apply_rotary_pos_emb, repeat_kv
    common.repeat_kv_varlen = lambda x, times: x.repeat_interleave(times, 2)
    made = module("microsoft+SeerAttention/seer_attn/prefill_sparse/attn_gate.py")
    gate = made.AttnGate(32, 16, 16, 2, 4, [made.POOL_FUNCS["avg"]], [made.POOL_FUNCS["max"], made.POOL_FUNCS["min"]])
    random = Random(27)
    q, k, w = (torch.tensor(random.normal(*s), dtype=torch.float32) for s in ((4, 240, 16), (2, 240, 16), (4, 32, 16)))
    gate.mask_linear_k.weight.data = w
    angle = 32.0 * torch.arange(8)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    turn = torch.cat([angle, angle], -1)[None]
    with torch.no_grad():
        out = gate(q.transpose(0, 1)[None], k.transpose(0, 1)[None], torch.ones(8, 8).tril().bool(), (turn.cos(), turn.sin()))
    save("seer_attention", out[0].numpy())


def kivi():
    """What the last query reads of 192 entries of which the first 128 went through the authors' 2-bit codes."""
    pack = module("jy-yuan+KIVI/quant/new_pack.py")
    q, k, v = tensors(4, 2, 192, 192, 32, 32, seed=31)
    old_k = pack.unpack_and_dequant_kcache(*pack.quant_and_pack_kcache(k[:, :, :128].clone(), 32, 2), 32, 2)
    old_v = pack.unpack_and_dequant_vcache(*pack.quant_and_pack_vcache(v[:, :, :128].clone(), 32, 2), 32, 2)
    k, v = (repeated(torch.cat([old, x[:, :, 128:]], 2), 4) for old, x in ((old_k, k), (old_v, v)))
    weights = (q[:, :, -1:] @ k.transpose(2, 3) / 32**0.5).softmax(-1)
    save("kivi", (weights @ v)[0, :, 0].contiguous().numpy())


if __name__ == "__main__":
    only = sys.argv[3:]
    for made in (
        xattention, flexprefill, spargeattn, moba, minference, dsa, quest, policies, r_kv, tova, think, defensivekv,
        seer_attention, kivi,
    ):
        if not only or made.__name__ in only:
            made()
