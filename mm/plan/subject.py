"""What a config trains, with shapes and without values: the module that the engine would get, and its batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from mm.config import load
from mm.encoders.image import OPEN_CLIP, TRANSFORMERS
from mm.errors import UserError
from mm.models.adapt import adapt
from mm.models.folder import TOKENIZER, Model, build_model, find_model, holds_model, read_description
from mm.models.fused import Fused
from mm.models.heads import ClassHead, widths
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from mm.plan.batches import Shapes, of_task, pairs
from mm.plan.config import FinetunePlan, PretrainPlan, RunModel
from mm.plan.offline import without_files
from mm.plan.trace import fake_tensors, replaced
from mm.tasks.by_words import ByWords
from mm.tasks.classification import (
    ClassificationTask,
    ClassificationTaskConfig,
    LabelPreparation,
    class_names,
)
from mm.tasks.contrastive import ContrastiveTask
from mm.tasks.registry import TASKS
from mm.tasks.task import Given, Task, Training, lock_unused
from mm.tasks.vqa import VqaTaskConfig

ANSWERS = 3_129  # of VQAv2, with the default min_count
CLASSES = 1_000


class Subject(NamedTuple):
    """A module, on the meta device where nothing else is asked for, and what it reads."""

    module: nn.Module
    towers: TwoTower
    layers: Mapping[str, tuple[str, int, int]]
    """Of its parameters, for `mm.optim.parameter_groups`."""
    batch: Callable[[int], Shapes]
    """The shapes of a batch of so many samples (of the main task)."""
    tokens: int
    """To which texts are padded."""
    compares: bool
    """Whether the loss compares the samples of all ranks."""
    notes: Sequence[str]
    """What was assumed."""


class Words:
    """A tower's tokenizer, used where tensors have no values: its own work is done with real ones."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __call__(self, text: str) -> list[int]:
        with unset_fake_temporarily(), torch.device("cpu"):
            ids: list[int] = self._real(text)
        return ids

    def of_length(self, length: int) -> "Words":
        """As of the real one."""
        return Words(self._real.of_length(length))

    @property
    def bos_id(self) -> int:
        """As of the real one."""
        return self("")[0]

    @property
    def eos_id(self) -> int:
        """As of the real one."""
        return self("")[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def subject(config: PretrainPlan | FinetunePlan, device: str = "meta") -> Subject:
    """What a config trains, with random weights. Raises UserError for what does not exist or fit."""
    return _pretraining(config, device) if isinstance(config, PretrainPlan) else _finetuning(config, device)


def _pretraining(config: PretrainPlan, device: str) -> Subject:
    notes: list[str] = []
    towers = _two_towers(config.model, notes, device)
    module = ContrastiveTask(towers, kind=config.loss.kind, positives=config.loss.positives)
    tokens = _tokens(config.caption_tokens, towers)

    batch = partial(pairs, towers, tokens=tokens)
    return Subject(module.train(), towers, _layers(towers), batch, tokens, True, notes)


def _finetuning(config: FinetunePlan, device: str) -> Subject:
    """The towers as they are adapted, the tasks and their heads."""
    notes: list[str] = []
    if config.image.lora is not None or config.text.lora is not None:
        device = "cpu"  # peft and the towers that it tries need values
    source = _start(config, notes, device)
    with torch.device(device):
        towers = adapt(source.towers, config.image, config.text, config.video, config.scratch)
    with _valueless(towers) if device == "meta" else nullcontext():
        tasks: dict[str, Task] = {
            "main": _task(config.task, config.data.parts(), towers, config.classes, notes)
        }
        for name, other in config.auxiliary.items():
            tasks[name] = _task(other.task, other.data.parts(), towers, config.classes, notes)
        heads = {name: head for task in tasks.values() for name, head in task.heads.items()}
        model: Model = Fused(towers, heads) if heads else towers
    lock_unused(model, list(tasks.values()))
    weights = {"main": 1.0} | {name: other.weight for name, other in config.auxiliary.items()}
    module = Training(model, tasks, weights).train()
    if towers.text.locked and any("text" in task.uses for task in tasks.values()):
        # equal texts would be read once, and how many there are is not known; gradients it has none either way
        towers.text.locked = False
        notes.append("the locked text tower is counted as if all texts of a batch differed")
    tokens = _tokens(config.caption_tokens, towers)
    shares = {"main": 1.0} | {name: other.batch / config.batch for name, other in config.auxiliary.items()}

    def batch(samples: int) -> Shapes:
        return {
            name: of_task(task, towers, max(1, round(samples * shares[name])), tokens)
            for name, task in tasks.items()
        }

    compares = any(task.compares for task in tasks.values())
    return Subject(module, towers, _layers(model), batch, tokens, compares, notes)


@contextmanager
def _valueless(towers: TwoTower) -> Iterator[None]:
    """Fake tensors, with which transformers' networks can be tried: a task sees how wide they are, and on the meta
    device they ask for values. So does what draws the first weights of a head, which are left undrawn."""
    undrawn = replaced(nn.init, "trunc_normal_", lambda tensor, *about, **more: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), undrawn:
        fake_tensors(towers, "cpu")
        yield


def _layers(model: Model) -> dict[str, tuple[str, int, int]]:
    return {f"model.{name}": place for name, place in model.parameter_layers().items()}


def _two_towers(config: TwoTowerConfig, notes: list[str], device: str) -> TwoTower:
    with without_files(config, notes) as here, torch.device(device):
        towers = build_two_tower(here)
    towers.text.spec = {
        **towers.text.spec,
        "name": config.text.name,
    }  # not that of a stand-in's temporary folder
    towers.text.tokenizer = Words(towers.text.tokenizer)
    return towers


def _start(config: FinetunePlan, notes: list[str], device: str) -> Model:
    """The architecture that fine-tuning starts from."""
    if config.towers is not None:
        return _two_towers(config.towers, notes, device)
    given = config.model or ""
    if given.startswith((OPEN_CLIP, TRANSFORMERS)):
        name, _, tag = given.partition("@")
        tower: dict[str, Any] = {"name": name}
        if given.startswith(OPEN_CLIP):
            tower["pretrained"] = tag or False
        return _two_towers(TwoTowerConfig(image=tower, text=tower, projection="none"), notes, device)
    path = Path(given).expanduser()
    if holds_model(path):
        folder = find_model(path)
        with torch.device(device):
            model = build_model(read_description(folder), folder / TOKENIZER)
        model.towers.text.tokenizer = Words(model.towers.text.tokenizer)
        return model
    made = path / "config.yaml" if path.is_dir() else path
    if made.is_file():  # a run that has no model yet, or the config of one that is still to come
        notes.append(f"there is no model in {given} yet: its towers are those that {made.name} describes")
        return _two_towers(load(RunModel, made).model, notes, device)
    raise UserError(
        f"there is no model in {given!r}; a plan takes a run or its model/ folder, the config of a pretraining run, or "
        f"{OPEN_CLIP}NAME, {TRANSFORMERS}NAME"
    )


def _task(
    config: Any, parts: Mapping[str, Any], towers: TwoTower, classes: int | None, notes: list[str]
) -> Task:
    """The real task, with stand-ins for what lies beside its data where that is not here."""
    shards = [part.shards for part in parts.values()]
    listed = [one for some in shards for one in ([some] if isinstance(some, str) else some)]
    given = Given(towers, lambda image, rng: torch.empty(0), listed)
    if isinstance(config, ClassificationTaskConfig):
        return _classification(config, given, classes, notes)
    if (
        isinstance(config, VqaTaskConfig)
        and config.vocabulary.file is None
        and not given.beside("answers.json")
    ):
        size = classes or config.vocabulary.most or ANSWERS
        if classes is None:
            notes.append(
                f"there is no answers.json beside the training data: {size:,} answers are assumed (classes=)"
            )
        with TemporaryDirectory() as folder:
            file = Path(folder) / "answers.txt"
            file.write_text("".join(f"answer{i}\n" for i in range(size)), encoding="utf-8")
            vocabulary = config.vocabulary.model_copy(update={"file": file, "most": None})
            return TASKS[config.kind](config.model_copy(update={"vocabulary": vocabulary}), given)
    return TASKS[config.kind](config, given)


def _classification(
    config: ClassificationTaskConfig, given: Given, classes: int | None, notes: list[str]
) -> Task:
    try:
        names = class_names(config, given)
    except (UserError, OSError):
        names = [f"class{i}" for i in range(classes or CLASSES)]
        if classes is None:
            notes.append(f"the names of the classes are not here: {len(names):,} are assumed (classes=)")
    templates = ("a picture of a {}.",) if isinstance(config.templates, Path) else config.templates
    words = _ByWords(names, templates) if config.objective == "text" else None
    clip = given.clip(config.reads)
    head = None if words else _class_head(config, given.towers, names)
    # not by its builder, which counts the labels of the data
    preparation = LabelPreparation(given.transform, len(names), clip, config.mixing)
    return ClassificationTask(
        head, config.head, preparation, words=words, label_smoothing=config.label_smoothing
    )


class _ByWords(ByWords):
    """Keeps no tensors from one run to another; what a locked text tower gives is there already."""

    def _encoded(self, towers: TwoTower, texts: list[str]) -> Tensor:
        if any(p.requires_grad for p in towers.text.parameters()):
            self._tokens = None
            return super()._encoded(towers, texts)
        return towers.project_text(torch.zeros(len(texts), towers.text.width, device=towers.log_scale.device))


def _class_head(config: ClassificationTaskConfig, towers: TwoTower, names: Sequence[str]) -> ClassHead:
    if config.init == "zeroshot":  # rows of an embedding, whatever they are
        reads = "embedding" if config.reads == "image" else "video_embedding"
        return ClassHead(width=towers.dim, classes=names, reads=reads, bias=False, norm=False)
    width = widths(towers, (config.reads,))[config.reads].pooled
    return ClassHead(width=width, classes=names, reads=config.reads)


def _tokens(given: int | None, towers: TwoTower) -> int:
    context: int = towers.text.spec["context_length"]
    if given is not None and given > context:
        raise UserError(
            f"caption_tokens={given} is more than the text tower reads, {context}; give at most that"
        )
    return given or context
