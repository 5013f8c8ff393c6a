"""Text towers and tokenizers of a hub: read from this machine's cache, else as they are known; nothing is fetched.

A plan needs a network's shape and its vocabulary's size. Where its files are not here, others of the same shape are
written to a temporary folder, which the tower's real builder then opens.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from mm.config import Config
from mm.encoders.image import OPEN_CLIP, TRANSFORMERS
from mm.encoders.text import PRESETS, TextConfig
from mm.encoders.weights import model_folder
from mm.errors import UserError
from mm.models.two_tower import TwoTowerConfig

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
KNOWN: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert", "vocab_size": 30_522, **_BASE},
    "bert-base-cased": {"model_type": "bert", "vocab_size": 28_996, **_BASE},
    "bert-large-uncased": {"model_type": "bert", "vocab_size": 30_522, **_LARGE},
    "bert-base-multilingual-cased": {"model_type": "bert", "vocab_size": 119_547, **_BASE},
    "distilbert-base-uncased": {"model_type": "distilbert", "vocab_size": 30_522},
    "roberta-base": {"model_type": "roberta", "vocab_size": 50_265, **_BASE, **_ROBERTA},
    "roberta-large": {"model_type": "roberta", "vocab_size": 50_265, **_LARGE, **_ROBERTA},
    "xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250_002, **_BASE, **_ROBERTA},
    "xlm-roberta-large": {"model_type": "xlm-roberta", "vocab_size": 250_002, **_LARGE, **_ROBERTA},
    "mpnet-base": {"model_type": "mpnet", "vocab_size": 30_527, "max_position_embeddings": 514, **_BASE},
    "all-mpnet-base-v2": {
        "model_type": "mpnet",
        "vocab_size": 30_527,
        "max_position_embeddings": 514,
        **_BASE,
    },
    "all-MiniLM-L6-v2": {"model_type": "bert", "vocab_size": 30_522, **_MINILM},
    "ModernBERT-base": {"model_type": "modernbert"},  # the defaults of transformers are this network
}
"""Values of config.json by the last part of a hub's name; the others are transformers' defaults of the model_type."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
PRESET_WORDS = 30_522
C = TypeVar("C", bound=Config)


@contextmanager
def without_files(config: TwoTowerConfig, notes: list[str]) -> Iterator[TwoTowerConfig]:
    """The same towers with random weights, and with stand-ins for files of a hub that are not on this machine.

    What was assumed is added to `notes`. Raises UserError for a network whose shape nobody here knows.
    """
    text = without_weights(config.text)
    image = without_weights(config.image)
    with ExitStack() as stack:
        if text.name.startswith(OPEN_CLIP):
            text = _open_clip(text, stack, notes)
        elif not text.name.startswith(TRANSFORMERS):
            text = _bert(text, stack, notes)
        yield config.model_copy(update={"image": image, "text": text})


def without_weights(config: C) -> C:
    """A tower's config with random weights; open_clip's tags that mean another activation become the name of that."""
    values: dict[str, Any] = {"pretrained": False, "weights": None}
    name, tag = str(getattr(config, "name", "")), getattr(config, "pretrained", False)
    if name.startswith(OPEN_CLIP) and isinstance(tag, str):
        from open_clip import get_model_config
        from open_clip.pretrained import get_pretrained_cfg

        quick = f"{name.removeprefix(OPEN_CLIP)}-quickgelu"
        published = get_pretrained_cfg(name.removeprefix(OPEN_CLIP), tag) or {}
        if published.get("quick_gelu") and get_model_config(quick):
            values["name"] = OPEN_CLIP + quick
    return config.model_copy(update=values)


def _bert(config: TextConfig, stack: ExitStack, notes: list[str]) -> TextConfig:
    """A tower of transformers: its shape and its words, each from here or in its place."""
    values: dict[str, Any] = {}
    shape: Mapping[str, Any] | None = None
    if config.name not in PRESETS and not _here(config.name, ("config.json",)):
        shape = KNOWN.get(config.name.rpartition("/")[2])
        if shape is None:
            raise UserError(
                f"the config.json of {config.name} is not on this machine, and mm plan fetches nothing: fetch it once "
                f"(hf download {config.name} config.json), or plan with one of {', '.join(KNOWN)}"
            )
        notes.append(
            f"{config.name}: its files are not here; shape and vocabulary are those that are known of it"
        )
    words = config.tokenizer or config.name
    if shape is None and _here(words, TOKENIZER_FILES):
        return config
    folder = Path(stack.enter_context(TemporaryDirectory()))
    size = (shape or {}).get("vocab_size") or KNOWN.get(words.rpartition("/")[2], {}).get("vocab_size")
    if shape is None and config.name not in PRESETS:
        size = _vocabulary(config.name)
    elif size is None:
        size = PRESET_WORDS
        if config.name in PRESETS:
            notes.append(f"the tokenizer {words} is not here; a vocabulary of {size:,} words is assumed")
    write_tokenizer(folder, size)
    values["tokenizer"] = str(folder)
    if shape is not None:
        (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        values["name"] = str(folder)
    return config.model_copy(update=values)


def _open_clip(config: TextConfig, stack: ExitStack, notes: list[str]) -> TextConfig:
    """A tower of open_clip, some of which read with a network or a tokenizer of a hub."""
    from open_clip import get_model_config

    name = config.name.removeprefix(OPEN_CLIP).replace("/", "-")
    model = get_model_config(name)
    if model is None:  # a folder, a hub's name, or a mistake, which the builder tells
        return config
    text = model["text_cfg"]
    network, words = text.get("hf_model_name"), text.get("hf_tokenizer_name")
    if (not network or _here(network, ("config.json",))) and (not words or _here(words, TOKENIZER_FILES)):
        return config
    folder = Path(stack.enter_context(TemporaryDirectory()))
    size = text.get("vocab_size", PRESET_WORDS)
    if network and not _here(network, ("config.json",)):
        shape = KNOWN.get(network.rpartition("/")[2])
        if shape is None:
            raise UserError(
                f"{config.name} reads texts with {network}, whose config.json is not on this machine, and mm plan "
                f"fetches nothing: fetch it once (hf download {network} config.json)"
            )
        (folder / network).mkdir(parents=True)
        (folder / network / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        size = shape.get("vocab_size", size)
    described = {"model_cfg": model, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    write_tokenizer(folder, size)
    notes.append(f"{config.name}: its tokenizer is not here; its vocabulary has {size:,} words")
    return config.model_copy(update={"name": f"{OPEN_CLIP}{folder}"})


def _here(name: str, files: tuple[str, ...]) -> bool:
    """Whether one of these files of a folder, an installed package or a hub's name is on this machine."""
    from transformers.utils import cached_file

    source = Path(model_folder(name)).expanduser()
    if source.is_dir():
        return any((source / file).is_file() for file in files)
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        return any(cached_file(name, file, local_files_only=True, **quiet) for file in files)
    except OSError:
        return False


def _vocabulary(name: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model_folder(name), trust_remote_code=False).vocab_size)


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of so many words, in the files that transformers opens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *(f"word{i}" for i in range(size - len(special)))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
