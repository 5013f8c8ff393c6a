"""Towers, tokenizers and preprocessing of open_clip: `open_clip:NAME`, or :CONFIG.json, or :FOLDER.

A tower gives open_clip's own output (its projection included), so two of them with `projection: none` are the model
that open_clip builds (Ilharco et al. 2021, https://github.com/mlfoundations/open_clip), or the two contrastive towers
of a CoCa (Yu et al. 2022, arXiv:2205.01917).
"""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import open_clip
import torch.nn.functional as F
from open_clip import model as towers
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from mm.encoders import Features
from mm.encoders.image import ImageConfig, ImageEncoder, check_multiple, check_size, fit_timm
from mm.encoders.open_clip_source import (
    HfText,
    Source,
    find_source,
    hf_values,
    load_whole,
    text_tower,
    vision_tower,
)
from mm.encoders.text import TextConfig, TextEncoder, check_context
from mm.encoders.timm_trunk import parameter_groups, pooled_and_tokens
from mm.encoders.tokenizer import OpenClipTokenizer
from mm.encoders.tower import layers_around_blocks
from mm.encoders.weights import from_hub, weights_file
from mm.errors import UserError


class OpenClipImageEncoder(ImageEncoder):
    """The image tower of an open_clip model."""

    def __init__(self, spec: dict[str, Any], visual: nn.Module | None = None) -> None:
        trunk = vision_tower(spec["model"], spec["name"]) if visual is None else visual
        if isinstance(trunk, TimmModel) and hasattr(trunk.trunk, "set_input_size"):
            trunk.set_input_size(spec["size"])
        if spec["checkpointing"]:
            if isinstance(trunk, ModifiedResNet):
                raise UserError(f"{spec['name']} has no gradient checkpointing; set checkpointing to false")
            trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        if isinstance(trunk, TimmModel):
            trunk.trunk.forward = MethodType(pooled_and_tokens, trunk.trunk)
            trunk.forward = MethodType(_timm_forward, trunk)
        elif isinstance(trunk, ModifiedResNet):
            trunk.forward = MethodType(_resnet_forward, trunk)
        else:
            trunk.output_tokens = True
        super().__init__(trunk, width=spec["model"]["embed_dim"], spec=spec)

    def layers(self) -> list[list[str]]:
        if isinstance(self.trunk, TimmModel):
            groups = [[f"trunk.{name}" for name in group] for group in parameter_groups(self.trunk.trunk)]
            head = [f"head.{name}" for name, _ in self.trunk.head.named_parameters()]
            groups += [head] if head else []
        elif isinstance(self.trunk, ModifiedResNet):
            stages = ("layer1.", "layer2.", "layer3.", "layer4.", "attnpool.")
            names = [name for name, _ in self.trunk.named_parameters()]
            groups = [[name for name in names if not name.startswith(stages)]]
            groups += [[name for name in names if name.startswith(stage)] for stage in stages]
        else:
            first = ("conv1.", "class_embedding", "positional_embedding", "ln_pre.")
            groups = _projection_apart(
                layers_around_blocks(self.trunk, first, ("ln_post.", "attn_pool", "proj")), "proj"
            )
        return [[f"trunk.{name}" for name in group] for group in groups]

    def respecified(self, **given: Any) -> dict[str, Any]:
        drop_path, patch_dropout = given.pop("drop_path", None), given.pop("patch_dropout", None)
        spec = super().respecified(**given)
        _change(spec["model"]["vision_cfg"], spec["name"], given.get("size"), patch_dropout)
        if drop_path is not None:
            if not isinstance(self.trunk, TimmModel):
                raise UserError(f"drop_path belongs to timm models; {spec['name']} is none")
            spec["model"]["vision_cfg"]["timm_drop_path"] = drop_path
        return spec

    def check_size(self) -> None:
        if isinstance(self.trunk, TimmModel):
            check_size(self, self.trunk.trunk)

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(self.trunk, TimmModel):
            return fit_timm(self.trunk.trunk, state, "trunk.trunk.")
        resnet = isinstance(self.trunk, ModifiedResNet)
        name = "trunk.attnpool.positional_embedding" if resnet else "trunk.positional_embedding"
        grid = self.size[0] // (32 if resnet else self.spec["model"]["vision_cfg"].get("patch_size", 16))
        positions = {"visual.positional_embedding": state[name]}
        towers.resize_pos_embed(positions, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
        return {**state, name: positions["visual.positional_embedding"]}


class OpenClipTextEncoder(TextEncoder):
    """The text tower of an open_clip model.

    Texts are trimmed to the longest of the batch where that changes nothing, else padded to the full length.
    """

    def __init__(
        self, spec: dict[str, Any], tokenizer: OpenClipTokenizer, trunk: nn.Module | None = None
    ) -> None:
        super().__init__(spec, tokenizer)
        self.trunk = text_tower(spec["model"], spec.get("hf"), spec["name"]) if trunk is None else trunk
        self.width = spec["model"]["embed_dim"]
        config = spec["model"]["text_cfg"]
        self.positions = self.trunk.context_length  # type: ignore[assignment]
        self.trimmable = isinstance(self.trunk, HfText) or (
            not config.get("hf_tokenizer_name")
            and not config.get("no_causal_mask")
            and not config.get("embed_cls")
            and config.get("pool_type", "argmax") in ("argmax", "eos", "first")
        )
        if not isinstance(self.trunk, HfText):
            self.trunk.output_tokens = True
            self.trunk._embeds = MethodType(_embeds, self.trunk)
        if spec["checkpointing"]:
            self.trunk.set_grad_checkpointing(True)  # type: ignore[operator]

    def forward(self, input_ids: Tensor, mask: Tensor) -> Features:
        if not self.trimmable:
            rest = self.positions - input_ids.shape[1]
            input_ids = F.pad(input_ids, (0, rest), value=self.tokenizer.pad_id)
            mask = F.pad(mask, (0, rest), value=False)
        with self.gradients():
            pooled, tokens = self.trunk(input_ids)
        return Features(pooled, tokens, mask)

    def layers(self) -> list[list[str]]:
        if isinstance(self.trunk, HfText):
            return self.trunk.layers("trunk.")
        first = ("token_embedding.", "positional_embedding", "cls_emb")
        groups = layers_around_blocks(self.trunk, first, ("ln_final.", "text_projection"))
        return [[f"trunk.{name}" for name in group] for group in _projection_apart(groups, "text_projection")]


def build_image(config: ImageConfig) -> OpenClipImageEncoder:
    """The image tower that `config` names, with its weights."""
    if config.pooling != "auto" or config.drop_path is not None or config.kwargs:
        raise UserError(
            f"pooling, drop_path and kwargs belong to timm models; {config.name} has its own JSON config"
        )
    return _image(config, find_source(config.name, config.pretrained))


def build_text(config: TextConfig) -> OpenClipTextEncoder:
    """The text tower that `config` names, with its weights and tokenizer."""
    own = ("layers", "width", "heads", "dropout", "tokenizer")
    given = [key for key in own if getattr(config, key) is not None]
    if given or config.pooling != "auto":
        raise UserError(
            f"{', '.join(given) or 'pooling'} cannot be chosen for {config.name}: it has its own JSON config"
        )
    return _text(config, find_source(config.name, config.pretrained))


def open_towers(
    name: str, pretrained: bool | str, weights: str | None = None
) -> tuple[OpenClipImageEncoder, OpenClipTextEncoder, float, float | None]:
    """Both towers with the weights of a whole model, the logarithm of its scale, and its bias if it has one.

    pretrained: a tag, or true for what lies beside a config; weights: a file instead.
    """
    source = find_source(name, pretrained)
    path = weights_file(weights) if weights else source.checkpoint
    assert path is not None
    whole = load_whole(source, path)
    return (
        _image(ImageConfig(name=name), source, whole),
        _text(TextConfig(name=name), source, whole),
        whole.logit_scale.item(),
        None if whole.logit_bias is None else whole.logit_bias.item(),
    )


def _image(config: ImageConfig, source: Source, whole: Any = None) -> OpenClipImageEncoder:
    vision = source.model["vision_cfg"]
    trained_size = vision.get("image_size", 224)
    trained_size = trained_size if isinstance(trained_size, int) else trained_size[0]
    size = config.size or trained_size
    _change(vision, config.name, size=size, patch_dropout=config.patch_dropout or None)
    path = weights_file(config.weights) if config.weights else source.checkpoint
    if isinstance(vision.get("layers"), list) and size != trained_size and path:
        raise UserError(
            f"size {size} does not fit the trained {config.name}: its pooling needs {trained_size}"
        )
    spec = {
        "kind": "open_clip",
        "name": config.name,
        "model": {
            key: source.model[key]
            for key in ("embed_dim", "vision_cfg", "quick_gelu", "timm")
            if source.model.get(key) is not None
        },
        "size": size,
        "checkpointing": config.checkpointing,
        "mean": list(config.mean or source.preprocess["mean"]),
        "std": list(config.std or source.preprocess["std"]),
        "interpolation": config.interpolation
        or source.preprocess["interpolation"].replace("random", "bicubic"),
        "resize_mode": config.resize_mode or source.preprocess["resize_mode"],
    }
    if whole is None and path:
        whole = load_whole(source, path)
    return OpenClipImageEncoder(spec, None if whole is None else whole.visual)


def _text(config: TextConfig, source: Source, whole: Any = None) -> OpenClipTextEncoder:
    hf = hf_values(source)
    spec: dict[str, Any] = {
        "kind": "open_clip",
        "name": config.name,
        "model": {
            key: source.model[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in source.model
        },
        "checkpointing": config.checkpointing,
        **({} if hf is None else {"hf": hf}),
    }
    path = weights_file(config.weights) if config.weights else source.checkpoint
    if whole is None and path:
        whole = load_whole(source, path)
    trunk = text_tower(spec["model"], hf, config.name) if whole is None else whole.text
    check_context(config.context_length, trunk.context_length, config.name)
    usual = source.model["text_cfg"].get("context_length", 77)
    spec["context_length"] = config.context_length or min(usual, trunk.context_length)
    with from_hub(f"the tokenizer of {config.name}"):
        tokenizer = load_tokenizer(spec, source.folder)
    return OpenClipTextEncoder(spec, tokenizer, trunk)


def image_of(spec: dict[str, Any]) -> OpenClipImageEncoder:
    """The tower of a `spec`, with random weights."""
    return OpenClipImageEncoder(spec)


def text_of(spec: dict[str, Any], tokenizer_folder: Path) -> OpenClipTextEncoder:
    """The tower of a `spec`, with random weights. Raises OSError where the tokenizer is not in that folder."""
    return OpenClipTextEncoder(spec, load_tokenizer(spec, tokenizer_folder))


def load_tokenizer(spec: dict[str, Any], folder: Path | None) -> OpenClipTokenizer:
    """The tokenizer of a text tower; `folder` may hold its files, where open_clip does not bring them."""
    config, length = spec["model"]["text_cfg"], spec["context_length"]
    arguments = dict(config.get("tokenizer_kwargs") or {})
    if arguments.pop("trust_remote_code", False):
        raise UserError(f"the tokenizer of {spec['name']} asks to run code of its own, which is not done")
    name = config.get("hf_tokenizer_name")
    if not name:
        return OpenClipTokenizer(open_clip.SimpleTokenizer(context_length=length, **arguments), length)
    local = (
        []
        if folder is None
        else [one for one in (folder, folder / name) if (one / "tokenizer.json").is_file()]
    )
    backend = HFTokenizer(
        str(local[0]) if local else name,
        context_length=length,
        tokenizer_mode=config.get("tokenizer_mode"),
        **arguments,
    )
    return OpenClipTokenizer(backend, length)


def _change(vision: dict[str, Any], name: str, size: int | None, patch_dropout: float | None) -> None:
    """Put a size and a patch dropout into a vision_cfg. UserError where they do not fit."""
    convolutional = isinstance(vision.get("layers"), list)
    if patch_dropout and convolutional:
        raise UserError(f"patch_dropout is for ViTs; {name} has none")
    if patch_dropout is not None:
        vision["patch_dropout"] = patch_dropout
    if size is not None and "timm_model_name" not in vision:
        step = 32 if convolutional else vision.get("patch_size", 16)
        check_multiple(size, step, name)
        vision["image_size"] = size


def _embeds(trunk: Any, text: Tensor) -> tuple[Tensor, Tensor | None]:
    """open_clip's, with the causal mask cut to the batch's length (it does so only beside a padding mask)."""
    x, mask = type(trunk)._embeds(trunk, text)
    if mask is not None:
        mask = mask[..., : x.shape[1], : x.shape[1]]
    return x, mask


def _timm_forward(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    pooled, tokens = visual.trunk(images)
    return visual.head(pooled), tokens


def _resnet_forward(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    places = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    return visual.attnpool(places), places.flatten(2).mT


def _projection_apart(groups: list[list[str]], prefix: str) -> list[list[str]]:
    """The same layers with the output projection as a layer of its own, as open_clip counts when it locks."""
    projection = [name for name in groups[-1] if name.startswith(prefix)]
    rest = [name for name in groups[-1] if not name.startswith(prefix)]
    return [group for group in (*groups[:-1], rest, projection) if group]
