"""Training through the quantization grid: hooks that put quantized weights into forward passes."""
