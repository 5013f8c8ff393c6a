"""BERT towers as other tools know them: as one of the families they read, and pooled as they pool."""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.encoders.text import PRESETS, BertEncoder
from mm.encoders.weights import PACKAGE
from mm.errors import UserError
from mm.export.folder import weights_of

# equal networks under other names
FAMILIES = {"camembert": "roberta", "distilbert": "bert"}
LAYERED = ("bert", "roberta", "xlm-roberta")  # encoder.layer.N, post-LayerNorm, attention by content alone
POOLERS = {
    "mean": "mean_pooler",
    "cls": "cls_last_hidden_state_pooler",
    "pooler": "cls_pooler",
}  # open_clip's names
EPSILON = 2.0**-16  # tanh(x) = x to 2e-9 of what passes a pooler, |x| < 32 EPSILON
DISTILBERT = {
    "transformer.layer.": "encoder.layer.",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


class Bert(NamedTuple):
    """A network of transformers."""

    config: dict[str, Any]
    """With model_type."""
    state: dict[str, Tensor]
    gain: float = 1.0
    """What the projection after the pooler must be multiplied by."""


def known(encoder: BertEncoder) -> Bert:
    """The network of a tower, as the family that other tools read it as."""
    trunk: Any = encoder.trunk
    config = {**trunk.config.to_dict(), "dtype": "float32"}
    for key in ("_name_or_path", "architectures", "transformers_version"):
        config.pop(key, None)
    state = weights_of(trunk)
    family = config["model_type"]
    if family == "distilbert":
        return _from_distilbert(config, state)
    return Bert({**config, "model_type": FAMILIES.get(family, family)}, state)


def on_hub(name: str, config: dict[str, Any]) -> bool:
    """Whether a hub's `name`, of which this machine has the config, is the same network; asks no network."""
    from transformers import AutoConfig

    if name in PRESETS or name.startswith(PACKAGE) or Path(name).exists():
        return False
    try:
        published = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False).to_dict()
    except (OSError, ValueError):
        return False
    return all(published.get(key) == value for key, value in config.items() if key != "dtype")


def through_pooler(bert: Bert, pooling: str) -> Bert:
    """The network whose own pooler, tanh(W x_cls + b), gives what `pooling` gives, up to `gain`.

    The first token passes tanh where that is linear. The mean passes one more layer, which gives every token the mean:
    attention with zero queries is uniform over what the mask leaves; its LayerNorms take sums that are far smaller than
    their epsilon, and so divide by a constant; and what they take off, the mean over the channels, is zero already,
    because the scale and shift of the LayerNorm before are put off until the pooler. Needs the range of float32 or
    bfloat16.
    """
    if pooling == "pooler":
        return bert
    config, state = copy.deepcopy(bert.config), dict(bert.state)
    width = config["hidden_size"]
    scale, shift = torch.ones(width), torch.zeros(width)
    if pooling == "mean":
        if config["model_type"] not in LAYERED:
            raise UserError(
                f"transformers pools a {config['model_type']} by its first token, and has no exact way to the mean that "
                "this tower takes; use format=onnx"
            )
        scale, shift = _add_mean(config, state)
    state |= {"pooler.dense.weight": torch.diag(scale) * EPSILON, "pooler.dense.bias": shift * EPSILON}
    return Bert(config, state, 1 / EPSILON)


def _add_mean(config: dict[str, Any], state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One more layer, that gives every token the mean; what its output is to be multiplied by, and added."""
    width, inner, count = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    last, new = f"encoder.layer.{count - 1}.output.LayerNorm", f"encoder.layer.{count}"
    config["num_hidden_layers"] = count + 1
    epsilon = config["layer_norm_eps"]
    small = 2.0 ** (math.floor(math.log2(epsilon) / 2) - 13)  # its square is 2e-8 of epsilon
    tiny = small * 2.0**-30  # the token itself, beside the mean
    scale, shift = state[f"{last}.weight"], state[f"{last}.bias"]
    state |= {f"{last}.weight": torch.full((width,), tiny), f"{last}.bias": torch.zeros(width)}
    eye, zero = torch.eye(width), torch.zeros(width)
    for name in ("query", "key", "value"):
        state[f"{new}.attention.self.{name}.weight"] = eye if name == "value" else torch.zeros_like(eye)
        state[f"{new}.attention.self.{name}.bias"] = zero
    state |= {
        f"{new}.attention.output.dense.weight": eye * 2.0**30,
        f"{new}.attention.output.dense.bias": zero,
        f"{new}.attention.output.LayerNorm.weight": torch.full((width,), math.sqrt(epsilon)),
        f"{new}.attention.output.LayerNorm.bias": zero,
        f"{new}.intermediate.dense.weight": torch.zeros(inner, width),
        f"{new}.intermediate.dense.bias": torch.zeros(inner),
        f"{new}.output.dense.weight": torch.zeros(width, inner),
        f"{new}.output.dense.bias": zero,
        f"{new}.output.LayerNorm.weight": torch.full((width,), math.sqrt(epsilon) / small),
        f"{new}.output.LayerNorm.bias": zero,
    }
    return scale, shift


def _from_distilbert(config: dict[str, Any], state: dict[str, Tensor]) -> Bert:
    """DistilBERT (Sanh et al. 2019, arXiv:1910.01108) is a BERT without segments."""
    named = {}
    for name, value in state.items():
        for theirs, ours in DISTILBERT.items():
            name = name.replace(theirs, ours)
        named[name] = value
    named["embeddings.token_type_embeddings.weight"] = torch.zeros(2, config["dim"])
    same = ("vocab_size", "max_position_embeddings", "pad_token_id", "dtype")
    shape = {
        "model_type": "bert",
        "hidden_size": config["dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "intermediate_size": config["hidden_dim"],
        "hidden_act": config["activation"],
        "hidden_dropout_prob": config["dropout"],
        "attention_probs_dropout_prob": config["attention_dropout"],
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
    }
    return Bert({**{key: config[key] for key in same}, **shape}, named)
