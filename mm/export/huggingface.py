"""A folder that transformers opens with `from_pretrained`: a CLIPModel, for other towers a VisionTextDualEncoderModel.

config.json, model.safetensors   the model
processor_config.json            how images are read
tokenizer.json ...               the tokenizer
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from mm.encoders.hf import quiet_transformers
from mm.encoders.image import TimmEncoder
from mm.encoders.open_clip import OpenClipImageEncoder, OpenClipTextEncoder
from mm.encoders.open_clip_source import HfText
from mm.encoders.text import BertEncoder, TextEncoder
from mm.encoders.tower import Tower
from mm.encoders.transformers_clip import TransformersImageEncoder, TransformersTextEncoder
from mm.encoders.transformers_source import FAMILIES
from mm.errors import UserError
from mm.export import ExportConfig, clip, timm
from mm.export.bert import POOLERS, Bert, known, through_pooler
from mm.export.card import left_out, write_card
from mm.export.compare import Opened, compare, readable
from mm.export.folder import new_folder, weights_of
from mm.export.projection import after, matrix
from mm.log import message
from mm.models.folder import Model
from mm.models.two_tower import TwoTower, TwoTowerOutput
from mm.progress import Wait

RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # PIL's numbers
DUAL = "vision-text-dual-encoder"
PROCESSORS = {
    "clip": "CLIPProcessor",
    "metaclip_2": "CLIPProcessor",
    "siglip": "SiglipProcessor",
    "chinese_clip": "ChineseCLIPProcessor",
    DUAL: "VisionTextDualEncoderProcessor",
}


class Part(NamedTuple):
    """A tower in transformers' terms."""

    config: dict[str, Any]
    """With model_type."""
    state: dict[str, Tensor]
    projection: Tensor | None
    """(D, W); None where the network ends in the common space itself."""


def export_transformers(model: Model, config: ExportConfig) -> None:
    """Write `config.out`, and print how near it is.

    Raises UserError for towers that transformers has no form of.
    """
    towers = model.towers
    with torch.no_grad():
        output = towers()
    image, text = image_part(towers), text_part(towers)
    family = _family(towers, image, text)
    with new_folder(config.out) as folder, quiet_transformers():
        with Wait("opened with transformers and compared"), readable("transformers"):
            network = _network(family, image, text, towers.dim, output)
            network.save_pretrained(folder)
            _processor(family, towers).save_pretrained(folder)
            padding = "max_length" if _reads_padding(towers.text) else True
            difference = compare(towers, _opened(folder, padding))
        name = type(network).__name__
        bias = None if hasattr(network, "logit_bias") else output.bias
        usage = _usage(name, family, padding, bias)
        write_card(folder, model, config, library="transformers", usage=usage, difference=difference)
    message(f"{config.out}: a {name} of transformers, embeddings equal to {difference:.1g}")
    for line in left_out(model):
        message(line)
    if bias is not None:
        message(
            f"left out: the bias {float(bias):.4g} of the scaled cosines, for which a {name} has no place"
        )


def image_part(towers: TwoTower) -> Part:
    """The image tower with its projection."""
    encoder, projection = towers.image, towers.image_projection
    if isinstance(encoder, TransformersImageEncoder):
        return _same(encoder, projection, "vision_model.", "visual_projection.weight")
    if isinstance(encoder, TimmEncoder):
        weights = weights_of(encoder.trunk)
        given, last = timm.arguments(encoder), matrix(projection, encoder.width, "transformers")
        return _timm(encoder.spec["name"], given, weights, last)
    if isinstance(encoder, OpenClipImageEncoder) and clip.is_plain(encoder):
        state, own = clip.renamed(encoder)
        return Part(clip.image_config(encoder), state, after(projection, own, "transformers"))
    if isinstance(encoder, OpenClipImageEncoder) and isinstance(encoder.trunk, TimmModel):
        return _timm_model(encoder, projection)
    raise UserError(
        f"transformers has no form of the image tower {encoder.spec['name']}: of open_clip's it knows plain ViTs with a "
        "class token, and timm networks with a linear projection; use format=open_clip"
    )


