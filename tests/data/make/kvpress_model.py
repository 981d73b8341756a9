"""What kvpress, as published, keeps of a prompt in a small model, and what the model then says; for
tests/mechanisms/golden_model_test.cpp.

    pip install kvpress==0.5.5 torch==2.11.0 transformers==5.2.0 gguf==0.19.0 numpy
    python tests/data/make/kvpress_model.py tests/data/golden/model

Writes model.gguf, a small random model of three layers, and tokens.npy: a prompt of 150 tokens, no two alike, and 4 that
follow, one by one. transformers runs it in f32. For every policy NAME.npy has bytes [layers, KV heads, 150], 1 for an entry
that stayed (not where keys were rotated anew: what stays is what stays without), and NAME.logits.npy the logits behind the
last token, f32 [160] (not where heads go on streaming, which the library's do not). Where kvpress wants what a model of this
size does not have (a tokenizer, trained filters, a curve of budgets, heads that stream) it is given something small, which
the test gives heed too.
"""

import contextlib
import sys

import gguf
import numpy as np
import torch
import transformers
from kvpress import (
    AdaKVPress, BlockPress, CapPress, ChunkKVPress, ChunkPress, CompactorPress, CriticalAdaKVPress, CriticalKVPress, CURPress, DecodingPress,
    DMSPress, DuoAttentionPress, EntropyGatedChunkKVPress, ExpectedAttentionPress, ExpectedAttentionStatsPress, FinchPress, KeyDiffPress, KeyRerotationPress,
    KnormPress, KVComposePress, KVgradPress, KVzipPress, LagKVPress, LeverageScorePress, LUKVPress, MergingPress, NonCausalAttnPress,
    ObservedAttentionPress, PrefillDecodingPress, PyramidKVPress, QFilterPress, RestoreKVPress, SimLayerKVPress, SnapKVPress, StreamingLLMPress, TOVAPress,
)
from kvpress.presses import kvzip_press
from kvpress.presses.base_press import BasePress
from peft import LoraConfig
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

PROMPT, FOLLOW, RATIO = 150, 4, 0.6
VOCABULARY, HIDDEN, LAYERS, H, G, D = 160, 32, 3, 6, 2, 16
ids = torch.tensor(np.random.default_rng(3).permutation(VOCABULARY)[None, : PROMPT + FOLLOW])


def write(path):
    """A random model whose heads do not all look alike, in halves: queries and keys have biases and no norm."""
    rng = np.random.default_rng(11)
    w = gguf.GGUFWriter(path, "qwen2")
    w.add_string("tokenizer.ggml.model", "none")
    w.add_vocab_size(VOCABULARY)
    w.add_context_length(512)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(HIDDEN)
    w.add_head_count(H)
    w.add_head_count_kv(G)
    w.add_key_length(D)
    w.add_value_length(D)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)

    steep = np.repeat([0.8, 1.6], D)[:, None]  # the second KV head's keys are twice the first's

    def matrix(name, rows, cols, gain=1.0):
        gain = np.resize(gain, (rows, 1))
        w.add_tensor(name, (gain * rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float16))

    def vector(name, size, mean, deviation):
        w.add_tensor(name, (mean + deviation * rng.standard_normal(size)).astype(np.float32))

    matrix("token_embd.weight", VOCABULARY, HIDDEN, HIDDEN**0.5)
    vector("output_norm.weight", HIDDEN, 1, 0.2)
    for l in range(LAYERS):
        b = f"blk.{l}."
        vector(b + "attn_norm.weight", HIDDEN, 1, 0.2)
        vector(b + "ffn_norm.weight", HIDDEN, 1, 0.2)
        for part, rows, cols in (("q", H * D, HIDDEN), ("k", G * D, HIDDEN), ("v", G * D, HIDDEN), ("output", HIDDEN, H * D)):
            matrix(f"{b}attn_{part}.weight", rows, cols, steep if part == "k" else 1.5)
            if part != "output":
                vector(f"{b}attn_{part}.bias", rows, 0, 0.5)
        for part in ("gate", "up", "down"):
            matrix(f"{b}ffn_{part}.weight", HIDDEN, HIDDEN)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def load(path, attention):
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    weights = {}
    for t in gguf.GGUFReader(path).tensors:
        part = t.name.split(".")
        if part[0] == "blk":
            name = f"model.layers.{part[1]}.{names[part[2]]}.{part[3]}"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[part[0]] + ".weight"
        weights[name] = torch.tensor(np.array(t.data)).float()
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=H, num_key_value_heads=G, head_dim=D, max_position_embeddings=512, rms_norm_eps=1e-6,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation=attention,
    )
    model = Qwen2ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def run(model, press, base=None):
    """Bytes [layers, KV heads, PROMPT], and the logits behind the last token; tokens go on at `base`."""
    cache, whole, g = DynamicCache(), DynamicCache(), model.config.num_key_value_heads
    decoding, restores = contextlib.ExitStack(), isinstance(press, RestoreKVPress)
    with torch.no_grad(), decoding:
        model(ids[:, :PROMPT], past_key_values=whole)
        if isinstance(press, PrefillDecodingPress):  # stays at work
            decoding.enter_context(press(model))
            model(input_ids=ids[:, :PROMPT], past_key_values=cache)
        else:
            with press(model):
                model(input_ids=ids[:, :PROMPT], past_key_values=cache)
        stayed = np.zeros((len(cache.layers), g, PROMPT), np.uint8)
        for l, layer in enumerate(cache.layers):
            masked = getattr(model.model.layers[l].self_attn, "masked_key_indices", None)
            for kv in range(g if base is None or restores else 0):
                near = torch.cdist(layer.keys[0, kv, :PROMPT].double(), whole.layers[l].keys[0, kv].double()).min(-1)
                assert float(near.values.max()) < 1e-4
                stayed[l, kv, near.indices.numpy()] = 1
            if masked is not None:
                stayed[l, masked[1].numpy(), masked[2].numpy()] = 0
        for i in range(FOLLOW):
            at = torch.tensor([(PROMPT if base is None else base) + i])
            out = model(
                ids[:, PROMPT + i : PROMPT + i + 1], past_key_values=cache, position_ids=at[None], cache_position=at
            )
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return stayed, out.logits[0, -1].numpy()


