"""What a name stands for among transformers' dual encoders: its kind, weights, preprocessing and tokenizer."""

import difflib
import json
import math
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Regex, normalizers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedTokenizerFast
from transformers.utils import cached_file

from mm.encoders.hf import attention_of, network_class, quiet_transformers
from mm.encoders.image import TRANSFORMERS
from mm.encoders.tokenizer import hf_tokenizer
from mm.encoders.weights import from_hub, model_folder
from mm.errors import UserError


class Family(NamedTuple):
    """How a dual encoder of one model_type is made."""

    vision: str
    """transformers' class of its image tower"""
    text: str
    """and of its text tower"""
    projected: bool = True
    """Its towers are followed by projections without bias."""
    text_reads: str = "real"
    """real: tokens see the real ones among them, by a mask; before: those before them; all: all, padding too."""
    first_token: bool = False
    """The text's vector is its first token, not what the network pools."""


FAMILIES = {
    "clip": Family("CLIPVisionModel", "CLIPTextModel", text_reads="before"),
    "metaclip_2": Family("MetaClip2VisionModel", "MetaClip2TextModel", text_reads="before"),
    "siglip": Family("SiglipVisionModel", "SiglipTextModel", projected=False, text_reads="all"),
    "chinese_clip": Family("ChineseCLIPVisionModel", "ChineseCLIPTextModel", first_token=True),
    "vision-text-dual-encoder": Family("AutoModel", "AutoModel"),
}
TIMM = "timm_wrapper"
# for "did you mean": the hub cannot be listed
KNOWN = (
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "facebook/metaclip-2-worldwide-huge-quickgelu",
    "google/siglip-base-patch16-224",
    "google/siglip-large-patch16-256",
    "google/siglip-so400m-patch14-384",
    "google/siglip2-base-patch16-224",
    "google/siglip2-large-patch16-256",
    "google/siglip2-so400m-patch14-384",
    "OFA-Sys/chinese-clip-vit-base-patch16",
    "clip-italian/clip-italian",
)
INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
PIL_NAMES = tuple(INTERPOLATIONS.values())
LABELS = ("id2label", "label2id", "label_names", "_name_or_path")  # of a config: of no use to a tower