def text_part(towers: TwoTower) -> Part:
    """The text tower with its projection."""
    encoder, projection = towers.text, towers.text_projection
    if isinstance(encoder, TransformersTextEncoder):
        return _same(encoder, projection, "text_model.", "text_projection.weight")
    if isinstance(encoder, BertEncoder):
        bert = through_pooler(known(encoder), encoder.pooling)
        return Part(bert.config, bert.state, matrix(projection, encoder.width, "transformers") * bert.gain)
    if isinstance(encoder, OpenClipTextEncoder) and isinstance(encoder.trunk, HfText):
        return _hf_text(encoder, projection)
    if isinstance(encoder, OpenClipTextEncoder) and clip.is_plain(encoder):
        state, own = clip.renamed(encoder)
        return Part(clip.text_config(encoder), state, after(projection, own, "transformers"))
    raise UserError(
        f"transformers has no form of the text tower {encoder.spec['name']}: of open_clip's it knows causal ones that "
        "read the end of the text; use format=open_clip"
    )


def _same(encoder: Tower, projection: nn.Module, prefix: str, last: str) -> Part:
    """A tower that came from transformers."""
    spec: Any = encoder.spec
    state = weights_of(encoder.trunk)
    own = state.pop(last, None)
    inner = {name.removeprefix(prefix): value for name, value in state.items()}
    if own is not None:
        return Part(spec["hf"], inner, after(projection, own, "transformers"))
    if not isinstance(projection, nn.Identity):
        raise UserError(
            f"transformers has no place for a projection after {spec['name']}; use format=onnx, or train with "
            "projection: none"
        )
    return Part(spec["hf"], inner, None)


def _hf_text(encoder: OpenClipTextEncoder, projection: nn.Module) -> Part:
    """A text tower that open_clip had from transformers, with a linear projection or none."""
    pooler = encoder.spec["model"]["text_cfg"].get("hf_pooler_type")
    weights = weights_of(encoder.trunk)
    own = weights.pop("proj.weight", torch.eye(encoder.width))
    pooling = {theirs: ours for ours, theirs in POOLERS.items()}.get(pooler)
    if pooling is None or any(not name.startswith("transformer.") for name in weights):
        raise UserError(
            f"transformers has no form of the text tower {encoder.spec['name']}, its {pooler} and its projection; use "
            "format=open_clip"
        )
    inner = {name.removeprefix("transformer."): value for name, value in weights.items()}
    bert = through_pooler(Bert(encoder.spec["hf"], inner), pooling)
    return Part(bert.config, bert.state, after(projection, own, "transformers") * bert.gain)


def _timm(name: str, given: dict[str, Any], weights: dict[str, Tensor], projection: Tensor) -> Part:
    config = {
        "model_type": "timm_wrapper",
        "architecture": timm.architecture(name),
        "model_args": given,
        "hidden_size": projection.shape[1],
    }
    return Part(config, {f"timm_model.{key}": value for key, value in weights.items()}, projection)


def _timm_model(encoder: OpenClipImageEncoder, projection: nn.Module) -> Part:
    """open_clip's timm network with its own linear projection, or none."""
    vision = encoder.spec["model"]["vision_cfg"]
    weights = weights_of(encoder.trunk)
    own = weights.pop("head.proj.weight", torch.eye(encoder.width))
    if any(not name.startswith("trunk.") for name in weights) or vision.get("timm_proj", "linear") == "":
        raise UserError(
            f"transformers has no form of the image tower {encoder.spec['name']}: its projection is not linear, or has "
            "a bias; use format=open_clip"
        )
    network: Any = encoder.trunk.trunk
    inner = {name.removeprefix("trunk."): value for name, value in weights.items()}
    name = network.pretrained_cfg["architecture"]
    given = timm.arguments_of(network)
    return _timm(name, given, inner, after(projection, own, "transformers"))


def _family(towers: TwoTower, image: Part, text: Part) -> str:
    """The model_type of the whole. UserError for two towers that no one class holds."""
    ours = [tower.spec["family"] for tower in (towers.image, towers.text) if "family" in tower.spec]
    if len(ours) == 2 and ours[0] == ours[1]:
        return str(ours[0])
    kinds = image.config["model_type"], text.config["model_type"]
    if kinds == ("clip_vision_model", "clip_text_model"):
        return "clip"
    if isinstance(towers.text, TransformersTextEncoder) and FAMILIES[towers.text.spec["family"]].first_token:
        raise UserError(
            f"transformers pairs the text tower {towers.text.spec['name']} with its own image tower alone"
        )
    return DUAL


