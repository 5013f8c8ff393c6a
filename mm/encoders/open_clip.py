"""Towers, tokenizers and preprocessing of open_clip: `open_clip:NAME`, or :CONFIG.json, or :FOLDER.

A tower gives open_clip's own output (its projection included), so two of them with `projection: none` are the
model that open_clip builds (Ilharco et al. 2021, https://github.com/mlfoundations/open_clip).
"""

import copy
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import open_clip
import torch.nn.functional as F
from open_clip import factory
from open_clip import model as towers
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from mm.encoders import Features
from mm.encoders.image import OPEN_CLIP, ImageConfig, ImageEncoder, check_multiple, check_size, fit_timm
from mm.encoders.text import TextConfig, TextEncoder, check_context
from mm.encoders.timm_trunk import parameter_groups, pooled_and_tokens
from mm.encoders.tokenizer import OpenClipTokenizer
from mm.encoders.tower import layers_around_blocks
from mm.encoders.weights import from_hub, weights_file
from mm.errors import UserError


class _Source(NamedTuple):
    """What a name stands for."""

    name: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    checkpoint: Path | None


class OpenClipImageEncoder(ImageEncoder):
    """The image tower of an open_clip model."""

    def __init__(self, spec: dict[str, Any], visual: nn.Module | None = None) -> None:
        trunk = _tower(spec, towers._build_vision_tower, "vision_cfg") if visual is None else visual
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
            trunk.output_tokens = True  # type: ignore[assignment]
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
        super().__init__()
        self.spec = spec
        self.trunk = _tower(spec, towers._build_text_tower, "text_cfg") if trunk is None else trunk
        self.tokenizer = tokenizer
        self.width = spec["model"]["embed_dim"]
        config = spec["model"]["text_cfg"]
        self.positions = self.trunk.context_length  # type: ignore[assignment]
        self.trimmable = (
            not config.get("hf_tokenizer_name")
            and not config.get("no_causal_mask")
            and not config.get("embed_cls")
            and config.get("pool_type", "argmax") in ("argmax", "eos", "first")
        )
        self.trunk.output_tokens = True  # type: ignore[assignment]
        self.trunk._embeds = MethodType(_embeds, self.trunk)  # type: ignore[assignment]
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
        first = ("token_embedding.", "positional_embedding", "cls_emb")
        groups = layers_around_blocks(self.trunk, first, ("ln_final.", "text_projection"))
        return [[f"trunk.{name}" for name in group] for group in _projection_apart(groups, "text_projection")]

    def respecified(self, *, dropout: float | None = None, **given: Any) -> dict[str, Any]:
        if dropout is not None:
            raise UserError(f"dropout cannot be chosen for {self.spec['name']}: it has its own JSON config")
        return super().respecified(**given)

    def with_spec(self, spec: dict[str, Any]) -> "OpenClipTextEncoder":
        length, words = spec["context_length"], self.tokenizer
        if length != words.context_length:
            words = OpenClipTokenizer(words.backend, length)
        return OpenClipTextEncoder(spec, words)


