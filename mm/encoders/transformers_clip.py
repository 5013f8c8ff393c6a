"""Towers, tokenizers and preprocessing of transformers' dual encoders: `transformers:NAME`, or :FOLDER.

A tower gives transformers' own output (its projection included) under transformers' own names, so two of them with
`projection: none` are the model that transformers opens (Wolf et al. 2020, arXiv:1910.03771).
"""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mm.encoders import Features
from mm.encoders.hf import positions_of
from mm.encoders.image import (
    ImageConfig,
    ImageEncoder,
    changed,
    check_multiple,
    fit_timm,
    resized_positions,
    trouble,
)
from mm.encoders.text import DROPOUTS, TextConfig, TextEncoder, check_context
from mm.encoders.timm_trunk import parameter_groups, pooled_and_tokens
from mm.encoders.tokenizer import Tokenizer, hf_tokenizer
from mm.encoders.tower import layers_around_blocks
from mm.encoders.transformers_source import FAMILIES, TIMM, Source, random_network
from mm.encoders.weights import load_strictly, read_weights, tower_of_model, weights_file
from mm.errors import UserError


class VisionTrunk(nn.Module):
    """The image half of a dual encoder: pixels (B, 3, H, W) -> pooled (B, D), tokens (B, L, D')."""

    def __init__(self, vision_model: Any, visual_projection: nn.Linear | None) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.visual_projection = visual_projection
        self.timm = getattr(vision_model, "timm_model", None) is not None
        if self.timm:
            vision_model.timm_model.forward = MethodType(pooled_and_tokens, vision_model.timm_model)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.timm:  # what the wrapper does, through the network's own call
            pooled, tokens = self.vision_model.timm_model(pixels)
        else:
            output = self.vision_model(pixel_values=pixels, return_dict=True)
            pooled, tokens = output.get("pooler_output"), output.last_hidden_state
        if tokens.ndim == 4:  # a map (B, C, H, W)
            tokens = tokens.flatten(2).mT
        return _projected(pooled, self.visual_projection), tokens


class TextTrunk(nn.Module):
    """The text half of a dual encoder: ids (B, L) and a mask or none -> pooled (B, D), tokens (B, L, D')."""

    def __init__(self, text_model: Any, text_projection: nn.Linear | None, first_token: bool) -> None:
        super().__init__()
        self.text_model = text_model
        self.text_projection = text_projection
        self.first_token = first_token

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        tokens = output.last_hidden_state
        pooled = tokens[:, 0] if self.first_token else output.get("pooler_output")
        return _projected(pooled, self.text_projection), tokens


class TransformersImageEncoder(ImageEncoder):
    """The image tower of a dual encoder of transformers."""

    trunk: VisionTrunk

    def __init__(self, spec: dict[str, Any], trunk: VisionTrunk | None = None) -> None:
        if trunk is None:
            network = random_network(spec, "vision")
            trunk = VisionTrunk(network, _projection(network, spec["dim"]))
        _checkpoint(trunk.vision_model, spec)
        super().__init__(trunk, width=spec["dim"] or trunk.vision_model.config.hidden_size, spec=spec)

    def layers(self) -> list[list[str]]:
        network: Any = self.trunk.vision_model
        if self.trunk.timm:
            groups = [
                [f"timm_model.{name}" for name in group] for group in parameter_groups(network.timm_model)
            ]
        else:
            groups = layers_around_blocks(network, ("embeddings",), ("post_layernorm", "head", "pooler"))
        groups = [[f"trunk.vision_model.{name}" for name in group] for group in groups]
        return (
            groups if self.trunk.visual_projection is None else [*groups, ["trunk.visual_projection.weight"]]
        )

    def respecified(self, **given: Any) -> dict[str, Any]:
        drop_path, patch_dropout = given.pop("drop_path", None), given.pop("patch_dropout", None)
        spec = super().respecified(**given)
        _change(spec, given.get("size"), drop_path, patch_dropout)
        return spec

    def check_size(self) -> None:
        patch, size = self.spec["hf"].get("patch_size"), self.size[0]
        if isinstance(patch, int):
            check_multiple(size, patch, self.spec["name"])
        found = trouble(self)
        if found is not None:
            raise UserError(
                f"size {size} does not fit {self.spec['name']} ({found}); use what it was made for"
            )

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.trunk.timm:
            network: Any = self.trunk.vision_model.timm_model
            return fit_timm(network, state, "trunk.vision_model.timm_model.")
        own, fitted = self.state_dict(), dict(state)
        for name in own.keys() & fitted.keys():
            table, length = fitted[name], own[name].shape[-2:-1]
            if "position_embedding" in name and own[name].shape != table.shape:
                fitted[name] = resized_positions(table.view(1, *table.shape[-2:]), length[0]).view(
                    *table.shape[:-2], -1, table.shape[-1]
                )
        return fitted


