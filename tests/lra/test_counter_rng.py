"""The random numbers of generated data are those of the formula, on every machine."""

import numpy as np

from lra.counter_rng import below, draw, stream

WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15


def plain_mix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def test_a_stream_is_splitmix64_with_its_published_outputs():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [draw(np.uint64(1234567), np.uint64(counter)) for counter in range(5)] == published


def test_the_key_of_a_stream_follows_the_formula_in_plain_integers():
    for seed, index in [(0, 0), (1, 2), (2**63 - 1, 2**40), (WORD - 1, WORD - 1)]:
        expected = plain_mix((plain_mix((seed + GAMMA) % WORD) + GAMMA * (index + 1)) % WORD)
        assert int(stream(np.uint64(seed), np.uint64(index))) == expected


def test_bounded_integers_reach_every_value_and_no_other():
    assert below(np.uint64(0xFFFFFFFF), np.uint64(10)) == 9
    assert below(np.uint64(0xFFFFFFFF_00000000), np.uint64(10)) == 0
    key = stream(np.uint64(3), np.uint64(0))
    counts = np.bincount([int(below(draw(key, np.uint64(i)), np.uint64(9))) for i in range(9000)])
    assert len(counts) == 9
    assert ((counts - 1000) ** 2 / 1000).sum() < 26.1  # chi-squared with 8 degrees of freedom, p = 0.001
