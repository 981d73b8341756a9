#!/usr/bin/env python3
"""Random blocks of every quantised format and their values as the gguf package gives them.

    pip install gguf==0.19.0
    python tests/data/make/quant.py tests/data/quant

For each format NAME.blocks (raw bytes) and NAME.values (little-endian f32).
"""
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

# Where the f16 scales of a block lie, block bytes, block values.
FORMATS = {
    "q4_0": ([0], 18, 32), "q4_1": ([0, 2], 20, 32), "q5_0": ([0], 22, 32), "q5_1": ([0, 2], 24, 32),
    "q8_0": ([0], 34, 32), "iq4_nl": ([0], 18, 32), "q2_k": ([80, 82], 84, 256), "q3_k": ([108], 110, 256),
    "q4_k": ([0, 2], 144, 256), "q5_k": ([0, 2], 176, 256), "q6_k": ([208], 210, 256),
}

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
random = np.random.default_rng(20240611)
for name, (scales, size, width) in FORMATS.items():
    blocks = random.integers(0, 256, (12 if width == 32 else 3, size), dtype=np.uint8)
    for at in scales:
        # Ordinary scales of both signs, then one subnormal and one large.
        d = (random.uniform(-1, 1, len(blocks)) * 2.0 ** random.integers(-10, 3, len(blocks))).astype(np.float16)
        d[-1], d[-2] = 3e-7, 1000
        blocks[:, at:at + 2] = d.view(np.uint8).reshape(-1, 2)
    kind = Type[name.upper()]
    values = dequantize(blocks, kind)
    assert values.size == len(blocks) * width and np.isfinite(values).all()
    (out / f"{name}.blocks").write_bytes(blocks.tobytes())
    (out / f"{name}.values").write_bytes(values.astype("<f4").tobytes())
