"""Text encoders: any BERT-family transformers encoder; `open_clip:` and `transformers:` lead to their own modules."""

import difflib
import json
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mm.config import Config
from mm.encoders import Features
from mm.encoders.hf import (
    DEFAULT_CONTEXT,
    Attention,
    attention_of,
    network_class,
    positions_of,
    quiet_transformers,
)
from mm.encoders.image import changed
from mm.encoders.tokenizer import Tokenizer, hf_tokenizer
from mm.encoders.tower import Tower, layers_around_blocks
from mm.encoders.weights import (
    from_hub,
    load_strictly,
    model_folder,
    read_weights,
    tower_of_model,
    weights_file,
)
from mm.errors import UserError

PRESETS = ("bert", "roberta")
# for "did you mean": the hub cannot be listed
KNOWN = (
    *PRESETS,
    "bert-base-uncased",
    "bert-base-multilingual-cased",
    "bert-large-uncased",
    "distilbert-base-uncased",
    "roberta-base",
    "roberta-large",
    "xlm-roberta-base",
    "microsoft/mpnet-base",
    "answerdotai/ModernBERT-base",
    "sentence-transformers/all-MiniLM-L6-v2",
    "sentence-transformers/all-mpnet-base-v2",
)
DROPOUTS: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout")
DROPOUTS += ("attention_dropout", "embedding_dropout", "mlp_dropout")  # as the families call it
Pooling = Literal["auto", "cls", "mean", "pooler"]


class TextConfig(Config):
    """The text tower."""

    name: str = "bert"
    """A transformers encoder (hub, folder, package:NAME), random bert, roberta; open_clip:NAME, transformers:NAME."""
    pretrained: bool | str = False
    """True: its published weights, false: random ones; for open_clip the tag."""
    weights: str | None = None
    """A local file (safetensors or torch), or package:NAME: the one in an installed Python package."""
    tokenizer: str | None = None
    """Where the tokenizer comes from: hub name, folder or package:NAME; null: the same as name."""
    context_length: int | None = None
    """Most tokens of a text, longer ones are cut; null: 77, or what the network can read if that is less."""
    pooling: Pooling = "auto"
    """cls, mean or pooler; auto: what the checkpoint was trained with."""
    layers: int | None = None
    """Layers of a random network; null: as its config says."""
    width: int | None = None
    """Width of a random network; null: as its config says."""
    heads: int | None = None
    """Attention heads of a random network; null: as its config says."""
    dropout: float | None = None
    """Dropout of activations and attention; null: as its config says."""
    attention: Attention | None = None
    """Which attention code runs; null: sdpa, or eager in a network that has no other."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    lock: bool = False
    """Do not train this tower (LiT)."""
    unlock_last: int = 0
    """With lock: how many of its last layers are trained all the same."""


class TextEncoder(Tower):
    """Base of the text encoders."""

    width: int
    positions: int
    """The most tokens that the network can read."""

    def __init__(self, spec: dict[str, Any], tokenizer: Any) -> None:
        super().__init__()
        self.spec = spec
        """everything that `text_encoder` needs beside the tokenizer to build this encoder again, as JSON values"""
        self.tokenizer = tokenizer

    def forward(self, input_ids: Tensor, mask: Tensor) -> Features:
        """input_ids (B, L) int64, mask (B, L) bool."""
        raise NotImplementedError

    def respecified(self, *, dropout: float | None = None, **given: Any) -> dict[str, Any]:
        """The spec of the same network with some of checkpointing, dropout and context_length changed; None
        leaves one as it is. Raises UserError for what this network does not have."""
        check_context(given.get("context_length"), self.positions, self.spec["name"])
        spec = changed(self.spec, **given)
        if dropout is not None:
            if "hf" not in spec:  # no network of transformers
                raise UserError(f"dropout cannot be chosen for {spec['name']}: it has its own JSON config")
            spec["hf"] |= {key: dropout for key in DROPOUTS if key in spec["hf"]}
        return spec

    def with_spec(self, spec: dict[str, Any]) -> Self:
        """The encoder of a `spec` of this network, with random weights and this one's tokenizer."""
        return type(self)(spec, self.tokenizer.of_length(spec["context_length"]))


