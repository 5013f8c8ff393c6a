"""How long a save stops the training, when it waits for the disk and when it goes on beside it:
`python -m eval.bench.saving [key=value ...]`. Of a model of the size of CLIP's ViT-B/32, without data.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from eval.bench.measure import Row, table
from mm import distributed, program
from mm.checkpoint import TrainState
from mm.config import Config, parse
from mm.engine import Engine, EngineConfig
from mm.optim import OptimConfig, parameter_groups
from mm.saving import Save

WIDTH = 2048


class SavingConfig(Config):
    parameters: float = Field(151e6, gt=0)
    """Trained ones; CLIP's ViT-B/32 has 151 million."""
    turns: int = Field(3, ge=1)
    """Saves of each kind, in turn."""
    out: Path | None = None
    """Where they are written; null: the folder for temporary files."""


class Wide(nn.Module):
    """Nothing but parameters."""

    def __init__(self, parameters: float) -> None:
        super().__init__()
        count = max(1, round(parameters / WIDTH**2))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        out = batch["x"]
        for layer in self.layers:
            out = layer(out) + out
        return out.square().mean(), {}


def measure(config: SavingConfig) -> list[Row]:
    """The rows of the table. Collective."""
    distributed.start()
    module = Wide(config.parameters)
    groups = parameter_groups(module.named_parameters(), {}, OptimConfig())
    ranks = distributed.world_size()
    engine = Engine(module, groups, EngineConfig(), global_batch=ranks)
    stalls: dict[bool, list[float]] = {False: [], True: []}
    wholes: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=config.out) as folder:
        run = Path(distributed.broadcast_object(folder))
        for _ in range(config.turns):
            for background in (False, True):
                engine.step([{"x": torch.randn(1, WIDTH)}], 1e-4)
                began = time.perf_counter()
                save = Save(run, TrainState(engine.steps, engine.steps), engine, background)
                stood = time.perf_counter() - began
                while distributed.mean(torch.tensor(float(save.written()))).item() < 1:
                    time.sleep(0.02)  # where steps would be made
                waited = time.perf_counter()
                save.finish()
                now = time.perf_counter()
                stalls[background].append(stood + now - waited)
                wholes[background].append(now - began)
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / (2 * config.turns)
    ratio = statistics.median(a / b for a, b in zip(stalls[False], stalls[True], strict=True))
    what = f"a save of {size / 1e9:.2f} GB on {ranks} rank(s), the training stands still"
    return [
        Row("", f"{what}: waiting", f"{statistics.median(stalls[False]):.2f} s", "", True),
        Row(
            "", f"{what}: beside it", f"{statistics.median(stalls[True]):.2f} s, {ratio:.1f}x less", "", True
        ),
        Row("", "the whole of it beside the training", f"{statistics.median(wholes[True]):.2f} s", "", True),
    ]


def main(argv: list[str]) -> None:
    rows = measure(parse(SavingConfig, argv, "eval.bench.saving"))
    if distributed.is_main():
        print(table(rows))


if __name__ == "__main__":
    program.run(main)
