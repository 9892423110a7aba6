"""Models that write: a decoder that steps through many sequences, `generate()`, sampling and steering."""