class BertEncoder(TextEncoder):
    """A transformers encoder (BERT, Devlin et al. 2019, arXiv:1810.04805, and its family)."""

    def __init__(self, spec: dict[str, Any], tokenizer: Tokenizer, trunk: nn.Module | None = None) -> None:
        super().__init__(spec, tokenizer)
        self.trunk = _random(spec) if trunk is None else trunk
        self.positions = positions_of(self.trunk)
        self.width = self.trunk.config.hidden_size  # type: ignore[union-attr,assignment]
        self.pooling: str = spec["pooling"]
        if self.pooling == "pooler" and getattr(self.trunk, "pooler", None) is None:
            raise UserError(f"pooling 'pooler' needs a pooler, and {spec['name']} has none; use cls or mean")
        if spec["checkpointing"]:
            if not self.trunk.supports_gradient_checkpointing:
                raise UserError(f"{spec['name']} has no gradient checkpointing; set checkpointing to false")
            self.trunk.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def forward(self, input_ids: Tensor, mask: Tensor) -> Features:
        with self.gradients():
            output = self.trunk(input_ids=input_ids, attention_mask=mask.long())
            tokens = output.last_hidden_state
            if self.pooling == "pooler":
                pooled = output.pooler_output
            elif self.pooling == "mean":
                weights = mask.unsqueeze(-1).float()
                pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
            else:
                first = mask.int().argmax(1)  # the padding may be on the left
                pooled = tokens[torch.arange(tokens.shape[0], device=tokens.device), first]
        return Features(pooled, tokens, mask)

    def layers(self) -> list[list[str]]:
        groups = layers_around_blocks(self.trunk, first=("embeddings",), last=("pooler",))
        return [[f"trunk.{name}" for name in group] for group in groups]


def text_of(spec: dict[str, Any], tokenizer_folder: Path) -> BertEncoder:
    """The tower of a `spec`, with random weights. Raises OSError where the tokenizer is not in that folder."""
    return BertEncoder(spec, Tokenizer(hf_tokenizer(str(tokenizer_folder)), spec["context_length"]))


def build_text(config: TextConfig) -> BertEncoder:
    """The encoder of transformers of that name, with its weights. Raises UserError for what does not exist or fit."""
    if isinstance(config.pretrained, str):
        raise UserError(
            f"pretrained: {config.pretrained!r} is for open_clip; {config.name} takes true or false"
        )
    if config.pretrained and config.weights:
        raise UserError("pretrained and weights are both given; keep one")
    if config.name in PRESETS and not config.tokenizer:
        raise UserError(
            f"name: {config.name} has no words of its own; give tokenizer: hub name, folder or package:NAME"
        )
    if config.name in PRESETS and config.pretrained:
        raise UserError(
            f"name: {config.name} is a random network; give a hub name or a folder for pretrained weights"
        )
    shape = {"layers": config.layers, "width": config.width, "heads": config.heads}
    given = [key for key, value in shape.items() if value is not None]
    if config.pretrained and given:
        raise UserError(f"{', '.join(given)} cannot be chosen for a pretrained network; leave them out")

    source = model_folder(config.name)
    hf_config = None if config.name in PRESETS else _hf_config(config.name, source)
    with from_hub(f"the tokenizer {config.tokenizer or config.name!r}"):
        words = hf_tokenizer(model_folder(config.tokenizer or config.name))
    hf_config = _shaped(hf_config or _preset(config.name, words), config)
    if len(words) > hf_config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(words)} words, {config.name} only {hf_config.vocab_size}; "
            "choose the one it was trained with"
        )
    pooling = _trained_pooling(config.name, source) if config.pooling == "auto" else config.pooling
    hf_values = json.loads(hf_config.to_json_string(use_diff=False))
    spec: dict[str, Any] = {
        "kind": "bert",
        "name": config.name,
        "hf": {key: value for key, value in hf_values.items() if key != "_name_or_path"},
        "pooling": pooling,
        "attention": attention_of(network_class(hf_config, config.name), config.attention, config.name),
        "checkpointing": config.checkpointing,
    }
    if config.pretrained:
        with from_hub(f"pretrained weights of {config.name}"):
            trunk = _pretrained(source, hf_config, spec)
    else:
        trunk = _random(spec)
    check_context(config.context_length, positions_of(trunk), config.name)
    spec["context_length"] = config.context_length or min(DEFAULT_CONTEXT, positions_of(trunk))
    encoder = BertEncoder(spec, Tokenizer(words, spec["context_length"]), trunk)
    if config.weights:
        path = weights_file(config.weights)
        state = tower_of_model(read_weights(path), "text.trunk.")
        prefix = f"{trunk.base_model_prefix}."
        if all(not name.startswith(prefix) for name in state):
            prefix = ""
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        load_strictly(trunk, state, path, ignore=("pooler.", "cls.", "embeddings.position_ids"))
    return encoder


