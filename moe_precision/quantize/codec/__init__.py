"""From a float matrix to codes, scales and offsets, and to the bytes that hold them."""
