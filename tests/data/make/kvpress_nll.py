"""What a real model says behind a prompt that kvpress has compressed: the figures of docs/testing.md, "Beside other programs".

    pip install kvpress==0.5.5 torch==2.11.0 transformers==5.2.0 gguf==0.19.0 numpy
    heed tokenize -m models/smollm2-135m.gguf -f models/text.txt --json > tokens.json
    python tests/data/make/kvpress_nll.py models smollm2-135m.gguf tokens.json 0.8 [NAME …]

Takes tokens 4000 … 5755 of the text: 1500 are the prompt, and the mean loss of the last 255 is printed, each predicted from
the tokens before it and what is left of the prompt. transformers runs the model in f32. Beside it, with the same tokens in
tokens.npy and the same model written out in f32 (f32_model.py): heed trace -m f32.gguf --tokens tokens.npy --prefill 1500
--kv f32 --attention "snapkv(budget=299,window=32)" -o trace.npz, whose nll[1500:] is what to compare.
"""

import json
import sys

import numpy as np
import torch
from kvpress import (
    AdaKVPress, CapPress, ChunkKVPress, CriticalAdaKVPress, CriticalKVPress, CURPress, EntropyGatedChunkKVPress,
    ExpectedAttentionPress, KeyDiffPress, KeyRerotationPress, KnormPress, KVzipPress, LagKVPress, MergingPress,
    NonCausalAttnPress, ObservedAttentionPress, PyramidKVPress, SnapKVPress, StreamingLLMPress, TOVAPress,
)
from kvpress.presses import kvzip_press
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

folder, file, tokens, ratio = sys.argv[1:4] + [float(sys.argv[4])]
PROMPT, FOLLOW = 1500, 256
ids = torch.tensor(json.load(open(tokens))["ids"][4000 : 4000 + PROMPT + FOLLOW])[None]
weights = False


def attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Causal, aligned at the end, without the keys that a press has masked: so that many tokens can follow at once."""
    g, n, m = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    sees = torch.ones(n, m, dtype=torch.bool).tril(m - n).repeat(key.shape[1], 1, 1)
    masked = getattr(module, "masked_key_indices", None)
    if n == m:
        module.masked_key_indices = None
    elif masked is not None:
        sees[masked[1], :, masked[2]] = False
    key, value, sees = (x.repeat_interleave(g, d) for x, d in ((key, 1), (value, 1), (sees, 0)))
    p = (query @ key.transpose(2, 3) * scaling).masked_fill(~sees, -torch.inf).softmax(-1)
    return (p @ value).transpose(1, 2).contiguous(), p if weights and n == m else None


ALL_ATTENTION_FUNCTIONS["aligned"] = attention
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, attn_implementation="aligned").eval()


class Tokenizer:
    """The model's, without its chat template; the request ends in an empty line, as heed's does."""

    chat_template, own = None, AutoTokenizer.from_pretrained(folder, gguf_file=file)

    @classmethod
    def from_pretrained(cls, _):
        return cls()

    def encode(self, text, **more):
        return self.own.encode("\n\n" if text == "\n" else text, **more)


kvzip_press.AutoTokenizer = Tokenizer
snap = lambda: SnapKVPress(ratio, window_size=32)
presses = {
    "knorm": KnormPress(ratio), "keydiff": KeyDiffPress(ratio), "snapkv": snap(), "tova": TOVAPress(ratio),
    "expected-attention": ExpectedAttentionPress(ratio), "lagkv": LagKVPress(ratio),
    "observed-attention": ObservedAttentionPress(ratio), "streaming-llm": KeyRerotationPress(StreamingLLMPress(ratio)),
    "chunkkv": ChunkKVPress(snap()), "adakv": AdaKVPress(snap()), "criticalkv": CriticalKVPress(snap()),
    "critical-ada": CriticalAdaKVPress(snap()), "kvzip": KVzipPress(ratio), "cur": CURPress(ratio), "capkv": CapPress(ratio),
    "noncausal": NonCausalAttnPress(ratio), "pyramidkv": PyramidKVPress(ratio, window_size=32),
    "rerotate": KeyRerotationPress(snap()), "entropy-chunk": EntropyGatedChunkKVPress(snap()),
    "merge-evict": MergingPress(snap()),
}
with torch.no_grad():
    for name, press in presses.items():
        if sys.argv[5:] and name not in sys.argv[5:]:
            continue
        weights, cache = name == "observed-attention", DynamicCache()
        with press(model):
            model(input_ids=ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
        weights = False
        moved = isinstance(press, KeyRerotationPress)
        at = torch.arange(FOLLOW - 1) + (cache.get_seq_length() if moved else PROMPT)
        said = model(ids[:, PROMPT:-1], past_key_values=cache, position_ids=at[None], cache_position=at).logits[0]
        print(name, ratio, np.round(torch.nn.functional.cross_entropy(said, ids[0, PROMPT + 1 :]).item(), 5), flush=True)
