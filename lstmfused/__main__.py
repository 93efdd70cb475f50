"""python -m lstmfused: what was built, for which torch, and which kernel this machine runs."""

from . import build_info

for name, value in build_info().items():
    print(f"{name:<18} {value}")