def _preset(name: str, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    special = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return AutoConfig.for_model(name, vocab_size=len(tokenizer), **special)


def _hf_config(name: str, source: str) -> Any:
    from transformers import AutoConfig

    try:
        with from_hub(f"the text model {name!r}"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except UserError as error:
        close = [] if name in KNOWN else difflib.get_close_matches(name, KNOWN, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"{hint}{error}; {' and '.join(PRESETS)} with tokenizer: need no network") from error
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder; choose an encoder such as BERT")
    return config


def _shaped(hf_config: Any, config: TextConfig) -> Any:
    if config.layers is not None:
        hf_config.num_hidden_layers = config.layers
    if config.width is not None:
        if hasattr(hf_config, "intermediate_size"):
            hf_config.intermediate_size = hf_config.intermediate_size * config.width // hf_config.hidden_size
        hf_config.hidden_size = config.width
        if config.heads is None and config.width % 64 == 0:
            hf_config.num_attention_heads = config.width // 64
    if config.heads is not None:
        hf_config.num_attention_heads = config.heads
    if hf_config.hidden_size % hf_config.num_attention_heads:
        raise UserError(
            f"width {hf_config.hidden_size} is not a multiple of heads {hf_config.num_attention_heads}"
        )
    if config.dropout is not None:
        for key in DROPOUTS:
            if hasattr(hf_config, key):
                setattr(hf_config, key, config.dropout)
    return hf_config


def _random(spec: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    values = dict(spec["hf"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    attention = attention_of(network_class(config, spec["name"]), spec["attention"], spec["name"])
    arguments = {"attn_implementation": attention, "dtype": torch.float32, "trust_remote_code": False}
    try:
        return AutoModel.from_config(config, add_pooling_layer=spec["pooling"] == "pooler", **arguments)
    except TypeError:  # a family that never has a pooler
        return AutoModel.from_config(config, **arguments)


def _pretrained(source: str, hf_config: Any, spec: dict[str, Any]) -> nn.Module:
    from transformers import AutoModel

    arguments = {
        "config": hf_config,
        "attn_implementation": spec["attention"],
        "dtype": torch.float32,
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    pooler = {"add_pooling_layer": spec["pooling"] == "pooler"}
    with quiet_transformers():
        try:
            trunk, info = AutoModel.from_pretrained(source, **pooler, **arguments)
        except TypeError:  # a family that never has a pooler
            trunk, info = AutoModel.from_pretrained(source, **arguments)
    missing = sorted(info["missing_keys"])
    if any(name.startswith("pooler.") for name in missing):
        raise UserError(
            f"pooling 'pooler' needs a trained pooler, and {spec['name']} has none; use cls or mean"
        )
    if missing:
        raise UserError(
            f"the weights of {spec['name']} lack {len(missing)} tensors, such as {', '.join(missing[:3])}"
        )
    module: nn.Module = trunk
    return module


def _trained_pooling(name: str, source: str) -> str:
    """What sentence-transformers wrote down beside the checkpoint, else the first token."""
    if name in PRESETS:
        return "cls"
    modules = _json(source, "modules.json") or []
    path = next((module["path"] for module in modules if module["type"].endswith("Pooling")), None)
    modes = _json(source, f"{path}/config.json") if path is not None else None
    if not modes:
        return "cls"
    kinds = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    found = [kind for kind, key in kinds.items() if modes.get(key)]
    if modes.get("pooling_mode") in ("mean", "cls"):
        found = [modes["pooling_mode"]]
    if len(found) != 1:
        raise UserError(
            f"{name} was trained with a pooling that is not offered here; choose pooling: cls or mean"
        )
    return found[0]


def _json(source: str, file: str) -> Any:
    from transformers.utils import cached_file

    with from_hub(f"{file} of {source}"):
        path = cached_file(
            source,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


def check_context(length: int | None, limit: int, name: str) -> None:
    """Raises UserError where texts of `length` tokens are longer than a network can read."""
    if length is not None and length > limit:
        raise UserError(f"context_length {length} is more than {name} can read; use at most {limit}")