class TransformersTextEncoder(TextEncoder):
    """The text tower of a dual encoder of transformers.

    Texts are trimmed to the longest of the batch where that changes nothing, else padded to the full length.
    """

    trunk: TextTrunk

    def __init__(self, spec: dict[str, Any], tokenizer: Tokenizer, trunk: TextTrunk | None = None) -> None:
        super().__init__(spec, tokenizer)
        family = FAMILIES[spec["family"]]
        self.trunk = _random_text(spec) if trunk is None else trunk
        self.reads = family.text_reads
        if self.reads == "before":  # places count from the first token on
            tokenizer.left = False
        self.width = spec["dim"] or self.trunk.text_model.config.projection_size
        self.positions = positions_of(self.trunk.text_model)
        _checkpoint(self.trunk.text_model, spec)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Features:
        if self.reads == "all":
            rest = self.positions - input_ids.shape[1]
            sides = (rest, 0) if self.tokenizer.left else (0, rest)
            input_ids = F.pad(input_ids, sides, value=self.tokenizer.pad_id)
            mask = F.pad(mask, sides, value=False)
        with self.gradients():
            pooled, tokens = self.trunk(input_ids, mask.long() if self.reads == "real" else None)
        return Features(pooled, tokens, mask)

    def layers(self) -> list[list[str]]:
        groups = layers_around_blocks(self.trunk.text_model, ("embeddings",), ("final_layer_norm", "pooler"))
        groups = [[f"trunk.text_model.{name}" for name in group] for group in groups]
        if self.trunk.text_projection is not None:
            return [*groups, ["trunk.text_projection.weight"]]
        # SigLIP's projection is a part of its network
        last = [name for name in groups[-1] if name.startswith("trunk.text_model.head.")]
        return [*groups[:-1], [name for name in groups[-1] if name not in last], last]


def image_of(spec: dict[str, Any]) -> TransformersImageEncoder:
    """The tower of a `spec`, with random weights."""
    return TransformersImageEncoder(spec)


def text_of(spec: dict[str, Any], tokenizer_folder: Path) -> TransformersTextEncoder:
    """The tower of a `spec`, with random weights. Raises OSError where the tokenizer is not in that folder."""
    words = Tokenizer(hf_tokenizer(str(tokenizer_folder)), spec["context_length"])
    return TransformersTextEncoder(spec, words)


def build_image(config: ImageConfig) -> TransformersImageEncoder:
    """The image tower that `config` names, with its weights."""
    if config.pooling != "auto" or config.kwargs:
        raise UserError(f"pooling and kwargs belong to timm models; {config.name} has its own config.json")
    source = _source(config)
    encoder = _image(config, source, source.whole() if config.pretrained else None)
    _load_file(encoder, config.weights, "image.trunk.")
    return encoder


def build_text(config: TextConfig) -> TransformersTextEncoder:
    """The text tower that `config` names, with its weights and tokenizer."""
    given = [key for key in ("layers", "width", "heads", "tokenizer") if getattr(config, key) is not None]
    if given or config.pooling != "auto":
        raise UserError(
            f"{', '.join(given) or 'pooling'} cannot be chosen for {config.name}: it has its own config.json"
        )
    source = _source(config)
    encoder = _text(config, source, source.whole() if config.pretrained else None)
    _load_file(encoder, config.weights, "text.trunk.")
    return encoder


def open_towers(
    name: str,
) -> tuple[TransformersImageEncoder, TransformersTextEncoder, float, float | None]:
    """Both towers with the weights of a dual encoder, the logarithm of its scale, and its bias if it has one."""
    source = Source(name)
    whole = source.whole()
    image, text = _image(ImageConfig(name=name), source, whole), _text(TextConfig(name=name), source, whole)
    bias = getattr(whole, "logit_bias", None)
    return image, text, whole.logit_scale.item(), None if bias is None else bias.item()


def _source(config: ImageConfig | TextConfig) -> Source:
    if isinstance(config.pretrained, str):
        raise UserError(
            f"pretrained: {config.pretrained!r} is for open_clip; {config.name} takes true or false"
        )
    if config.pretrained and config.weights:
        raise UserError("pretrained and weights are both given; keep one")
    return Source(config.name)


def _image(config: ImageConfig, source: Source, whole: Any) -> TransformersImageEncoder:
    given = {key: getattr(config, key) for key in ("size", "mean", "std", "interpolation", "resize_mode")}
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    spec = {
        "kind": "transformers",
        "name": config.name,
        "family": source.config.model_type,
        "dim": source.config.projection_dim if source.family.projected else None,
        "hf": source.values("vision"),
        "checkpointing": config.checkpointing,
        **changed(source.preprocessing(), **given),
    }
    _change(spec, config.size, config.drop_path, config.patch_dropout or None)
    same = spec["hf"] == source.values("vision")
    trunk = (
        VisionTrunk(whole.vision_model, getattr(whole, "visual_projection", None)) if whole and same else None
    )
    encoder = TransformersImageEncoder(spec, trunk)
    if not same or spec["hf"].get("image_size", spec["size"]) != spec["size"]:
        encoder.check_size()
    if whole and not same:
        _load(encoder, whole.state_dict(), config.name)
    return encoder


