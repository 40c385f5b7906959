"""Every random stream is derived from what it is for; no global state has to be saved to repeat or resume a run."""

import hashlib


def derive_seed(*key):
    """A 63-bit seed from any values that print the same way each time, e.g. `derive_seed(seed, step, "sample")`.

    A hash, not a sum: neighbouring seeds and steps give unrelated streams.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
