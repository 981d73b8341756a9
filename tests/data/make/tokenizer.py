#!/usr/bin/env python3
"""Token ids as llama.cpp's llama-tokenize gives them, and the small vocabularies they are made with.

    pip install gguf==0.19.0
    python tests/data/make/hostile.py tests/data/tokenizer/hostile.txt
    # the Jargon File, version 4.4.7, which is in the public domain
    head -c 45000 jargon.txt | tail -c 24000 | iconv -c -f utf-8 -t utf-8 > tests/data/tokenizer/plain.txt
    python tests/data/make/tokenizer.py LLAMA_TOKENIZE models tests/data/tokenizer

bpe.gguf: 256 bytes and merges learnt from the hostile text without cutting it into words, so that ids show where a
pre-tokenizer cuts. spm.gguf: characters, byte tokens, user-defined and control tokens, and pieces learnt the same way.
small.npz: ids of the hostile text by pre-tokenizer ("spm" for spm.gguf, "spm_special" with control tokens parsed).
models.npz: ids of both texts by model, e.g. "smollm2-135m.hostile"; ".special" with control tokens parsed.
"""
import collections
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

tokenize, models, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
PRES = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "falcon", "deepseek-coder", "dbrx"]


def learn(symbols, count):
    """BPE merges of a sequence of symbols, most frequent first, ties in order of the pair."""
    merges = []
    for _ in range(count):
        pairs = collections.Counter(zip(symbols, symbols[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        joined, at = [], 0
        while at < len(symbols):
            if tuple(symbols[at:at + 2]) == best:
                joined.append("".join(best))
                at += 2
            else:
                joined.append(symbols[at])
                at += 1
        symbols = joined
    return merges


def byte_characters():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table, extra = {b: chr(b) for b in printable}, 256
    for b in range(256):
        if b not in table:
            table[b] = chr(extra)
            extra += 1
    return [table[b] for b in range(256)]


def writer(path, model):
    file = GGUFWriter(path, "llama")
    for add, value in ((file.add_context_length, 64), (file.add_embedding_length, 64), (file.add_block_count, 1),
                       (file.add_feed_forward_length, 64), (file.add_head_count, 1), (file.add_layer_norm_rms_eps, 1e-5)):
        add(value)
    file.add_tokenizer_model(model)
    return file


def close(file):
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()


def write_bpe(path, pre, text):
    characters = byte_characters()
    merges = learn([characters[b] for b in text], 500)
    tokens = characters + list(dict.fromkeys("".join(pair) for pair in merges)) + ["<|im_start|>", "<|im_end|>", "  x"]
    kinds = [TokenType.NORMAL] * (len(tokens) - 3) + [TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED]
    file = writer(path, "gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(tokens)
    file.add_token_types(kinds)
    file.add_token_merges([" ".join(pair) for pair in merges])
    file.add_bos_token_id(len(tokens) - 3)
    file.add_eos_token_id(len(tokens) - 2)
    close(file)


def write_spm(path, text):
    letters = [c for c in text.decode(errors="ignore").replace(" ", "\u2581")]
    merges = learn(letters, 400)
    common = [c for c, n in collections.Counter(letters).most_common() if n > 1]
    pieces = common + list(dict.fromkeys("".join(pair) for pair in merges))
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + ["   ", "\n\n\n", "<table>"] + pieces
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    kinds += [TokenType.USER_DEFINED] * 3 + [TokenType.NORMAL] * len(pieces)
    file = writer(path, "llama")
    file.add_token_list(tokens)
    # Every third score repeats, so that ties are exercised.
    file.add_token_scores([0.0] * 262 + [-float(i - i % 3) for i in range(len(pieces))])
    file.add_token_types(kinds)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_add_space_prefix(True)
    close(file)


def ids(model, text, special=False):
    command = [tokenize, "-m", model, "-f", text, "--ids", "--no-bos", "--no-escape", "--log-disable"]
    answer = subprocess.run(command + ([] if special else ["--no-parse-special"]), capture_output=True, check=True)
    return np.array(json.loads(answer.stdout), "<i4")


hostile, plain = out / "hostile.txt", out / "plain.txt"
text = hostile.read_bytes()
write_spm(out / "spm.gguf", text)
small = {"spm": ids(out / "spm.gguf", hostile), "spm_special": ids(out / "spm.gguf", hostile, True)}
for pre in PRES:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bpe.gguf"
        write_bpe(path, pre, text)
        small[pre] = ids(path, hostile)
        if pre == "default":
            (out / "bpe.gguf").write_bytes(path.read_bytes())
            small["default_special"] = ids(path, hostile, True)
np.savez_compressed(out / "small.npz", **small)
found = {}
for model in ("smollm2-135m", "gemma3-270m"):
    path = models / f"{model}.gguf"
    found[f"{model}.hostile"] = ids(path, hostile)
    found[f"{model}.plain"] = ids(path, plain)
    found[f"{model}.special"] = ids(path, hostile, True)
np.savez_compressed(out / "models.npz", **found)