def _network(family: str, image: Part, text: Part, dim: int, output: TwoTowerOutput) -> Any:
    """The model with its weights."""
    from transformers import AutoConfig, AutoModel

    scale = output.scale.log()
    vision, words = (
        {**part.config, **({"projection_dim": dim} if "projection_dim" in part.config else {})}
        for part in (image, text)
    )
    shared = {"projection_dim": dim, "logit_scale_init_value": float(scale)}
    config = AutoConfig.for_model(family, vision_config=vision, text_config=words, **shared)
    network = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    own = network.state_dict()
    state = {f"vision_model.{name}": value for name, value in image.state.items()}
    state |= {f"text_model.{name}": value for name, value in text.state.items()}
    for name, part in (("visual_projection.weight", image), ("text_projection.weight", text)):
        if name in own:
            state[name] = torch.eye(dim) if part.projection is None else part.projection
    state["logit_scale"] = scale.reshape(own["logit_scale"].shape)
    if "logit_bias" in own and output.bias is not None:
        state["logit_bias"] = output.bias.reshape(own["logit_bias"].shape)
    network.load_state_dict(state)
    return network


def _processor(family: str, towers: TwoTower) -> Any:
    import transformers

    spec, side = towers.image.spec, towers.image.size[0]
    size = {
        "shortest": {"shortest_edge": side},
        "longest": {"max_height": side, "max_width": side},
        "squash": {"height": side, "width": side},
    }
    images = transformers.CLIPImageProcessor(
        size=size[spec["resize_mode"]],
        crop_size={"height": side, "width": side},
        resample=RESAMPLE[spec["interpolation"]],
        image_mean=spec["mean"],
        image_std=spec["std"],
    )
    return getattr(transformers, PROCESSORS[family])(images, _tokenizer(towers.text))


def _reads_padding(encoder: TextEncoder) -> bool:
    return isinstance(encoder, TransformersTextEncoder) and encoder.reads == "all"


def _tokenizer(encoder: TextEncoder) -> Any:
    length = encoder.spec["context_length"]
    if isinstance(encoder, OpenClipTextEncoder):
        backend = encoder.tokenizer.backend
        words = getattr(backend, "tokenizer", None) or clip.tokenizer(backend, length)
    else:
        words = encoder.tokenizer.hf
    words = copy.deepcopy(words)
    words.model_max_length = length
    if _reads_padding(encoder):
        # no mask; what is saved are the attributes that have a name in init_kwargs
        words.model_input_names = words.init_kwargs["model_input_names"] = ["input_ids"]
    return words


def _opened(folder: Path, padding: str | bool) -> Opened:
    """The folder as transformers opens it."""
    from transformers import AutoModel, AutoProcessor

    network = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    side = processor.image_processor.crop_size["height"]

    def words(texts: list[str]) -> Any:
        return processor.tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")

    return Opened(
        image=lambda pixels: network(pixel_values=pixels, **words(["a"])).image_embeds,
        text=lambda texts: network(pixel_values=torch.zeros(1, 3, side, side), **words(texts)).text_embeds,
        mean=torch.tensor(processor.image_processor.image_mean),
        std=torch.tensor(processor.image_processor.image_std),
        scale=float(network.logit_scale.detach().exp()),
        bias=float(network.logit_bias.detach()) if hasattr(network, "logit_bias") else None,
    )


def _usage(name: str, family: str, padding: str | bool, bias: Tensor | None) -> str:
    text = f"""```python
import torch
from transformers import AutoProcessor, {name}

model = {name}.from_pretrained("PATH/OF/THIS/FOLDER")
processor = AutoProcessor.from_pretrained("PATH/OF/THIS/FOLDER")
inputs = processor(  # picture: a PIL image
    text=["a photo of a cat"], images=[picture], padding={padding!r}, truncation=True, return_tensors="pt"
)
with torch.no_grad():
    output = model(**inputs)
output.image_embeds, output.text_embeds, output.logits_per_image  # unit rows, and scaled cosines
```
"""
    if family == DUAL:
        text += "\nCompute in float32 or bfloat16: the pooling of the text tower needs more range than float16 has.\n"
    if bias is not None:
        text += (
            f"\nThe model was trained with a bias, {float(bias):.6g}, which {name} has no place for: add it to "
            "`logits_per_image`.\n"
        )
    return text
