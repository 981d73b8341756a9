"""The random tensors of tests/mechanisms/harness.h (Case), the same numbers: SplitMix64 and Box-Muller."""

import numpy as np


class Random:
    def __init__(self, seed):
        self.state = (seed * 0x9E3779B97F4A7C15 + 0x853C49E6748FEA9B) % 2**64

    def uniform(self, count):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = np.uint64(self.state) + steps
        self.state = int(z[-1])
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, *shape):
        u, v = self.uniform(2 * int(np.prod(shape))).reshape(-1, 2).T
        return (np.sqrt(-2 * np.log(1 - u)) * np.cos(6.283185307179586 * v)).reshape(shape)


def case(h, g, n, m, d, d_v, seed=1, sharpness=1.5):
    """q [h, n, d], k [g, m, d], v [g, m, d_v], f32."""
    random = Random(seed)
    q = sharpness * random.normal(h, n, d)
    return tuple(x.astype(np.float32) for x in (q, random.normal(g, m, d), random.normal(g, m, d_v)))
