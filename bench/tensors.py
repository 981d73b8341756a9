"""What mechanisms that no released model has weights for take on random tensors, beside dense attention over the same ones.

    python3 bench/tensors.py build/heed [--backend cuda] [--tokens 4096] [NAME ...] > rows.jsonl

A line of JSON each: 32 query heads over 8 KV heads of 128 channels, bf16, causal; medians of five runs. Needs numpy.
"""
import argparse, json, os, subprocess, sys, tempfile
import numpy as np

H, G, D, HIDDEN = 32, 8, 128, 2048
random = np.random.default_rng(7)


def normal(*shape, scale=1.0):
    return (scale * random.standard_normal(shape)).astype(np.float32)


def share(*shape):
    """Numbers between 0 and 1."""
    return random.random(shape, dtype=np.float32)


def matrix(rows, columns):
    return normal(rows, columns, scale=columns**-0.5)


def inputs_of(name, n):
    """What a trained layer would give beside q, k and v, in the shapes that `heed info NAME` lists."""
    return {
        "dma": lambda: {"w_dt": matrix(G, G * D), "a": share(G)},
        "dsa": lambda: {"index_q": normal(4, n, 64), "index_k": normal(n, 64), "index_w": share(n, 4)},
        "fast-kvzip": lambda: {"x": normal(n, HIDDEN), "w_q": matrix(16 * H, HIDDEN), "b_q": normal(16 * H), "w_k": matrix(16 * G, HIDDEN),
                               "b": normal(H), "fixed_k": normal(G, 16, 16)},
        "flashblock": lambda: {"cached_q": normal(H, n, D)},
        "flux_layer_router": lambda: {"w1": matrix(8 * D, D), "b1": normal(8 * D), "w2": matrix(2 * D, 8 * D), "b2": normal(2 * D),
                                      "w3": matrix(4 * D, 2 * D), "b3": normal(4 * D), "w4": matrix(D, 4 * D), "b4": normal(D),
                                      "w5": matrix(2, D), "b5": np.array([1, 0], np.float32)},
        "gdn": lambda: {"g": -0.2 * np.abs(normal(H, n)), "beta": share(H, n)},
        "kvzap": lambda: {"x": normal(n, HIDDEN), "w1": matrix(G, HIDDEN), "b1": normal(G)},
        "leank": lambda: {"channels": (share(G, D) < 0.3).astype(np.float32)},
        "mosa": lambda: {"router": share(H, n)},
        "nats": lambda: {"types": normal(G, n, 3)},
        "nsa": lambda: {"gates": share(H, n, 3)},
        "rettention": lambda: {"dense_q": normal(H, n, D), "dense_k": normal(G, n, D), "dense_v": normal(G, n, D)},
        "routing_transformer": lambda: {"centroids": normal(H, 32, D)},
        "seer_attention": lambda: {"plain_q": normal(H, n, D), "plain_k": normal(G, n, D), "w_k": np.stack([matrix(2 * D, D) for _ in range(H)])},
        "sparsek": lambda: {"importance": normal(G, n)},
        "superlinear": lambda: {"search_q": normal(H, n, D)},
    }[name]()


NAMES = ["dma", "dsa", "fast-kvzip", "flashblock", "flux_layer_router", "gdn", "kvzap", "leank", "mosa", "nats", "nsa", "rettention",
         "routing_transformer", "seer_attention", "sparsek", "superlinear"]


def main():
    options = argparse.ArgumentParser()
    options.add_argument("heed")
    options.add_argument("names", nargs="*")
    options.add_argument("--backend", default="auto")
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--times", type=int, default=5)
    o = options.parse_intermixed_args()
    n = o.tokens
    with tempfile.TemporaryDirectory() as folder:
        def saved(name, array):
            path = os.path.join(folder, name + ".npy")
            np.save(path, array)
            return path
        q, k, v = saved("q", normal(H, n, D)), saved("k", normal(G, n, D)), saved("v", normal(G, n, D))
        for name in o.names or NAMES:
            given = [f"--input={key}={saved(key, array)}" for key, array in inputs_of(name.split("(")[0], n).items()]
            done = subprocess.run([o.heed, "apply", name, "--q", q, "--k", k, "--v", v, *given, "--dtype", "bf16", "--times", str(o.times),
                                   "--backend", o.backend, "-o", os.path.join(folder, "out.npz"), "--json"], capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
                continue
            row = json.loads(done.stdout)
            with np.load(os.path.join(folder, "out.npz")) as out:
                density = float(out["density"].mean()) if "density" in out else None
            print(json.dumps({"attention": name, "backend": row["backend"], "tokens": n, "heads": [H, G], "d": D, "density": density,
                              "ms": {part: round(1e3 * s, 3) for part, s in row["seconds"].items()}}), flush=True)


main()
