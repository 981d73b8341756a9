#!/usr/bin/env python3
"""A small GGUF file with every kind of value and tensors of several types, as the gguf package writes it.

    pip install gguf==0.19.0
    python tests/data/make/small_gguf.py tests/data/gguf/small.gguf
"""
import sys

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as V
from gguf import GGUFWriter

out = GGUFWriter(sys.argv[1], "tiny")
out.add_custom_alignment(64)
numbers = {"u8": (V.UINT8, 255), "i8": (V.INT8, -128), "u16": (V.UINT16, 65535), "i16": (V.INT16, -32768),
           "u32": (V.UINT32, 4294967295), "i32": (V.INT32, -2147483648), "f32": (V.FLOAT32, 0.1),
           "u64": (V.UINT64, 2**64 - 1), "i64": (V.INT64, -(2**63)), "f64": (V.FLOAT64, 0.1), "bool": (V.BOOL, True)}
for name, (kind, value) in numbers.items():
    out.add_key_value(f"one.{name}", value, kind)
out.add_string("one.string", "naïve ☕")
out.add_array("many.strings", ["", "a", "βγ"])
out.add_array("many.i32", [1, -2, 3])
out.add_array("many.f32", [0.5, -1.5])
out.add_array("many.bool", [True, False])
out.add_array("many.nested", [[1, 2], [3, 4, 5]])
random = np.random.default_rng(7)
out.add_tensor("f32", np.arange(12, dtype=np.float32).reshape(3, 4))
out.add_tensor("f16", np.arange(6, dtype=np.float16).reshape(2, 3))
out.add_tensor("i32", np.arange(5, dtype=np.int32))
out.add_tensor("q8_0", random.integers(0, 128, (2, 34), dtype=np.uint8), raw_dtype=Type.Q8_0)
out.write_header_to_file()
out.write_kv_data_to_file()
out.write_tensors_to_file()
out.close()
