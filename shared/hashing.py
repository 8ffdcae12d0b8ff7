"""Pseudo-random numbers that every process, in any language, computes alike from the same text and key.

`uniform(salt, text, key)` is the BLAKE2b digest (8 bytes, with `key` as BLAKE2b's key) of the UTF-8 encoding of `salt`,
a zero byte, and `text`, read as a big-endian integer; its upper 53 bits are divided by 2^53.
"""

from hashlib import blake2b

MAX_KEY_BYTES = 64
"""The longest key that BLAKE2b accepts."""

_BITS = 53


def uniform(salt: str, text: str, key: bytes = b"") -> float:
    """A number in [0, 1) determined by the two texts and the key; different salts give independent numbers.

    Args:
        key: a secret, at most `MAX_KEY_BYTES`: without it nobody can choose a text by its number. Empty: no key.
    """
    # Producers' ids may contain lone surrogates, which JSON can express and UTF-8 cannot.
    content = f"{salt}\0{text}".encode("utf-8", errors="surrogatepass")
    digest = blake2b(content, digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "big") >> (64 - _BITS)) * 2.0**-_BITS
