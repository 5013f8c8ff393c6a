"""Published speeds of CLIP training: one list to fit two efficiencies on, one to judge them by.

Both were written down before anything was fitted, and stay as they are: a row that is far off keeps its place. The
rule for a row: hardware, number of GPUs and batch are stated, and the speed to 10% or better. Where a batch does not
fit a GPU without checkpointing, it is assumed. What is fitted on and what is not was decided by source and
architecture:

- FIT: of each architecture in LAION's table the run of median speed (its runs of one architecture differ by a factor
  of four: the input limits some); of Chinese-CLIP's benchmark B/16 and L/14, with fused attention and without.
- HELD_OUT: LAION-400M's runs as open_clip's documentation tells them, the other rows of Chinese-CLIP's benchmark,
  LAION's G/14, OpenAI's two.
- OTHER: programs of another kind (Megatron's kernels, weights in bfloat16): how far those get, no part of the bar.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A run that somebody has published."""

    name: str
    image: str
    """An image tower of open_clip."""
    text: str | dict[str, Any]
    """A text tower of open_clip, or the shape of a BERT."""
    gpu: str
    gpus: int
    batch: int
    """Samples a GPU."""
    samples_per_s: float
    """Of all GPUs."""
    fused: bool
    """Attention in one kernel (FlashAttention)."""
    checkpointing: bool
    tokens: int
    """That every text is padded to."""
    source: str
    gigabytes: float = 0
    """Memory of a GPU that the run took; 0: not stated. Nothing is fitted on it."""


SCALING = "LAION-AI/scaling-laws-openclip, trained_models_info.csv (arXiv:2212.07143)"
CHINESE = "OFA-Sys/Chinese-CLIP, flash_attention_En.md: batch / seconds an iteration, GB"
PRETRAINED = "mlfoundations/open_clip, docs/PRETRAINED.md: 32 epochs of 407,332,084 samples / GPU-hours"
OPENAI = "arXiv:2103.00020, section 2.5 (read in hackmd.io/@bykang/rJnM8ve95): 32 x 400 million samples, so many days"
NEMO = "docs.nvidia.com/nemo-framework, CLIP, performance (2308); the batch is not stated"
LAION_400M = 32 * 407_332_084

BASE = {"layers": 12, "width": 768, "heads": 12}  # RoBERTa-wwm-ext-base, over 21,128 Chinese words
LARGE = {"layers": 24, "width": 1024, "heads": 16}
RBT3 = {"layers": 3, "width": 768, "heads": 12}


def _scaling(arch: str, gpus: int, batch: int, rate: float, checkpointing: bool) -> Row:
    return Row(
        f"{arch}, {batch} a GPU", arch, arch, "a100-40", gpus, batch, rate, False, checkpointing, 77, SCALING
    )


def _chinese(
    arch: str, text: dict[str, Any], batch: int, seconds: float, gigabytes: float, fused: bool
) -> Row:
    name = f"Chinese-CLIP {arch}, {'fused' if fused else 'unfused'} attention"
    # its image towers are OpenAI's, with their activation
    image = arch if arch.startswith("RN") else f"{arch}-quickgelu"
    rate = 8 * batch / seconds
    return Row(name, image, text, "a100-80", 8, batch, rate, fused, False, 52, CHINESE, gigabytes)


def _laion(arch: str, gpus: int, batch: int, hours: float, checkpointing: bool) -> Row:
    rate = LAION_400M / (hours * 3600 / gpus)
    name = f"LAION-400M {arch}"
    return Row(name, arch, arch, "a100-40", gpus, batch, rate, False, checkpointing, 77, PRETRAINED)


FIT = (
    _scaling("ViT-B-32", 344, 256, 219_759.0, False),
    _scaling("ViT-B-16", 176, 512, 64_314.4, True),
    _scaling("ViT-L-14", 396, 224, 38_878.7, True),
    _scaling("ViT-H-14", 824, 96, 34_608.0, True),
    _scaling("ViT-g-14", 800, 80, 24_800.0, True),
    _chinese("ViT-B-16", BASE, 400, 1.477, 80, False),
    _chinese("ViT-B-16", BASE, 400, 0.960, 56, True),
    _chinese("ViT-L-14", BASE, 128, 1.293, 77, False),
    _chinese("ViT-L-14", BASE, 128, 0.785, 50, True),
)
HELD_OUT = (
    _laion("ViT-B-32", 128, 256, 4_600, False),
    _laion("ViT-B-16", 176, 192, 10_700, False),
    _laion("ViT-B-16-plus-240", 224, 160, 13_620, False),
    _laion("ViT-L-14", 400, 96, 50_800, True),
    _chinese("RN50", RBT3, 1200, 1.710, 79, False),
    _chinese("RN50", RBT3, 1200, 1.680, 75, True),
    _chinese("ViT-L-14-336", BASE, 40, 1.397, 78, False),
    _chinese("ViT-L-14-336", BASE, 40, 0.587, 37, True),
    _chinese("ViT-H-14", LARGE, 64, 1.265, 76, False),
    _chinese("ViT-H-14", LARGE, 64, 0.845, 57, True),
    Row(
        "LAION G/14, unmasked",
        "ViT-bigG-14",
        "ViT-bigG-14",
        "a100-80",
        512,
        312,
        10_450.0,
        False,
        True,
        77,
        "laion.ai/blog/giant-openclip (read in gwern.net's excerpt): 512 A100, batch 160k",
    ),
    Row(
        "OpenAI L/14",
        "ViT-L-14-quickgelu",
        "ViT-L-14-quickgelu",
        "v100",
        256,
        128,
        32 * 400e6 / (12 * 86400),
        False,
        True,
        77,
        OPENAI,
    ),
    Row(
        "OpenAI RN50x64",
        "RN50x64-quickgelu",
        "RN50x64-quickgelu",
        "v100",
        592,
        55,
        32 * 400e6 / (18 * 86400),
        False,
        True,
        77,
        OPENAI,
    ),
)
OTHER = (
    Row("NeMo g/14, 8 A100", "ViT-g-14", "ViT-g-14", "a100-80", 8, 64, 559.0, True, False, 77, NEMO),
    Row("NeMo g/14, 128 A100", "ViT-g-14", "ViT-g-14", "a100-80", 128, 64, 8_633.0, True, False, 77, NEMO),
    Row("NeMo g/14, 8 H100", "ViT-g-14", "ViT-g-14", "h100", 8, 64, 935.0, True, False, 77, NEMO),
    Row("NeMo g/14, 128 H100", "ViT-g-14", "ViT-g-14", "h100", 128, 64, 13_829.0, True, False, 77, NEMO),
)
