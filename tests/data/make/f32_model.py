"""f32_model.py IN.gguf OUT.gguf: the same model with every weight in F32, dequantised by the package gguf (0.19.0).

A program that rounds activations to match quantised weights (llama.cpp, to 8 bits) computes such a model without that
rounding, so its results can be compared closely.
"""
import sys

import numpy
from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants

source, target = sys.argv[1:3]
reader = GGUFReader(source)
writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
for name, field in reader.fields.items():
    if name.startswith("GGUF.") or name == "general.architecture":
        continue
    if name == "general.file_type":
        writer.add_file_type(0)
        continue
    inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
    writer.add_key_value(name, field.contents(), field.types[0], inner)
for tensor in reader.tensors:
    values = quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
    writer.add_tensor(tensor.name, values.reshape([int(size) for size in reversed(tensor.shape)]))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
