"""The whole table of what is measured against the bars: `python -m eval.bench`. Each script also runs alone.

A row that is not met stays in the table with its figure; the exit status says that all was measured.
"""

import datetime
import os

import torch

from eval.bench import (
    coverage,
    decode_speed,
    evaluation,
    loader,
    mixing,
    open_clip_parity,
    overhead,
    plan,
    step_speed,
    video,
    video_decode,
)
from eval.bench.measure import table
from mm import program
from mm.errors import UserError


def main(argv: list[str]) -> None:
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return
    if argv:
        raise UserError(f"eval.bench takes no arguments, not {argv[0]!r}; its scripts do, see eval/bench/")
    rows = open_clip_parity.measure(open_clip_parity.ParityConfig())
    rows += overhead.measure(overhead.OverheadConfig())
    rows += step_speed.measure(step_speed.StepConfig())
    rows += decode_speed.measure(decode_speed.DecodeConfig())
    rows += loader.measure(loader.LoaderConfig())
    rows += coverage.measure(coverage.CoverageConfig())
    rows += mixing.measure(mixing.MixingConfig())
    rows += evaluation.measure(evaluation.EvaluationConfig())
    rows += video_decode.measure(video_decode.VideoDecodeConfig())
    rows += video.measure(video.VideoBenchConfig())
    rows += plan.measure(plan.PlanBenchConfig())
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(table(rows))


if __name__ == "__main__":
    program.run(main)
