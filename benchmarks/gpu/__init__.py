"""The CUDA cell, checked and measured in one run: ``python -m benchmarks.gpu --help``."""