def _text(config: TextConfig, source: Source, whole: Any) -> TransformersTextEncoder:
    hf = source.values("text")
    if config.dropout is not None:
        hf |= {key: config.dropout for key in DROPOUTS if key in hf}
    spec: dict[str, Any] = {
        "kind": "transformers",
        "name": config.name,
        "family": source.config.model_type,
        "dim": source.config.projection_dim if source.family.projected else None,
        "hf": hf,
        "attention": source.attention(config.attention),
        "checkpointing": config.checkpointing,
    }
    same = (
        whole
        and hf == source.values("text")
        and spec["attention"] == whole.text_model.config._attn_implementation
    )
    if same:
        trunk = TextTrunk(
            whole.text_model, getattr(whole, "text_projection", None), source.family.first_token
        )
    else:
        trunk = _random_text(spec)
    words, limit = source.words(), positions_of(trunk.text_model)
    if len(words) > trunk.text_model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {config.name} has {len(words)} words, its network "
            f"{trunk.text_model.config.vocab_size}"
        )
    check_context(config.context_length, limit, config.name)
    spec["context_length"] = config.context_length or min(limit, words.model_max_length)
    encoder = TransformersTextEncoder(spec, Tokenizer(words, spec["context_length"]), trunk)
    if whole and not same:
        _load(encoder, whole.state_dict(), config.name)
    return encoder


def _projected(pooled: Tensor | None, projection: nn.Linear | None) -> Tensor:
    if pooled is None:
        raise UserError(
            "a tower of this dual encoder gives no pooled vector; choose a model whose networks have a pooler"
        )
    if projection is None:
        return pooled
    projected: Tensor = projection(pooled)
    return projected


def _random_text(spec: dict[str, Any]) -> TextTrunk:
    network = random_network(spec, "text")
    return TextTrunk(network, _projection(network, spec["dim"]), FAMILIES[spec["family"]].first_token)


def _projection(network: Any, dim: int | None) -> nn.Linear | None:
    if dim is None:
        return None
    width = network.config.hidden_size
    layer = nn.Linear(width, dim, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return layer


def _checkpoint(network: Any, spec: dict[str, Any]) -> None:
    if not spec["checkpointing"]:
        return
    if not network.supports_gradient_checkpointing:
        raise UserError(f"{spec['name']} has no gradient checkpointing; set checkpointing to false")
    network.gradient_checkpointing_enable({"use_reentrant": False})


def _change(
    spec: dict[str, Any], size: int | None, drop_path: float | None, patch_dropout: float | None
) -> None:
    """Put a size and two rates into the spec of an image tower. UserError for what its network does not have."""
    hf = spec["hf"]
    if hf["model_type"] == TIMM:
        arguments = dict(hf.get("model_args") or {})
        if size is not None and ("img_size" in arguments or _fixed(hf["architecture"])):
            arguments["img_size"] = size
        rates = {"drop_path_rate": drop_path, "patch_drop_rate": patch_dropout}
        arguments |= {key: rate for key, rate in rates.items() if rate is not None}
        if arguments != (hf.get("model_args") or {}):
            hf["model_args"] = arguments
        return
    if size is not None and "image_size" in hf:
        hf["image_size"] = size
    if patch_dropout:
        raise UserError(f"patch_dropout is for timm's ViTs; {spec['name']} has none")
    if drop_path and "drop_path_rate" not in hf:
        raise UserError(f"{spec['name']} has no drop_path; leave it out")
    if drop_path is not None and "drop_path_rate" in hf:
        hf["drop_path_rate"] = drop_path


def _fixed(architecture: str) -> bool:
    """Whether a timm network is made for one size of image."""
    import timm

    return bool(timm.get_pretrained_cfg(architecture).fixed_input_size)


def _load_file(
    encoder: TransformersImageEncoder | TransformersTextEncoder, weights: str | None, prefix: str
) -> None:
    """Load a tower from a file of weights, if one is given; `prefix`: of its tensors in a whole model of mm."""
    if weights:
        path = weights_file(weights)
        _load(encoder, tower_of_model(read_weights(path), prefix), str(path))


def _load(
    encoder: TransformersImageEncoder | TransformersTextEncoder, state: Mapping[str, Tensor], source: str
) -> None:
    """Load a tower from the weights of a whole dual encoder, or from its own."""
    if isinstance(encoder, TransformersImageEncoder):
        fitted = encoder.fitted({f"trunk.{name}": value for name, value in state.items()})
        state = {name.removeprefix("trunk."): value for name, value in fitted.items()}
        others: tuple[str, ...] = ("text_model.", "text_projection.", "logit_")
    else:
        others = ("vision_model.", "visual_projection.", "logit_")
    load_strictly(encoder.trunk, state, Path(source), ignore=others)
