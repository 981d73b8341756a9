"""Writes a tiny random model of each architecture as GGUF, for tests/model/golden_test.cpp.

    pip install gguf==0.19.0 numpy
    python3 tests/data/make/tiny_models.py tests/data/tiny

then logits by llama.cpp (see llama_logits.cpp beside this file).
"""
import sys
import numpy as np
import gguf

VOCABULARY, HIDDEN, H, G, FF = 64, 48, 6, 2, 64


def write(path, arch):
    rng = np.random.default_rng(sum(map(ord, arch)))
    w = gguf.GGUFWriter(path, arch)
    layers = 6 if arch == "gemma3" else 2  # every sixth layer of Gemma 3 sees everything
    d = HIDDEN // H if arch == "qwen2" else 16
    w.add_string("tokenizer.ggml.model", "none")
    w.add_vocab_size(VOCABULARY)
    w.add_context_length(512)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(layers)
    w.add_feed_forward_length(FF)
    w.add_head_count(H)
    w.add_head_count_kv(G)
    w.add_key_length(d)
    w.add_value_length(d)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(1e6 if arch == "gemma3" else 10000.0)
    if arch == "llama":
        w.add_rope_dimension_count(d)
    if arch == "gemma3":
        w.add_sliding_window(16)

    def matrix(name, rows, cols, dtype=np.float32):
        w.add_tensor(name, (rng.standard_normal((rows, cols)) * 1.5 / np.sqrt(cols)).astype(dtype))

    def vector(name, size, mean=1.0, deviation=0.2):
        w.add_tensor(name, (mean + deviation * rng.standard_normal(size)).astype(np.float32))

    matrix("token_embd.weight", VOCABULARY, HIDDEN)
    vector("output_norm.weight", HIDDEN)
    if arch in ("llama", "qwen2"):
        matrix("output.weight", VOCABULARY, HIDDEN)
    for l in range(layers):
        b = f"blk.{l}."
        vector(b + "attn_norm.weight", HIDDEN)
        vector(b + "ffn_norm.weight", HIDDEN)
        matrix(b + "attn_q.weight", H * d, HIDDEN)
        matrix(b + "attn_k.weight", G * d, HIDDEN)
        matrix(b + "attn_v.weight", G * d, HIDDEN)
        matrix(b + "attn_output.weight", HIDDEN, H * d)
        if arch == "qwen2":
            vector(b + "attn_q.bias", H * d, 0, 0.5)
            vector(b + "attn_k.bias", G * d, 0, 0.5)
            vector(b + "attn_v.bias", G * d, 0, 0.5)
        if arch in ("qwen3", "gemma3"):
            vector(b + "attn_q_norm.weight", d)
            vector(b + "attn_k_norm.weight", d)
        if arch == "gemma3":
            vector(b + "post_attention_norm.weight", HIDDEN)
            vector(b + "post_ffw_norm.weight", HIDDEN)
        matrix(b + "ffn_gate.weight", FF, HIDDEN)
        matrix(b + "ffn_up.weight", FF, HIDDEN)
        matrix(b + "ffn_down.weight", HIDDEN, FF)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


for arch in ("llama", "qwen2", "qwen3", "gemma3"):
    write(f"{sys.argv[1]}/{arch}.gguf", arch)
