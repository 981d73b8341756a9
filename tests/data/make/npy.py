#!/usr/bin/env python3
"""npy and npz files as numpy writes them, right and unusual.

    pip install numpy==2.4.6
    python tests/data/make/npy.py tests/data/npy
"""
import sys
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
base = np.arange(24).reshape(2, 3, 4) - 5
for name, kind in {"f2": "<f2", "f4": "<f4", "f8": "<f8", "i1": "<i1", "i4": "<i4", "i8": "<i8"}.items():
    np.save(out / f"{name}.npy", base.astype(kind))
np.save(out / "u1.npy", (base + 5).astype("u1"))
np.save(out / "u8.npy", (base + 5).astype("<u8"))
np.save(out / "bool.npy", base > 0)
np.save(out / "scalar.npy", np.float32(2.5))
np.save(out / "vector.npy", np.arange(5, dtype="<i4"))
np.save(out / "empty.npy", np.zeros((0, 7), "<f4"))
for major in (2, 3):
    with open(out / f"v{major}.npy", "wb") as file:
        npy.write_array(file, base.astype("<f4"), version=(major, 0))
# What is refused in words.
np.save(out / "fortran.npy", np.asfortranarray(base.astype("<f4")))
np.save(out / "big.npy", base.astype(">f4"))
np.save(out / "text.npy", np.array(["a", "bc"]))
np.save(out / "complex.npy", base.astype("c8"))
np.save(out / "fields.npy", np.zeros(2, [("x", "<f4"), ("y", "<i4")]))
np.save(out / "deep.npy", np.zeros((1,) * 6, "<f4"))
np.savez(out / "stored.npz", a=base.astype("<f4"), b=np.arange(3))
np.savez_compressed(out / "deflated.npz", a=base.astype("<f4"), zeros=np.zeros((50, 40), "<f4"))
