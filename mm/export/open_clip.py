"""A folder that open_clip opens as `local-dir:/PATH`, or from a hub as `hf-hub:OWNER/NAME`.

open_clip_config.json         architecture and preprocessing
open_clip_model.safetensors   weights
config.json                   what open_clip has transformers or timm read: the text tower, arguments of the image tower
tokenizer.json ...            the tokenizer, where open_clip does not bring it
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from mm.encoders.image import ImageEncoder, TimmEncoder
from mm.encoders.open_clip import OpenClipImageEncoder, OpenClipTextEncoder
from mm.encoders.open_clip_source import HfText
from mm.encoders.text import BertEncoder
from mm.errors import UserError
from mm.export import ExportConfig, timm
from mm.export.bert import POOLERS, known, on_hub
from mm.export.card import left_out, write_card
from mm.export.compare import Opened, compare, readable
from mm.export.folder import new_folder, save_weights, weights_of
from mm.export.projection import after, matrix
from mm.log import message
from mm.models.folder import Model
from mm.models.two_tower import TwoTower
from mm.progress import Wait

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
HF_POINTER = {"hf_model_name": "{place}", "hf_tokenizer_name": "{place}"}
FAMILIES = ("bert", "roberta", "xlm-roberta")  # of which open_clip knows how wide they are


class Part(NamedTuple):
    """A tower in open_clip's terms."""

    config: dict[str, Any]
    """Its vision_cfg or text_cfg."""
    state: dict[str, Tensor]
    quick_gelu: bool | None = None
    """None where the tower does not ask for it."""
    described: dict[str, Any] = {}
    """What it needs in config.json."""
    pointer: dict[str, str] = {}
    """Keys of `config` that say where config.json is, with {} in its place."""

    def at(self, place: str) -> dict[str, Any]:
        """`config` with config.json in `place`, a folder or a hub's repository."""
        source = "local-dir" if Path(place).is_absolute() else "hf-hub"
        return {
            **self.config,
            **{key: text.format(place=place, source=source) for key, text in self.pointer.items()},
        }


def export_open_clip(model: Model, config: ExportConfig) -> None:
    """Write `config.out`, and print how near it is.

    Raises UserError for towers that open_clip has no form of.
    """
    towers = model.towers
    image, text = image_part(towers), text_part(towers)
    acts = {part.quick_gelu for part in (image, text)} - {None}
    if len(acts) > 1:
        raise UserError("open_clip has one quick_gelu for both towers, and here they differ; use format=onnx")
    with torch.no_grad():
        output = towers()
    settings: dict[str, Any] = {
        "embed_dim": towers.dim,
        "custom_text": True,
        "quick_gelu": acts.pop() if acts else False,
        "init_logit_scale": float(output.scale.log()),
    }
    state = {f"visual.{name}": value for name, value in image.state.items()}
    state |= {f"text.{name}": value for name, value in text.state.items()}
    state["logit_scale"] = output.scale.log().squeeze()
    if output.bias is not None:
        settings["init_logit_bias"] = float(output.bias)
        state["logit_bias"] = output.bias.squeeze()
    place = config.repo or str(config.out.expanduser().resolve())
    with new_folder(config.out) as folder:
        save_weights(folder / WEIGHTS, state)
        content = {
            "model_cfg": {**settings, "vision_cfg": image.at(place), "text_cfg": text.at(place)},
            "preprocess_cfg": _preprocessing(towers.image),
        }
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if image.described or text.described:
            described = json.dumps({**image.described, **text.described}, indent=2)
            (folder / "config.json").write_text(described + "\n", encoding="utf-8")
        towers.text.tokenizer.save(folder)
        with Wait("opened with open_clip and compared"), readable("open_clip"):
            difference = compare(towers, _opened(folder, image.at(str(folder)), text.at(str(folder))))
        pointers = [*image.pointer, *text.pointer]
        write_card(
            folder, model, config, library="open_clip", usage=_usage(config, pointers), difference=difference
        )
    message(f"{config.out}: a model of open_clip, embeddings equal to {difference:.1g}")
    for line in left_out(model):
        message(line)
    if pointers and not config.repo:
        message(
            f"{CONFIG} names the folder {place} ({', '.join(pointers)}): change that when it moves, or export again "
            "with repo=OWNER/NAME for a hub"
        )


