"""The order of samples: a keyed permutation in O(1) memory, a pure function of (seed, epoch, sample number)."""

import numpy as np

_ROUNDS = 8


class SampleOrder:
    """Maps the running number of a sample to the index of a window: epoch e shows each of the n windows once.

    The permutation of epoch e is a Feistel network keyed by (seed, e) on the smallest 2^b >= n, made a permutation of
    [0, n) by walking its cycle until the value is below n (fewer than 2 steps on average because 2^b < 2n).
    For n below about 10 the permutations are not quite equally likely (a few percent); nothing else depends on that.
    Nothing is stored, so any sample of any epoch is known at once, on any rank, after any restart.
    Sources: M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions" (1988);
    J. Black and P. Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), section 4 (cycle walking).
    """

    def __init__(self, n: int, seed: int, shuffle: bool = True):
        """n: number of windows, >= 1. seed: any integer. shuffle=False gives the identity in every epoch."""
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1")
        self.n = n
        self._seed = np.uint64(seed % (1 << 64))
        self._shuffle = shuffle
        bits = (n - 1).bit_length()
        self._left_bits = np.uint64(bits // 2)
        self._right_bits = np.uint64(bits - bits // 2)

    def index(self, sample: np.ndarray) -> np.ndarray:
        """Return the window index, int64 in [0, n), of each sample number, int64 >= 0 of any shape."""
        sample = np.asarray(sample, np.int64)
        epoch, position = np.divmod(sample.ravel(), self.n)
        if not self._shuffle or self.n == 1:
            return position.reshape(sample.shape)
        key = mix64(mix64(epoch.astype(np.uint64) + self._seed) ^ self._seed)
        value = self._permute(position.astype(np.uint64), key)
        outside = np.flatnonzero(value >= self.n)
        while outside.size:
            value[outside] = self._permute(value[outside], key[outside])
            outside = outside[value[outside] >= self.n]
        return value.astype(np.int64).reshape(sample.shape)

    def _permute(self, value: np.ndarray, key: np.ndarray) -> np.ndarray:
        """One pass of the network over [0, 2^b), uint64 (k,); each half in turn is XORed with a hash of the other."""
        left_mask = (np.uint64(1) << self._left_bits) - np.uint64(1)
        right_mask = (np.uint64(1) << self._right_bits) - np.uint64(1)
        left, right = value >> self._right_bits, value & right_mask
        for round_number in range(0, _ROUNDS, 2):
            left = left ^ (mix64(right + key + _round_constant(round_number)) & left_mask)
            right = right ^ (mix64(left + key + _round_constant(round_number + 1)) & right_mask)
        return (left << self._right_bits) | right


def _round_constant(round_number: int) -> np.uint64:
    """Far above any half's bits: with small constants, round r of x would equal round r + 1 of x - 1 (seen as bias)."""
    return np.uint64(round_number << 56)


def mix64(value: np.ndarray) -> np.ndarray:
    """Hash uint64 to uint64: the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
