"""A program of several ranks that work together, and end as they are told: `ending.py WHO HOW [STATUS]`."""

import os
import signal
import sys

import torch

from mm import distributed, program
from mm.errors import Failure


def main(argv: list[str]) -> None:
    """WHO: the rank that ends first, in its 50th step; HOW: well, raise, fail, kill."""
    who, how = int(argv[0]), argv[1]
    distributed.start()
    for step in range(50):
        if step == 40 and distributed.rank() == who:
            match how:
                case "raise":
                    raise RuntimeError("trouble of its own")
                case "fail":
                    raise Failure("the network is gone")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
        distributed.mean(torch.zeros(10_000))
    if distributed.is_main():
        print("all work is done", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    program.run(main)