def image_part(towers: TwoTower) -> Part:
    """The image tower with its projection."""
    encoder, projection = towers.image, towers.image_projection
    state = weights_of(encoder.trunk)
    if isinstance(encoder, TimmEncoder):
        return _timm(encoder, projection, state)
    if not isinstance(encoder, OpenClipImageEncoder):
        raise UserError(
            f"open_clip has no form of the image tower {encoder.spec['name']}; use format=transformers"
        )
    config = {**copy.deepcopy(encoder.spec["model"]["vision_cfg"]), "image_size": encoder.size[0]}
    trunk = encoder.trunk
    if isinstance(trunk, TimmModel):
        return _timm_model(encoder, trunk, projection, config, state)
    if isinstance(trunk, ModifiedResNet):
        _fold(state, "attnpool.c_proj", projection)
    else:
        state["proj"] = after(projection, state["proj"].T, "open_clip").T
    return Part(config, state, encoder.spec["model"].get("quick_gelu", False))


def text_part(towers: TwoTower) -> Part:
    """The text tower with its projection."""
    encoder, projection = towers.text, towers.text_projection
    if isinstance(encoder, BertEncoder):
        return _bert(encoder, projection)
    if not isinstance(encoder, OpenClipTextEncoder):
        raise UserError(
            f"open_clip has no form of the text tower {encoder.spec['name']}; use format=transformers"
        )
    config = copy.deepcopy(encoder.spec["model"]["text_cfg"])
    state = weights_of(encoder.trunk)
    if isinstance(encoder.trunk, HfText):
        return _hf_text(encoder, projection, config, state)
    if encoder.trimmable and not config.get("hf_tokenizer_name"):
        config["context_length"] = encoder.spec["context_length"]
        state["positional_embedding"] = state["positional_embedding"][: config["context_length"]]
    own = encoder.trunk.text_projection
    if own is None and not isinstance(projection, nn.Identity):
        config["proj_type"] = "linear"
        state["text_projection"] = matrix(projection, encoder.width, "open_clip").T
    elif isinstance(own, nn.Linear):
        _fold(state, "text_projection", projection)
    elif own is not None:
        state["text_projection"] = after(projection, state["text_projection"].T, "open_clip").T
    return Part(config, state, encoder.spec["model"].get("quick_gelu", False))


def _timm(encoder: TimmEncoder, projection: nn.Module, state: dict[str, Tensor]) -> Part:
    name, trunk = encoder.spec["name"], encoder.trunk
    config = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_proj_bias": False,
        "timm_drop_path": encoder.spec["drop_path"],
        "image_size": encoder.size[0],
    }
    state = {f"trunk.{key}": value for key, value in state.items()}
    if trunk.num_features != encoder.width:
        # open_clip takes these networks to be as wide as before their last layers: their classifier is the projection
        weight = matrix(projection, encoder.width, "open_clip")
        classifier = trunk.default_cfg["classifier"]  # type: ignore[index]
        config |= {"timm_proj": "", "timm_pool": trunk.global_pool.pool_type}  # type: ignore[union-attr]
        state |= {f"trunk.{classifier}.weight": weight, f"trunk.{classifier}.bias": torch.zeros(len(weight))}
    else:
        state["head.proj.weight"] = matrix(projection, encoder.width, "open_clip")
    return _with_arguments(name, timm.arguments(encoder), config, state)


def _timm_model(
    encoder: OpenClipImageEncoder,
    trunk: TimmModel,
    projection: nn.Module,
    config: dict[str, Any],
    state: dict[str, Tensor],
) -> Part:
    name = config["timm_model_name"]
    layers = [f"head.{key}" for key, module in trunk.head.named_modules() if isinstance(module, nn.Linear)]
    if not layers and config.get("timm_proj", "linear") == "":
        layers = [f"trunk.{trunk.trunk.default_cfg['classifier']}"]
    if layers:
        _fold(state, layers[-1], projection)
    elif not isinstance(projection, nn.Identity):
        config["timm_proj"] = "linear"
        state["head.proj.weight"] = matrix(projection, encoder.width, "open_clip")
    network: Any = trunk.trunk
    resized = hasattr(network, "set_input_size") and encoder.size[0] != network.default_cfg["input_size"][-1]
    if resized or ":" in name:  # the name may lead to a folder or a hub
        name = network.pretrained_cfg["architecture"]
        return _with_arguments(name, timm.arguments_of(network), config, state)
    return Part(config, state)


def _with_arguments(
    name: str, given: dict[str, Any], config: dict[str, Any], state: dict[str, Tensor]
) -> Part:
    """open_clip hands timm a name alone: one that leads to config.json, where the network needs arguments."""
    if not given:
        return Part(config, state)
    pointer = {"timm_model_name": "{source}:{place}"}
    return Part(config, state, described=timm.description(name, given), pointer=pointer)


