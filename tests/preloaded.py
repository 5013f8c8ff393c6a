"""What programs and ranks import, for the server in tests/dist.py that forks them."""

import gc
import os

from mm.program import prepare_libraries

prepare_libraries()
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import timm  # noqa: E402, F401
import transformers.models.bert.modeling_bert  # noqa: E402, F401

import mm.report.page as report  # noqa: E402
import train.finetune  # noqa: E402
import train.pretrain  # noqa: E402, F401

report.plot = lambda *_, **__: ""  # curves take longer to draw than these runs to train

gc.collect()
gc.freeze()  # else each process copies all of it when it first looks for garbage
