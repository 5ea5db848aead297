"""Pseudonymizes token ids with a secret permutation of the vocabulary, for `--token-ids hash`.

Each id is replaced by its rank among the keyed BLAKE2b hashes of all ids. Only the holder of the key can undo
this permutation: equal tokens stay equal, and the column keeps its type. The key comes from the environment
and is never stored; a run stores its fingerprint, so that it cannot be resumed with another key.

This hides the ids, not the text. Token frequencies survive a permutation, and most of a text can be recovered
from the chosen experts alone (arXiv 2602.04105 reports 91 % of the tokens): protect a run as you protect its text.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TokenIds = Literal["keep", "hash", "drop"]
KEY_VARIABLE = "COLLECTOR_TOKEN_KEY"
"""Environment variable that holds the key."""
SHORTEST_KEY = 16
"""Minimum length of the key, in characters."""


def require_key(key: str | None) -> str:
    """Returns the key if it is usable.

    Raises:
        ValueError: there is no key, or it is so short that it could be guessed.
    """
    if key is None or len(key) < SHORTEST_KEY:
        found = "it is not set" if key is None else f"it has {len(key)}"
        raise ValueError(
            f"--token-ids hash needs a secret key of at least {SHORTEST_KEY} characters in the environment variable "
            f"{KEY_VARIABLE}, and {found}; for example: export {KEY_VARIABLE}=$(openssl rand -hex 32)"
        )
    return key


def fingerprint(key: str) -> str:
    """Returns 16 hex digits that distinguish keys without revealing them."""
    return hashlib.blake2b(b"fingerprint of a token key", key=_secret(key), digest_size=8).hexdigest()


def permutation(size: int, key: str) -> NDArray[np.uint32]:
    """Returns the replacement of each id, of shape [size]: its rank among the keyed hashes of all ids."""
    import numpy as np

    secret = _secret(key)
    hashes = [hashlib.blake2b(i.to_bytes(4, "little"), key=secret, digest_size=16).digest() for i in range(size)]
    ranks = np.empty(size, np.uint32)
    ranks[sorted(range(size), key=hashes.__getitem__)] = np.arange(size, dtype=np.uint32)
    return ranks


def _secret(key: str) -> bytes:
    return hashlib.blake2b(key.encode()).digest()  # BLAKE2b takes keys of up to 64 bytes