def _bert(encoder: BertEncoder, projection: nn.Module) -> Part:
    bert = known(encoder)
    family = bert.config["model_type"]
    if family not in FAMILIES:
        raise UserError(f"open_clip knows no text tower of the family {family}; use format=onnx")
    padding = encoder.tokenizer.pad_id  # which open_clip masks by its number
    if family != "bert" and bert.config["pad_token_id"] != padding:
        raise UserError(
            f"open_clip masks the pad_token_id {bert.config['pad_token_id']} of the network, and the tokenizer of "
            f"{encoder.spec['name']} pads with {padding}; use format=transformers"
        )
    network = {**bert.config, "pad_token_id": padding}
    config = {
        "context_length": encoder.spec["context_length"],
        "vocab_size": bert.config["vocab_size"],
        "hf_model_pretrained": False,
        "hf_pooler_type": POOLERS[encoder.pooling],
        "hf_proj_type": "linear",
    }
    state = {f"transformer.{name}": value for name, value in bert.state.items()}
    state["proj.weight"] = matrix(projection, encoder.width, "open_clip")
    name = encoder.spec["name"]
    if on_hub(name, network):
        return Part({**config, "hf_model_name": name, "hf_tokenizer_name": name}, state)
    return Part(config, state, described=network, pointer=HF_POINTER)


def _hf_text(
    encoder: OpenClipTextEncoder, projection: nn.Module, config: dict[str, Any], state: dict[str, Tensor]
) -> Part:
    """A text tower that open_clip had from transformers before."""
    layers = [name.removesuffix(".weight") for name in state if name.startswith("proj.")]
    if layers:
        _fold(state, layers[-1], projection)
    elif not isinstance(projection, nn.Identity):
        config["hf_proj_type"] = "linear"
        state["proj.weight"] = matrix(projection, encoder.width, "open_clip")
    config["context_length"] = encoder.spec["context_length"]
    return Part(config, state, described=encoder.spec["hf"], pointer=HF_POINTER)


def _fold(state: dict[str, Tensor], layer: str, projection: nn.Module) -> None:
    """Put the projection into the linear layer before it."""
    state[f"{layer}.weight"] = after(projection, state[f"{layer}.weight"], "open_clip")
    if f"{layer}.bias" in state:
        state[f"{layer}.bias"] = after(projection, state[f"{layer}.bias"].unsqueeze(1), "open_clip").squeeze(
            1
        )


def _preprocessing(encoder: ImageEncoder) -> dict[str, Any]:
    spec = encoder.spec
    if spec["interpolation"] == "nearest":
        message(
            "open_clip has no nearest interpolation: it will resize images bicubic, so give it images of the size"
        )
    return {
        "size": spec["size"],
        "mean": spec["mean"],
        "std": spec["std"],
        "interpolation": "bicubic" if spec["interpolation"] == "nearest" else spec["interpolation"],
        "resize_mode": spec["resize_mode"],
    }


def _opened(folder: Path, vision: dict[str, Any], text: dict[str, Any]) -> Opened:
    """The folder as open_clip opens it, while what it looks up by its name is still here."""
    name = f"local-dir:{folder}"
    network = open_clip.create_model(name, vision_cfg=vision, text_cfg=text).eval()
    tokenizer = open_clip.get_tokenizer(name)
    preprocessing = PreprocessCfg(**network.visual.preprocess_cfg)
    bias = getattr(network, "logit_bias", None)
    return Opened(
        image=lambda pixels: network.encode_image(pixels, normalize=True),
        text=lambda texts: network.encode_text(tokenizer(texts), normalize=True),
        mean=torch.tensor(preprocessing.mean),
        std=torch.tensor(preprocessing.std),
        scale=float(network.logit_scale.detach().exp()),
        bias=None if bias is None else float(bias.detach()),
    )


def _usage(config: ExportConfig, pointers: list[str]) -> str:
    name = f"hf-hub:{config.repo}" if config.repo else "local-dir:PATH/OF/THIS/FOLDER"
    moved = (
        f"\n`{'` and `'.join(pointers)}` in `{CONFIG}` name the folder in which this was written. Once the folder has "
        "moved, change them to its new path; on a hub, to OWNER/NAME.\n"
        if pointers and not config.repo
        else ""
    )
    return f"""```python
import open_clip

name = "{name}"
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
model.eval()
image = model.encode_image(preprocess(picture).unsqueeze(0), normalize=True)  # picture: a PIL image
text = model.encode_text(tokenizer(["a photo of a cat"]), normalize=True)
```
{moved}"""
