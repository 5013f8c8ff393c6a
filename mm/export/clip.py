"""open_clip's plain transformers as transformers' CLIP: the same networks, other names."""

from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor

from mm.encoders.open_clip import OpenClipImageEncoder, OpenClipTextEncoder
from mm.encoders.tower import Tower
from mm.export.folder import weights_of

START, END = "<|startoftext|>", "<|endoftext|>"
IMAGE = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
}
TEXT = {
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.": "final_layer_norm.",
}
BLOCK = {
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
# what transformers' CLIP has no form of, beside the values that it has
IMAGE_PLAIN = (
    "ls_init_value",
    "attentional_pool",
    "no_ln_pre",
    "final_ln_after_pool",
    "pool_type",
    "act_kwargs",
)
TEXT_PLAIN = ("ls_init_value", "embed_cls", "no_causal_mask", "proj_bias", "proj_type", "act_kwargs")
BLOCK_PLAIN = (
    "block_type",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
)


def is_plain(tower: Tower) -> bool:
    """Whether transformers' CLIP is the same network."""
    if isinstance(tower, OpenClipImageEncoder):
        config: Any = CLIPVisionCfg(**tower.spec["model"]["vision_cfg"])
        plain: Any = CLIPVisionCfg()
        keys: tuple[str, ...] = (*IMAGE_PLAIN, *BLOCK_PLAIN)
        kind: Any = VisionTransformer
    elif isinstance(tower, OpenClipTextEncoder):
        config, plain = CLIPTextCfg(**tower.spec["model"]["text_cfg"]), CLIPTextCfg()
        keys, kind = (*TEXT_PLAIN, *BLOCK_PLAIN), TextTransformer
        if config.pool_type not in ("argmax", "eos"):
            return False
    else:
        return False
    same = all(getattr(config, key) == getattr(plain, key) for key in keys)
    return same and isinstance(tower.trunk, kind) and set(config.norm_kwargs or {}) <= {"eps"}


def image_config(tower: OpenClipImageEncoder) -> dict[str, Any]:
    """The values of a CLIPVisionConfig."""
    config = CLIPVisionCfg(**tower.spec["model"]["vision_cfg"])
    return {
        "model_type": "clip_vision_model",
        "image_size": tower.size[0],
        "patch_size": config.patch_size,
        "num_attention_heads": config.width // config.head_width,
        **_shared(tower.spec["model"], config),
    }


def text_config(tower: OpenClipTextEncoder) -> dict[str, Any]:
    """The values of a CLIPTextConfig."""
    config = CLIPTextCfg(**tower.spec["model"]["text_cfg"])
    last = config.vocab_size - 1  # what open_clip looks for with argmax
    special = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    if config.pool_type == "eos":
        special = {"eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    return {
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_attention_heads": config.heads,
        **special,
        **_shared(tower.spec["model"], config),
    }


def _shared(model: dict[str, Any], config: Any) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": (config.norm_kwargs or {}).get("eps", 1e-5),
        "projection_dim": model["embed_dim"],
    }


def renamed(tower: Tower) -> tuple[dict[str, Tensor], Tensor]:
    """The weights of the network, and those (D, W) of the projection at its end."""
    image = isinstance(tower, OpenClipImageEncoder)
    state = weights_of(tower.trunk)
    projection = state.pop("proj" if image else "text_projection").T
    names = {**(IMAGE if image else TEXT), **BLOCK}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if ".attn.in_proj_" in name:
            block, kind = name.split(".attn.in_proj_")
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"{block}.self_attn.{part}_proj.{kind}"] = piece
        else:
            found[name] = value
    return found, projection


def tokenizer(simple: SimpleTokenizer, context_length: int) -> Any:
    """open_clip's own tokenizer as transformers' CLIPTokenizer: equal ids but for what open_clip mends before (HTML,
    broken Unicode)."""
    from transformers import CLIPTokenizer

    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {names.get(word, word): number for word, number in simple.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(simple.bpe_ranks), model_max_length=context_length)
