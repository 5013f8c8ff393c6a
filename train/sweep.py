"""Search the keys of a training config for the best figure: `python -m train.sweep CONFIG [key=value ...]`.

Each trial is a training run of its own under OUT. The same command started several times, on one machine or as a Slurm
array, shares the trials; started again it goes on, also after a kill. Optuna (Akiba et al. 2019, arXiv:1907.10902) says
what is tried next and what is pruned.
"""

import importlib.util
import os

from mm import program
from mm.config import parse
from mm.errors import UserError
from train.sweeping.config import SweepConfig
from train.sweeping.plan import make_plan


def main(argv: list[str]) -> None:
    config = parse(SweepConfig, argv, "train.sweep")
    if importlib.util.find_spec("optuna") is None:
        raise UserError("a sweep needs optuna: pip install 'mm[sweep]'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep is one process, which starts those of its trials: python -m train.sweep ... ranks=N"
        )
    plan = make_plan(config)
    from train.sweeping.loop import sweep  # which needs optuna

    sweep(plan)


if __name__ == "__main__":
    program.run(main)
