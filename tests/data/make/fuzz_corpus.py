#!/usr/bin/env python3
"""Seeds of the fuzzers: small, and each of another kind.

    pip install gguf==0.19.0 numpy==2.4.6
    python tests/data/make/fuzz_corpus.py tests/data tests/fuzz/corpus
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

data, corpus = Path(sys.argv[1]), Path(sys.argv[2])


def vocabulary(path, model, tokens, kinds, scores=None, merges=None, pre=None):
    file = GGUFWriter(path, "llama")
    file.add_tokenizer_model(model)
    if pre:
        file.add_tokenizer_pre(pre)
    file.add_token_list(tokens)
    file.add_token_types(kinds)
    if scores:
        file.add_token_scores(scores)
    if merges:
        file.add_token_merges(merges)
    file.add_bos_token_id(0)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()


def put(target, name, content):
    (corpus / target).mkdir(parents=True, exist_ok=True)
    (corpus / target / name).write_bytes(content)


small = (data / "gguf/small.gguf").read_bytes()
put("gguf", "small", small)
put("gguf", "cut", small[:400])
put("gguf", "empty", b"GGUF\x03\0\0\0" + bytes(16))
for name in ("f4", "i8", "u1", "scalar", "empty", "v2", "v3", "fortran", "fields"):
    put("npy", name, (data / f"npy/{name}.npy").read_bytes())
for name in ("stored", "deflated"):
    put("npz", name, (data / f"npy/{name}.npz").read_bytes())
hostile = (data / "tokenizer/hostile.txt").read_bytes()
for which in range(8):
    put("tokenizer", f"text{which}", bytes([which]) + hostile[which * 700:which * 700 + 400])
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "v.gguf"
    N, C, U, B = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE
    vocabulary(path, "gpt2", ["<s>", "a", "b", "ab", "Ġ", "Ġab", "xy"], [C, N, N, N, N, N, U],
               merges=["a b", "Ġ ab"], pre="smollm")
    put("tokenizer", "bpe", b"\xff" + path.read_bytes() + b" ab xyab ba")
    vocabulary(path, "llama", ["<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab"], [C, C, B, N, N, N, N, N],
               scores=[0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0])
    put("tokenizer", "spm", b"\xff" + path.read_bytes() + b" ab ab\nba")
