"""Random numbers for generated data: a counter-based generator that no library version can change.

Number `counter` of stream `index` under `seed` is a pure function of the three, so that an example depends on its
index alone and any number of workers makes the same data:

    key  = mix(mix(seed + γ) + γ·(index + 1))        word = mix(key + γ·(counter + 1))        mod 2⁶⁴

with mix the finaliser and γ the increment of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a stream is SplitMix64
started at `key`. All arithmetic is on uint64, where wrapping is defined and no promotion to float can occur.
"""

import numpy as np
from numba import njit, uint64

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)
_ONE, _LOW = np.uint64(1), np.uint64(0xFFFFFFFF)


@njit(uint64(uint64), nogil=True, inline="always")
def mix(word):
    """A bijection of 64-bit words under which neighbours look unrelated."""
    word = (word ^ (word >> _30)) * _MIX_A
    word = (word ^ (word >> _27)) * _MIX_B
    return word ^ (word >> _31)


@njit(uint64(uint64, uint64), nogil=True)
def stream(seed, index):
    """The key of stream `index`."""
    return mix(mix(seed + GAMMA) + GAMMA * (index + _ONE))


@njit(uint64(uint64, uint64), nogil=True)
def draw(key, counter):
    """Word number `counter` of a stream: 64 random bits."""
    return mix(key + GAMMA * (counter + _ONE))


@njit(uint64(uint64, uint64), nogil=True)
def below(word, bound):
    """A uniform integer 0 … bound − 1 from the low 32 bits of `word`; its bias is at most bound / 2³²."""
    return ((word & _LOW) * bound) >> _32