def build_open_clip_image(config: ImageConfig) -> OpenClipImageEncoder:
    """The image tower that `config` names, with its weights."""
    if config.pooling != "auto" or config.drop_path is not None or config.kwargs:
        raise UserError(
            f"pooling, drop_path and kwargs belong to timm models; {config.name} has its own JSON config"
        )
    source = _source(config.name, config.pretrained)
    vision = source.model["vision_cfg"]
    trained_size = vision.get("image_size", 224)
    trained_size = trained_size if isinstance(trained_size, int) else trained_size[0]
    size = config.size or trained_size
    _change(vision, config.name, size=size, patch_dropout=config.patch_dropout or None)
    if isinstance(vision.get("layers"), list) and size != trained_size and _weights(config, source):
        raise UserError(
            f"size {size} does not fit the trained {config.name}: its pooling needs {trained_size}"
        )
    spec = {
        "kind": "open_clip",
        "name": config.name,
        "model": {
            key: source.model[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in source.model
        },
        "size": size,
        "checkpointing": config.checkpointing,
        "mean": list(config.mean or source.preprocess["mean"]),
        "std": list(config.std or source.preprocess["std"]),
        "interpolation": config.interpolation
        or source.preprocess["interpolation"].replace("random", "bicubic"),
        "resize_mode": config.resize_mode or source.preprocess["resize_mode"],
    }
    path = _weights(config, source)
    return OpenClipImageEncoder(spec, _load_both(source, path).visual if path else None)


def build_open_clip_text(config: TextConfig) -> OpenClipTextEncoder:
    """The text tower that `config` names, with its weights and tokenizer."""
    own = ("layers", "width", "heads", "dropout", "tokenizer")
    given = [key for key in own if getattr(config, key) is not None]
    if given or config.pooling != "auto":
        raise UserError(
            f"{', '.join(given) or 'pooling'} cannot be chosen for {config.name}: it has its own JSON config"
        )
    source = _source(config.name, config.pretrained)
    text = source.model["text_cfg"]
    spec = {
        "kind": "open_clip",
        "name": config.name,
        "model": {
            key: source.model[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in source.model
        },
        "context_length": config.context_length or text.get("context_length", 77),
        "checkpointing": config.checkpointing,
    }
    check_context(config.context_length, text.get("context_length", 77), config.name)
    folder = source.checkpoint.parent if source.checkpoint is not None else None
    with from_hub(f"the tokenizer of {config.name}"):
        tokenizer = load_tokenizer(spec, folder)
    path = _weights(config, source)
    return OpenClipTextEncoder(spec, tokenizer, _load_both(source, path).text if path else None)


def load_tokenizer(spec: dict[str, Any], folder: Path | None) -> OpenClipTokenizer:
    """The tokenizer of a text tower; `folder` may hold its files, where open_clip does not bring them."""
    config, length = spec["model"]["text_cfg"], spec["context_length"]
    arguments = dict(config.get("tokenizer_kwargs") or {})
    if arguments.pop("trust_remote_code", False):
        raise UserError(f"the tokenizer of {spec['name']} asks to run code of its own, which is not done")
    name = config.get("hf_tokenizer_name")
    if not name:
        return OpenClipTokenizer(open_clip.SimpleTokenizer(context_length=length, **arguments), length)
    local = folder is not None and (folder / "tokenizer.json").is_file()
    backend = HFTokenizer(
        str(folder) if local else name,
        context_length=length,
        tokenizer_mode=config.get("tokenizer_mode"),
        **arguments,
    )
    return OpenClipTokenizer(backend, length)


def _source(name: str, pretrained: bool | str) -> _Source:
    target = name.removeprefix(OPEN_CLIP)
    path = Path(target).expanduser()
    preprocess = vars(PreprocessCfg()).copy()
    checkpoint: Path | None = None
    if path.suffix == ".json" or path.is_dir():
        file = path / "open_clip_config.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"there is no open_clip config {str(file)!r}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        model = content.get("model_cfg", content)
        preprocess |= {
            key: value for key, value in content.get("preprocess_cfg", {}).items() if value is not None
        }
        if path.is_dir():
            found = factory._find_checkpoint_in_dir(path)
            checkpoint = Path(found) if found else None
        if pretrained and checkpoint is None:
            raise UserError(f"there are no weights beside {str(file)!r}; give them as weights: FILE")
    else:
        target = target.replace("/", "-")
        model = open_clip.get_model_config(target)
        if model is None:
            close = difflib.get_close_matches(target, open_clip.list_models(), n=4)
            advice = f"closest: {', '.join(close)}" if close else "open_clip.list_models() has all names"
            raise UserError(f"there is no open_clip model {target!r}; {advice}")
        checkpoint = _published(target, pretrained, model, preprocess)
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(f"{name} is not an open_clip config: it needs embed_dim, vision_cfg and text_cfg")
    model = copy.deepcopy(model)
    if "multimodal_cfg" in model:
        raise UserError(f"{name} is a CoCa model, which cannot be read; choose a CLIP or SigLIP model")
    if model["text_cfg"].get("hf_model_name"):
        other = model["text_cfg"]["hf_model_name"]
        raise UserError(
            f"the text tower of {name} is a transformers model: use text.name={other} instead of open_clip"
        )
    if model["vision_cfg"].get("timm_model_name"):
        model["vision_cfg"]["timm_model_pretrained"] = False
    return _Source(name, model, preprocess, checkpoint if pretrained else None)


def _published(
    target: str, pretrained: bool | str, model: dict[str, Any], preprocess: dict[str, Any]
) -> Path | None:
    if not pretrained:
        return None
    published = get_pretrained_cfg(target, pretrained) if isinstance(pretrained, str) else {}
    if not published:
        tags = ", ".join(list_pretrained_tags_by_model(target)) or "none"
        raise UserError(f"pretrained: {pretrained} is not a tag of {target}; it has {tags}")
    preprocess |= {key: published[key] for key in preprocess if published.get(key) is not None}
    model["quick_gelu"] = bool(published.get("quick_gelu", False))
    with from_hub(f"the weights {pretrained} of {target}"):
        return Path(download_pretrained(published))


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


def _weights(config: ImageConfig | TextConfig, source: _Source) -> Path | None:
    return weights_file(config.weights) if config.weights else source.checkpoint


def _load_both(source: _Source, path: Path) -> Any:
    """Both towers with the weights of a whole model's checkpoint; open_clip converts and resizes them."""
    keys = ("custom_text", "preprocess_cfg")
    with _readable(source.name):
        both = towers.CustomTextCLIP(
            **{key: copy.deepcopy(value) for key, value in source.model.items() if key not in keys}
        )
    try:
        open_clip.load_checkpoint(both, str(path), weights_only=True)
    except (RuntimeError, KeyError, ValueError, UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the weights in {path} do not fit {source.name}: {reason}") from error
    return both


def _tower(spec: dict[str, Any], build: Callable[..., nn.Module], section: str) -> nn.Module:
    model = copy.deepcopy(spec["model"])
    with _readable(spec["name"]):
        return build(model["embed_dim"], model[section], model.get("quick_gelu", False))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Around the building of a tower from a user's JSON: what open_clip does not know is named."""
    try:
        yield
    except TypeError as error:
        raise UserError(f"the config of {name} is not one that open_clip reads: {error}") from error


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
