"""WiSE-FT: averages of the weights before and after fine-tuning, and what each is good for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import model_validator
from safetensors.torch import load_file
from torch import Tensor

from mm import distributed
from mm.config import Config
from mm.evaluators import EvaluatorConfig, evaluate
from mm.files import write_atomically
from mm.log import message
from mm.models.averaging import interpolate
from mm.models.folder import WEIGHTS, find_model, load_model, read_description, save_model

NAME = "wise_ft.json"


class WiseFtConfig(Config):
    """Weights between the start and the end of fine-tuning (Wortsman et al. 2022, arXiv:2109.01903)."""

    target: str
    """SET/FIGURE that the fine-tuning is for."""
    reference: str
    """SET/FIGURE that must not suffer by it, such as a zero-shot accuracy on other data."""
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of the fine-tuned weights that are tried; 0 is the start, 1 the end."""
    keep: Literal["tuned", "target", "mean"] | float = "tuned"
    """What `model/` holds then: the tuned weights, the average that is best by the target or by the mean of both, or
    that of this share."""

    @model_validator(mode="after")
    def _shares(self) -> "WiseFtConfig":
        wrong = [alpha for alpha in self.alphas if not 0 <= alpha <= 1]
        if wrong or not self.alphas:
            raise ValueError(f"alphas: shares between 0 and 1 are expected, not {wrong or 'none'}")
        if isinstance(self.keep, float) and not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep}: a share between 0 and 1 is expected")
        return self


def wise_ft(
    config: WiseFtConfig, run: Path, start: Mapping[str, Tensor], sets: Mapping[str, EvaluatorConfig]
) -> None:
    """Evaluate the averages, write `wise_ft.json` into the run folder, and give `model/` the one to keep. Collective.

    Does nothing where `model/` holds an average already.

    Args:
        start: the weights before fine-tuning, under the names of the model.
    """
    folder = find_model(run)
    description = read_description(folder)
    distributed.barrier()  # all have read it before one writes
    if "wise_ft" in description["about"]:
        return
    tuned = load_file(folder / WEIGHTS)
    model = load_model(folder).to(distributed.device())
    zeroshot = {name for name, one in model.heads.items() if "embedding" in one.modalities}

    def stays(name: str) -> bool:
        """Heads that began at random have no weights to go back to."""
        return name.startswith("heads.") and name.split(".")[1] not in zeroshot

    names = {side: name.partition("/")[::2] for side, name in _sides(config).items()}
    wanted = {group: sets[group] for group, _ in names.values()}
    curve = []
    for alpha in config.alphas:
        model.load_state_dict(interpolate(start, tuned, alpha, stays))
        figures = evaluate(model, wanted)
        curve.append({"alpha": alpha, **{side: figures[group][key] for side, (group, key) in names.items()}})
    alpha = chosen(config, curve)
    about = {**description["about"], "wise_ft": alpha}
    model.load_state_dict(interpolate(start, tuned, alpha, stays))
    result = {"target": config.target, "reference": config.reference, "curve": curve, "kept": alpha}

    def write() -> None:
        write_atomically(run / NAME, (json.dumps(result, indent=1) + "\n").encode())
        save_model(folder, model.cpu(), description["config"], about=about)
        _show(result)

    distributed.on_main(write)


def chosen(config: WiseFtConfig, curve: list[dict[str, float]]) -> float:
    """The share of the fine-tuned weights that `model/` is to have."""
    if config.keep == "tuned":
        return 1.0
    if isinstance(config.keep, float):
        return config.keep
    sides = {"target": ("target",), "mean": ("target", "reference")}[config.keep]
    signs = {side: -1 if name.endswith("loss") else 1 for side, name in _sides(config).items()}
    return max(curve, key=lambda row: sum(signs[side] * row[side] for side in sides))["alpha"]


def _sides(config: WiseFtConfig) -> dict[str, str]:
    return {"target": config.target, "reference": config.reference}


def _show(result: Mapping) -> None:
    for row in result["curve"]:
        mark = "  <- model/" if row["alpha"] == result["kept"] else ""
        message(
            f"  WiSE-FT alpha {row['alpha']:4.2f}  {result['target']} {row['target']:.4f}  "
            f"{result['reference']} {row['reference']:.4f}{mark}"
        )
