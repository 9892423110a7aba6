"""Names of the inputs and outputs of a program that steps; `export.decoder` makes it, `program` runs it.

Of n sequences that decode, and a piece of P tokens of one prompt:
decode_ids [n] int64, decode_last [n] int32: the newest token of each, and its position;
piece_ids [P] int64, piece_last [1] int32: the tokens of the piece, and the position of the last;
reads [m] int64: after which of the n + P tokens logits are wanted;
decode_keys_L, decode_values_L [n, heads, capacity, d], piece_keys_L, piece_values_L [1, heads, capacity, d]:
the caches of layer L, which the program extends in place.
Outputs: logits [m, vocabulary], and each cache again, named `extended`.
"""

from __future__ import annotations

DECODE_IDS, DECODE_LAST = "decode_ids", "decode_last"
PIECE_IDS, PIECE_LAST = "piece_ids", "piece_last"
READS, LOGITS = "reads", "logits"
TOKENS = (DECODE_IDS, DECODE_LAST, PIECE_IDS, PIECE_LAST, READS)
"""What says which tokens a step takes."""
DECODING, PIECE = "decode", "piece"
"""Whose rows of the cache."""


def cache_names(rows: str, layer: int) -> tuple[str, str]:
    """Inputs for the keys and the values of a layer."""
    return f"{rows}_keys_{layer}", f"{rows}_values_{layer}"


def extended(name: str) -> str:
    """The output that is the cache of that input after the step."""
    return f"{name}_extended"