class Given:
    """A press whose post_init_from_model has been done by hand."""

    def __init__(self, press, **what):
        press.post_init_from_model = lambda model: None
        for name, value in what.items():
            setattr(press, name, value)
        self.press = press

    def __call__(self, model):
        return BasePress.__call__(self.press, model)


def filters(model):
    """−1 times the first right singular vector of each group's rotated queries of the prompt."""
    taken = []
    from transformers.models.qwen2 import modeling_qwen2

    turn = modeling_qwen2.apply_rotary_pos_emb

    def watched(q, k, *rest, **more):
        out = turn(q, k, *rest, **more)
        taken.append(out[0][0])
        return out

    modeling_qwen2.apply_rotary_pos_emb = watched
    with torch.no_grad():
        model(ids[:, :PROMPT])
    modeling_qwen2.apply_rotary_pos_emb = turn
    out = []
    for q in taken:
        rows = q.reshape(G, -1, D)
        f = torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]
        out.append(-f * torch.sign((rows.mean(1) * f).sum(-1, keepdim=True)))
    return torch.stack(out)


def restoring(model):
    """RestoreKV with random rows and low-rank matrices, which go to restore.npz too, as heed takes them."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model.add_adapter(config, adapter_name="restorekv")
    rng, arrays = np.random.default_rng(8), {"embeddings": np.float32(np.random.default_rng(9).normal(size=(8, HIDDEN)))}
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        both = []
        for layer in model.model.layers:
            matrix = getattr(layer.self_attn if name in "qkvo" else layer.mlp, name + "_proj")
            pair = [matrix.lora_A["restorekv"].weight, matrix.lora_B["restorekv"].weight]
            for w in pair:
                w.data = torch.tensor(rng.normal(size=w.shape) / 4).float()
            both.append([pair[0].detach().numpy(), pair[1].detach().numpy() * matrix.scaling["restorekv"]])
        arrays[name + ".a"], arrays[name + ".b"] = (np.stack(w) for w in zip(*both))
    model.disable_adapters()
    np.savez(f"{folder}/restore.npz", **arrays)
    press = RestoreKVPress(RATIO)
    press.post_init_from_model = lambda model: None
    press.restore_embeddings = torch.tensor(arrays["embeddings"])
    return press


class NoTokenizer:
    chat_template = None

    @staticmethod
    def from_pretrained(_):
        return NoTokenizer()

    def encode(self, *_, **__):
        return torch.zeros((1, 0), dtype=torch.long)


kvzip_press.AutoTokenizer = NoTokenizer
drawn = torch.randn


def unit(*size, **more):
    """In place of random sketches: the unit matrix (a sketch is divided by the root of its width)."""
    return torch.eye(size[-1]).expand(size) * size[-1] ** 0.5


folder = sys.argv[1]
write(f"{folder}/model.gguf")
np.save(f"{folder}/tokens.npy", ids[0].numpy().astype(np.int32))
fast, slow = load(f"{folder}/model.gguf", "sdpa"), load(f"{folder}/model.gguf", "eager")
snap = lambda: SnapKVPress(window_size=32, compression_ratio=RATIO)
curve = np.zeros((99, LAYERS, G))
curve[59] = [[0.5, 0.77], [0.31, 0.82], [0.6, 0.6]]
finch = dict(window_size=32)
rng = np.random.default_rng(5)
mean, mixing = rng.normal(size=(LAYERS, H, D)), rng.normal(size=(LAYERS, H, D, D)) / 4
queries = {"mean": mean.astype(np.float32), "covariance": (mixing @ mixing.swapaxes(-1, -2)).astype(np.float32)}
np.savez(f"{folder}/queries.npz", **queries)
presses = {
    "knorm": KnormPress(RATIO),
    "keydiff": KeyDiffPress(RATIO),
    "cur": CURPress(RATIO),
    "lagkv": LagKVPress(RATIO, lag_size=32),
    "noncausal": NonCausalAttnPress(RATIO, chunk_size=50),
    "leverage": LeverageScorePress(RATIO, sketch_dimension=16),
    "compactor": CompactorPress(RATIO, chunk_size=46, sketch_dimension=16),
    "expected-attention": ExpectedAttentionPress(RATIO),
    "expected-attention-stats": Given(
        ExpectedAttentionStatsPress(RATIO), mu=torch.tensor(queries["mean"]), cov=torch.tensor(queries["covariance"])
    ),
    "capkv": CapPress(RATIO),
    "snapkv": snap(),
    "tova": TOVAPress(RATIO),
    "observed-attention": ObservedAttentionPress(RATIO),
    "streaming-llm": KeyRerotationPress(StreamingLLMPress(RATIO)),
    "rerotate": KeyRerotationPress(snap()),
    "finch": Given(FinchPress(RATIO, rerotate_keys=False), **finch),
    "finch-rerotated": Given(FinchPress(RATIO), **finch),
    "pyramidkv": PyramidKVPress(RATIO, window_size=8, beta=4),
    "adakv": AdaKVPress(snap()),
    "criticalkv": CriticalKVPress(snap()),
    "critical-ada": CriticalAdaKVPress(snap()),
    "chunkkv": ChunkKVPress(snap(), chunk_length=20),
    "entropy-chunk": EntropyGatedChunkKVPress(snap()),
    "block-evict": BlockPress(KeyDiffPress(RATIO), block_size=32),
    "block-evict-many": BlockPress(KeyDiffPress(RATIO), block_size=5),
    "chunk-local": ChunkPress(KnormPress(RATIO), chunk_length=64),
    "merge-evict": MergingPress(snap()),
    "merge-evict-some": MergingPress(snap(), similarity_threshold=0.52, merge_fraction=0.5),
    "simlayerkv": SimLayerKVPress(lazy_threshold=0.185, n_recent=40),
    "dms": DMSPress(KnormPress(), threshold=-4.2, sliding_window_size=20),
    "duo-attention": Given(
        DuoAttentionPress(head_compression_ratio=0.5), sink_size=8, recent_size=40,
        streaming_mask=torch.tensor([[False, True]] * LAYERS),
    ),
    "lu-kv": LUKVPress(compression_ratio=RATIO),
    "q-filters": Given(QFilterPress(RATIO), q_filters=filters(fast)),
    "kvzip": KVzipPress(RATIO, chunk_size=64),
    "kvzip-layer": KVzipPress(RATIO, layerwise=True),
    "kvgrad": KVgradPress(RATIO, chunk_size=64),
    "kvgrad-layer": KVgradPress(RATIO, chunk_size=40, layerwise=True),
    "restorekv": None,
    "kvcompose": KVComposePress(compression_ratio=RATIO),
}
for name, press, interval in (("knorm", KnormPress, 2), ("keydiff", KeyDiffPress, 3), ("tova", TOVAPress, 1)):
    presses[name + "-decoding"] = PrefillDecodingPress(press(RATIO), DecodingPress(press(), interval, 60))
presses["lu-kv"]._budget_curves = curve
if __name__ == "__main__":
    only = sys.argv[2:]
    with torch.no_grad():
        np.save(f"{folder}/dense.logits.npy", fast(ids).logits[0, -1].numpy())
    for name, press in presses.items():
        if only and name not in only:
            continue
        torch.randn = unit
        model = slow if name == "observed-attention" else fast
        if name == "restorekv":
            model = load(f"{folder}/model.gguf", "sdpa")
            press = restoring(model)
        moved = name in ("streaming-llm", "rerotate", "finch-rerotated")
        base = 60 if moved else PROMPT + 8 if name == "restorekv" else None
        stayed, logits = run(model, press, base)
        torch.randn = drawn
        if not moved:
            np.save(f"{folder}/{name}.npy", stayed)
        if name != "duo-attention":
            np.save(f"{folder}/{name}.logits.npy", logits)
        print(name, stayed.sum(-1).tolist(), transformers.__version__)
