"""The same numbers again: seeds that do not collide, and kernels that add in one order."""

import os

import torch


def mix(*numbers: int) -> int:
    """A 63-bit seed; unlike a sum, neighbours do not collide (the finaliser of splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
        state ^= state >> 31
    return state >> 1


def be_deterministic() -> None:
    """Only deterministic GPU kernels, from here on in this process; an operation that has none raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
