"""`mm plan`: what a run will need, before it is submitted.

Nothing is downloaded and no GPU is needed: the config's own modules are built without values and run on tensors that
have shapes alone (`trace.py`). Memory is counted, by part and ZeRO stage (`memory.py`, `zero.py`); the speed is
estimated from the same operations (`speed.py`), by two efficiencies that were fitted on published runs
(`published.py`).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mm import config as configs  # `config` is a module of this package
from mm.plan.config import FinetunePlan, PretrainPlan


def run(argv: Sequence[str]) -> None:
    """`mm plan CONFIG [key=value ...] [json=true]`: print the plan. Raises UserError for a config that cannot run."""
    wanted = config_of([word for word in argv if not word.startswith("json=")], "mm plan")
    _stay_offline()
    from mm.plan.estimate import estimate
    from mm.plan.table import as_json, show
    from mm.progress import Wait

    with Wait("planning", lambda: "the model runs on tensors without values"):
        found = estimate(wanted)
    if "json=true" in argv:
        print(json.dumps(as_json(found), indent=1))
    else:
        show(found)


def config_of(words: Sequence[str], prog: str) -> PretrainPlan | FinetunePlan:
    """The keys that a plan reads of a config: one with a task is of fine-tuning. UserError for what is wrong in them."""
    finetunes = any(word.startswith(("task=", "task.")) for word in words)
    for path in (Path(word) for word in words if not word.startswith("-") and "=" not in word):
        finetunes |= path.is_file() and "task" in configs.read(path)
    return configs.parse(FinetunePlan, words, prog) if finetunes else configs.parse(PretrainPlan, words, prog)


def _stay_offline() -> None:
    """No library asks a hub; they read the variable when they are imported, or have read it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