class Source:
    """The folder or hub name that `transformers:` leads to. UserError where it holds no dual encoder."""

    def __init__(self, name: str) -> None:
        self.name = name
        target = model_folder(name.removeprefix(TRANSFORMERS))
        folder = Path(target).expanduser()
        self.folder = folder if folder.is_dir() else None
        self.path = str(folder) if self.folder else target
        if not target or (not self.folder and (target.startswith(("/", ".", "~")) or target.count("/") > 1)):
            raise UserError(f"there is no folder {target!r}; {TRANSFORMERS} takes a folder or a hub's name")
        try:
            with self._reading("the config.json"):
                self.config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except UserError as error:
            close = [] if target in KNOWN else difflib.get_close_matches(target, KNOWN, n=3)
            hint = f"did you mean {' or '.join(close)}? " if close and not self.folder else ""
            raise UserError(f"{hint}{error}") from error
        kind = self.config.model_type
        if kind == "siglip2":
            raise UserError(
                f"{name} reads images as patches of any aspect ratio (NaFlex), and mm's are squares; use a SigLIP 2 of "
                "one size, such as transformers:google/siglip2-base-patch16-224"
            )
        if kind not in FAMILIES:
            raise UserError(f"{name} is a {kind}, no dual encoder that can be read: {', '.join(FAMILIES)}")
        if self.config.vision_config.model_type == TIMM:
            check_timm(self.config.vision_config.architecture)
        # a name from a file could be that of code on a hub
        self.config._attn_implementation = None
        self.family = FAMILIES[kind]

    def whole(self) -> Any:
        """The model with its weights, in float32 on the CPU."""
        with self._reading("the weights"):
            model, info = AutoModel.from_pretrained(
                self.path,
                config=self.config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"the weights of {self.name} lack {len(missing)} tensors, such as {', '.join(missing[:3])}"
            )
        return model

    def values(self, tower: str) -> dict[str, Any]:
        """The config of the tower `vision` or `text`, as JSON values."""
        config = getattr(self.config, f"{tower}_config")
        values = json.loads(config.to_json_string(use_diff=False))
        return {key: value for key, value in values.items() if key not in LABELS}

    def preprocessing(self) -> dict[str, Any]:
        """Size, mean, std, interpolation and resize_mode: the image processor's, or timm's where that is the tower.

        What mm has no word for becomes the nearest: a border that is cut off after resizing stays, lanczos is bicubic.
        Where a centre crop leaves an odd number of pixels, transformers' begins one before torchvision's.
        """
        files = ("preprocessor_config.json", "processor_config.json")
        if self.folder and not any((self.folder / file).is_file() for file in files):
            published = getattr(self.config.vision_config, "pretrained_cfg", None)
            if not published:
                raise UserError(f"{self.name} holds no {files[0]}, which says how its images are scaled")
            return _of_timm(published)
        with self._reading(f"the {files[0]}"):
            processor = AutoImageProcessor.from_pretrained(self.path, trust_remote_code=False)
            return _of_processor(processor, self.name)

    def words(self) -> Any:
        """The fast tokenizer. UserError where there is none."""
        with self._reading("the tokenizer"):
            try:
                return hf_tokenizer(self.path)
            except (ImportError, UserError) as error:
                # SigLIP's own class reads SentencePiece in Python; tokenizer.json is the same in Rust
                if (
                    cached_file(self.path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
                    is None
                ):
                    raise UserError(
                        f"the tokenizer of {self.name} has no fast form, and no others are read: "
                        "its folder needs a tokenizer.json"
                    ) from error
                words = PreTrainedTokenizerFast.from_pretrained(self.path)
                if self.config.model_type == "siglip":
                    canonicalise(words)
                return words

    def attention(self, given: str | None) -> str:
        """The attention code of the text tower, as of `attention_of`."""
        return attention_of(_class(self.family, "text", self.config.text_config, self.name), given, self.name)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Around a read of the folder or the hub: whatever fails becomes a UserError that says what and why."""
        try:
            if self.folder:
                with quiet_transformers():
                    yield
            else:
                with from_hub(f"{what} of {self.name}"), quiet_transformers():
                    yield
        except UserError:
            raise
        except Exception as error:  # transformers checks files in many ways
            reason = next(iter(str(error).strip().splitlines()), "no reason given")
            raise UserError(
                f"{what} of {self.name} cannot be read: {type(error).__name__}: {reason}"
            ) from error


def random_network(spec: dict[str, Any], tower: str) -> nn.Module:
    """The network of the tower `vision` or `text` that a spec describes, with random weights: needs no file."""
    family = FAMILIES[spec["family"]]
    values = dict(spec["hf"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    if config.model_type == TIMM:
        check_timm(config.architecture)
    kind = _class(family, tower, config, spec["name"])
    config._attn_implementation = (
        attention_of(kind, spec["attention"], spec["name"]) if "attention" in spec else None
    )
    if family.text == "AutoModel":
        network: nn.Module = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        return network
    pooler = {"add_pooling_layer": False} if tower == "text" and family.first_token else {}
    network = kind(config, **pooler)
    return network


def _class(family: Family, tower: str, config: Any, name: str) -> Any:
    """transformers' class of the tower `vision` or `text`."""
    kind = family.vision if tower == "vision" else family.text
    return network_class(config, name) if kind == "AutoModel" else getattr(transformers, kind)


def canonicalise(words: Any) -> None:
    """Let a fast tokenizer begin as SigLIP's slow one does in Python: no capitals, no punctuation, single spaces."""
    steps = [
        *([normalizers.Lowercase()] if words.init_kwargs.get("do_lower_case", True) else []),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    own = words.backend_tokenizer.normalizer
    words.backend_tokenizer.normalizer = normalizers.Sequence([*steps, *([] if own is None else [own])])


def check_timm(architecture: str) -> None:
    """Raises UserError for what is no network of timm: hubs and folders are not looked into."""
    import timm

    if not timm.is_model(architecture):
        close = ", ".join(difflib.get_close_matches(architecture.split(".")[0], timm.list_models(), n=4))
        raise UserError(f"there is no image model {architecture!r}; closest: {close or 'none'}")


def is_dual_encoder(folder: Path) -> bool:
    """True for a folder with the config.json of a model that has an image and a text tower."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"vision_config", "text_config"} <= values.keys()


def _of_timm(published: dict[str, Any]) -> dict[str, Any]:
    from timm.data import resolve_data_config

    found = resolve_data_config(published, verbose=False)
    return {
        "size": found["input_size"][-1],
        "mean": list(found["mean"]),
        "std": list(found["std"]),
        "interpolation": found["interpolation"] if found["interpolation"] in PIL_NAMES else "bicubic",
        "resize_mode": "squash" if found["crop_mode"] == "squash" else "shortest",
    }


def _of_processor(processor: Any, name: str) -> dict[str, Any]:
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    sides = [(box.height, box.width) for box in (crop, processor.size) if box and box.height]
    short, long = processor.size.shortest_edge, processor.size.longest_edge
    height, width = sides[0] if sides else (short or long,) * 2
    if height is None or height != width:
        raise UserError(f"{name} reads images of {height} x {width} pixels, and mm's are squares")
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    factor = 1 if math.isclose(factor, 1) else factor  # so that the usual mean stays as it is
    mean, std = (
        (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    )
    return {
        "size": height,
        "mean": [value / factor for value in mean],
        "std": [value / factor for value in std],
        "interpolation": INTERPOLATIONS.get(processor.resample, "bicubic"),
        "resize_mode": "squash" if processor.size.height else "shortest" if short else "longest",
    }
