"""Pseudo-random numbers that every process, in any language, computes alike from the same text.

`uniform(salt, text)` is the BLAKE2b digest (8 bytes, no key) of the UTF-8 encoding of `salt`, a zero byte, and `text`,
read as a big-endian integer; its upper 53 bits are divided by 2^53.
"""

from hashlib import blake2b

_BITS = 53


def uniform(salt: str, text: str) -> float:
    """A number in [0, 1) determined by the two texts; different salts give independent numbers."""
    # Producers' ids may contain lone surrogates, which JSON can express and UTF-8 cannot.
    content = f"{salt}\0{text}".encode("utf-8", errors="surrogatepass")
    digest = blake2b(content, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - _BITS)) * 2.0**-_BITS
