"""What a name stands for among open_clip's models: its JSON config, its weights, and how it is built."""

import copy
import difflib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
from open_clip import factory
from open_clip import model as towers
from open_clip.coca_model import _build_text_decoder_tower
from open_clip.hf_model import _POOLERS, arch_dict
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from open_clip.transform import PreprocessCfg
from timm.models import load_model_config_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn

from mm.encoders.hf import positions_of, quiet_transformers
from mm.encoders.image import OPEN_CLIP
from mm.encoders.tower import layers_around_blocks
from mm.encoders.weights import from_hub
from mm.errors import UserError

HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
TIMM = ("architecture", "num_classes", "model_args", "pretrained_cfg")  # what timm reads in a config.json
PLACES = ("file", "source", "hf_hub_id", "label_names", "label_descriptions")  # of no use without weights


class Source(NamedTuple):
    """What a name stands for."""

    name: str
    model: dict[str, Any]
    """its JSON config; `timm` beside: what its image tower's name leads to"""
    preprocess: dict[str, Any]
    checkpoint: Path | None
    """the weights, where they are wanted"""
    folder: Path | None
    """where its other files lie, such as a tokenizer"""


class HfText(nn.Module):
    """A text tower that is a network of transformers, with open_clip's pooling and projection, under its names.

    open_clip's `HFTextEncoder`, built from a config instead of from the name of one on a hub.
    """

    def __init__(self, values: dict[str, Any], config: towers.CLIPTextCfg, output_dim: int) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        values = dict(values)
        hf = AutoConfig.for_model(values.pop("model_type"), **values)
        hf._attn_implementation = None  # a name from a file could be that of code on a hub
        pooling = config.hf_pooler_type or arch_dict[hf.model_type]["pooler"]
        arguments = {"dtype": torch.float32, "trust_remote_code": False}
        if hf.is_encoder_decoder:
            self.transformer = AutoModel.from_config(hf, **arguments).encoder
        else:
            try:
                self.transformer = AutoModel.from_config(
                    hf, add_pooling_layer=pooling == "cls_pooler", **arguments
                )
            except TypeError:  # a family that never has a pooler
                self.transformer = AutoModel.from_config(hf, **arguments)
        self.pooler = _POOLERS[pooling]()
        self.pad_id: int = hf.pad_token_id
        self.context_length = positions_of(self.transformer)
        width = hf.hidden_size
        self.proj: nn.Module = nn.Identity()
        if config.hf_proj_type == "linear":
            self.proj = nn.Linear(width, output_dim, bias=False)
        elif config.hf_proj_type == "mlp":
            between = (width + output_dim) // 2
            self.proj = nn.Sequential(
                nn.Linear(width, between, bias=False), nn.GELU(), nn.Linear(between, output_dim, bias=False)
            )

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> pooled (B, D), tokens (B, L, D')."""
        mask = (input_ids != self.pad_id).long()
        output = self.transformer(input_ids=input_ids, attention_mask=mask)
        return self.proj(self.pooler(output, mask)), output.last_hidden_state

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of open_clip's towers."""
        assert enable
        self.transformer.gradient_checkpointing_enable({"use_reentrant": False})

    def layers(self, prefix: str) -> list[list[str]]:
        """Parameter names by layer, the projection as one of its own."""
        groups = layers_around_blocks(
            self.transformer, ("embeddings", "embed", "shared"), ("pooler", "final_layer_norm", "layer_norm")
        )
        groups = [[f"{prefix}transformer.{name}" for name in group] for group in groups]
        last = [f"{prefix}proj.{name}" for name, _ in self.proj.named_parameters()]
        return [*groups, last] if last else groups


class Whole(nn.Module):
    """Both towers and their temperature under open_clip's names, to read a checkpoint with."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        model, name = source.model, source.name
        self.visual = vision_tower(model, name)
        self.text = text_tower(model, hf_values(source), name)
        if "multimodal_cfg" in model:  # a CoCa: its decoder is read and left
            with _readable(name):
                words = towers.CLIPTextCfg(**model["text_cfg"]).vocab_size
                self.text_decoder = _build_text_decoder_tower(
                    words, dict(model["multimodal_cfg"]), model.get("quick_gelu", False)
                )
        shape = [1] if model.get("nonscalar_logit_scale") else []
        self.logit_scale = nn.Parameter(torch.full(shape, model.get("init_logit_scale", math.log(1 / 0.07))))
        bias = model.get("init_logit_bias")
        self.logit_bias = None if bias is None else nn.Parameter(torch.full(shape, float(bias)))


def find_source(name: str, pretrained: bool | str) -> Source:
    """What `open_clip:NAME` stands for; UserError for what does not exist. With `pretrained` its weights are there."""
    target = name.removeprefix(OPEN_CLIP)
    preprocess = vars(PreprocessCfg()).copy()
    checkpoint: Path | None = None
    folder: Path | None = None
    if target.startswith(HUB):
        repository = target.removeprefix(HUB)
        with from_hub(f"the model {repository!r}"):
            file = Path(download_pretrained_from_hf(repository, CONFIG))
            checkpoint = Path(download_pretrained_from_hf(repository)) if pretrained else None
        folder, model = file.parent, _read(file, preprocess)
    elif target and ((path := Path(target).expanduser()).suffix == ".json" or path.is_dir()):
        file = path / CONFIG if path.is_dir() else path
        folder, model = file.parent, _read(file, preprocess)
        found = factory._find_checkpoint_in_dir(path) if path.is_dir() else None
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
        folder = checkpoint.parent if checkpoint else None
    sections = (model.get("vision_cfg"), model.get("text_cfg"))
    if "embed_dim" not in model or not all(isinstance(one, dict) for one in sections):
        raise UserError(f"{name} is not an open_clip config: it needs embed_dim, vision_cfg and text_cfg")
    model = copy.deepcopy(model)
    if image := model["vision_cfg"].get("timm_model_name"):
        model["vision_cfg"]["timm_model_pretrained"] = False
        model["timm"] = _timm_config(image, name, folder)
    return Source(name, model, preprocess, checkpoint if pretrained else None, folder)


def weights_of(name: str) -> tuple[str, bool | str, str | None]:
    """`open_clip:NAME@TAG`, `:NAME@FILE` or `:FOLDER` as the name, what is `pretrained` of it, and `weights`.

    Without a tag the only one is meant. Raises UserError where there are several, or none.
    """
    target = name.removeprefix(OPEN_CLIP)
    where, _, which = target.partition("@")
    if Path(target).expanduser().exists():  # a path may have an @ in it
        where, which = target, ""
    known = where.replace("/", "-")
    if known not in open_clip.list_models():
        return OPEN_CLIP + where, not which, which or None
    tags = list_pretrained_tags_by_model(known)
    if get_pretrained_cfg(known, which):
        return OPEN_CLIP + where, which, None
    if which and not Path(which).expanduser().is_file():
        close = difflib.get_close_matches(which, tags, n=3) or tags or ["none"]
        raise UserError(f"{which!r} is neither a file nor a tag of {where}; closest: {', '.join(close)}")
    if not which and len(tags) != 1:
        raise UserError(
            f"which weights of {where} are meant? {OPEN_CLIP}{where}@TAG or {OPEN_CLIP}{where}@FILE; "
            f"its tags: {', '.join(tags) or 'none'}"
        )
    return OPEN_CLIP + where, "" if which else tags[0], which or None


def hf_values(source: Source) -> dict[str, Any] | None:
    """The config of the text tower that is a network of transformers; None where it is open_clip's own."""
    from transformers import AutoConfig

    name = source.model["text_cfg"].get("hf_model_name")
    if not name:
        return None
    place = _described(
        name, source.folder, lambda content: "model_type" in content and "vision_config" not in content
    )
    if place is None and name.startswith(("/", ".", "~")):
        raise _missing("text", name, source.name)
    with from_hub(f"the text tower {name} of {source.name}"), quiet_transformers():
        config = AutoConfig.from_pretrained(place or name, trust_remote_code=False)
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", *TIMM)}


def vision_tower(model: dict[str, Any], name: str) -> Any:
    """The image tower of a JSON config, with random weights."""
    config = copy.deepcopy(model["vision_cfg"])
    described = model.get("timm") or _timm_config(config.get("timm_model_name") or "", name, None)
    with _readable(name), tempfile.TemporaryDirectory() as folder:
        if described:  # open_clip hands timm a name alone
            (Path(folder) / "config.json").write_text(json.dumps(described), encoding="utf-8")
            config["timm_model_name"] = f"local-dir:{folder}"
        return towers._build_vision_tower(model["embed_dim"], config, model.get("quick_gelu", False))


def text_tower(model: dict[str, Any], hf: dict[str, Any] | None, name: str) -> Any:
    """The text tower of a JSON config, with random weights; `hf` as of `hf_values`."""
    config = copy.deepcopy(model["text_cfg"])
    with _readable(name):
        if hf is not None:
            return HfText(hf, towers.CLIPTextCfg(**config), model["embed_dim"])
        return towers._build_text_tower(model["embed_dim"], config, model.get("quick_gelu", False))


def load_whole(source: Source, path: Path) -> Whole:
    """A model with the weights of a checkpoint, which open_clip converts and resizes."""
    whole = Whole(source)
    try:
        open_clip.load_checkpoint(whole, str(path), weights_only=True)
    except Exception as error:  # open_clip fails on a checkpoint that is damaged, or another's, in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the weights in {path} do not fit {source.name}: {reason}") from error
    return whole


def _read(file: Path, preprocess: dict[str, Any]) -> dict[str, Any]:
    """The model of a config file, whose preprocessing goes into `preprocess`."""
    if not file.is_file():
        raise UserError(f"there is no open_clip config {str(file)!r}; a folder of one holds {CONFIG}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    content = content if isinstance(content, dict) else {}
    given = content.get("preprocess_cfg") or {}
    preprocess |= {key: value for key, value in given.items() if value is not None}
    model: dict[str, Any] = content.get("model_cfg", content)
    return model


def _timm_config(name: str, of: str, folder: Path | None) -> dict[str, Any] | None:
    """What timm reads where an image tower's `name` leads to a folder or a hub, for a config.json; None where it does
    not. `folder`: the model's own, looked into first."""
    with _readable(of):
        kind, target = parse_model_name(name)
    if kind is None:
        return None
    place = _described(target, folder, lambda content: timm.is_model(str(content.get("architecture"))))
    if place is not None:
        published, network, arguments = load_model_config_from_path(place)
    elif kind == "local-dir":
        raise _missing("image", target, of)
    else:
        with from_hub(f"the image tower {name} of {of}"):
            published, network, arguments = load_model_config_from_hf(target)
    kept = {key: value for key, value in published.items() if key not in PLACES}
    return {"architecture": network, "model_args": arguments, "pretrained_cfg": kept}


def _described(name: str, folder: Path | None, fits: Callable[[dict[str, Any]], bool]) -> Path | None:
    """Where the config.json lies that a tower's `name` leads to: in the folder of that name inside the model's own,
    in that of that path, or in the model's own, which has moved since; None where there is none that `fits`."""
    path = Path(name).expanduser()
    for place in (path,) if folder is None else (folder / path, path, folder):
        try:
            content = json.loads((place / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and fits(content):
            return place
    return None


def _missing(tower: str, place: str, name: str) -> UserError:
    return UserError(
        f"there is no {place}/config.json that describes the {tower} tower of {name}: put that folder back, or that "
        f"file beside {CONFIG}"
    )


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


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Around the building of a tower from a user's JSON: what open_clip does not know is named."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the config of {name} is not one that open_clip reads: {error}") from error
