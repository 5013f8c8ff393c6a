"""LoRA: low-rank updates beside locked weights, and how they are merged into plain weights."""

import difflib
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.encoders.image import ImageEncoder
from mm.encoders.text import TextEncoder
from mm.errors import UserError

ADAPTER = "default"
A, B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
BASE = ".base_layer."
IN_BLOCK = re.compile(r"\.\d+\.")  # blocks are numbered; poolers and projections are not
IN_LAYER = re.compile(r"_\.(weight|bias)$")  # in_proj_.weight, as `AttentionInLayers` calls in_proj_weight


class LoraConfig(Config):
    """Low-rank updates of a locked tower."""

    rank: int = Field(default=8, gt=0)
    """Rank of the updates."""
    alpha: float = Field(default=16.0, gt=0)
    """The updates are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of what the updates read."""
    targets: tuple[str, ...] | None = None
    """Layers by the ends of their names, such as qkv or blocks.11.mlp.fc1; linear ones and convolutions.
    null: all linear layers of the blocks."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""


def add_lora(encoder: ImageEncoder | TextEncoder, config: LoraConfig) -> None:
    """Lock all weights of `encoder` and put trainable updates beside some of its layers, in place.

    W x becomes W x + scaling * B A x, with A random and B zero, so at first the output is the same (Hu et al.
    2021, arXiv:2106.09685). The projections of nn.MultiheadAttention (open_clip's blocks) become layers for it, in_proj
    and out_proj; other layers whose weights are used without calling them cannot have one. Raises UserError for targets
    that do not fit, and where peft is not installed.
    """
    assert not has_lora(encoder), "the encoder has LoRA already"
    try:
        import peft
    except ImportError as error:
        raise UserError(f"LoRA needs peft ({error}): pip install 'mm[lora]'") from error
    whole = _in_layers(encoder.trunk)
    names = []
    try:
        names = _targets(encoder, config.targets)
    finally:  # what gets no update stays as it was
        for name, attention in whole.items():
            if not {f"{name}.in_proj_", f"{name}.out_proj"} & set(names):
                encoder.trunk.set_submodule(name, attention)
    values = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules="|".join(map(re.escape, names)),  # a list would match the ends of other names too
    )
    peft.inject_adapter_in_model(values, encoder.trunk, adapter_name=ADAPTER)
    # else nothing would be recorded; the locked modules stay in eval mode all the same
    encoder.locked = False
    encoder.train(encoder.training)


def has_lora(module: nn.Module) -> bool:
    """True where some layer of `module` has an update that is not merged."""
    return any(name.endswith(A) for name, _ in module.named_parameters())


def lora_scalings(module: nn.Module) -> dict[str, float]:
    """For each layer with an update, by name, the factor of B A: what `merge_lora` needs besides the weights."""
    return {
        name: float(layer.scaling[ADAPTER])
        for name, layer in module.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "scaling")
    }


def merge_lora(state: Mapping[str, Tensor], scalings: Mapping[str, float]) -> dict[str, Tensor]:
    """The state of the plain module: W + scaling * B A under W's plain name, computed in float32.

    Args:
        state: the full weights of a module, as `state_dict` names them. What has no update stays as it is.
        scalings: `lora_scalings` of that module.
    """
    with_update = {name.removesuffix(A) for name in state if name.endswith(A)}
    assert with_update <= scalings.keys(), "the scalings are those of another module"
    merged = {}
    for name, value in state.items():
        if name.endswith((A, B)):
            continue
        layer, base, kind = name.rpartition(BASE)
        if base and layer in scalings:
            name = f"{layer}.{kind}"
            if kind == "weight":
                down, up = (state[layer + end].float().flatten(1) for end in (A, B))
                update = (up @ down).view(value.shape)  # of a convolution too: B is 1x1
                value = (value.float() + scalings[layer] * update).to(value.dtype)
        merged[IN_LAYER.sub(r"_\1", name)] = value
    return merged


class AttentionInLayers(nn.Module):
    """nn.MultiheadAttention of a sequence with itself, with the same parameters, whose projections are layers that
    are called. `in_proj_.weight` is what is `in_proj_weight` there."""

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        width, bias = whole.embed_dim, whole.in_proj_bias is not None
        self.in_proj_ = nn.Linear(width, 3 * width, bias, device="meta")
        self.in_proj_.weight = whole.in_proj_weight
        if bias:
            self.in_proj_.bias = whole.in_proj_bias
        self.out_proj = whole.out_proj
        self.heads = whole.num_heads
        self.dropout = whole.dropout
        self.batch_first = whole.batch_first
        self.training = whole.training

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(B, L, D) -> (B, L, D), or (L, B, D) where the batch does not come first.

        Args:
            attn_mask: added to the scores, or true where nothing is attended to; (L, L) or (B * heads, L, L).
        """
        assert query is key and key is value and not need_weights, "self-attention without its weights"
        x = query if self.batch_first else query.transpose(0, 1)
        batch, length, width = x.shape
        parts = self.in_proj_(x).view(batch, length, 3, self.heads, width // self.heads)
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(parts.dtype)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(batch, self.heads, length, length)
        dropout = self.dropout if self.training else 0.0
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout)
        out = self.out_proj(found.transpose(1, 2).reshape(batch, length, width))
        return (out if self.batch_first else out.transpose(0, 1)), None


def _in_layers(trunk: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Put `AttentionInLayers` in the place of each nn.MultiheadAttention that it can stand for; returns those, by
    name."""
    whole = {
        name: module
        for name, module in trunk.named_modules()
        if type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None  # else keys and values are of another width
        and module.bias_k is None
        and not module.add_zero_attn
        and IN_BLOCK.search(f".{name}")  # a pooler attends to another sequence
    }
    for name, module in whole.items():
        trunk.set_submodule(name, AttentionInLayers(module))
    return whole


def _targets(encoder: ImageEncoder | TextEncoder, wanted: tuple[str, ...] | None) -> list[str]:
    """Names in the trunk of the layers to update."""
    model = encoder.spec["name"]
    modules = {name: module for name, module in encoder.trunk.named_modules() if name}
    called = _called(encoder)
    if wanted is None:
        chosen = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and module in called and IN_BLOCK.search(f".{name}")
        ]
        if not chosen:
            others = dict.fromkeys(_end(n) for n, m in modules.items() if m in called and not _obstacle(m))
            give = (
                f"give lora.targets, such as {', '.join(list(others)[-5:])}" if others else "leave lora out"
            )
            raise UserError(f"the blocks of {model} have no linear layers for LoRA; {give}")
        return chosen
    layers = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    found: dict[str, None] = {}
    for target in wanted:
        matching = [name for name in layers if f".{name}".removesuffix("_").endswith(f".{target}")]
        if not matching:
            ends = list(dict.fromkeys(_end(name).removesuffix("_") for name in layers))
            close = difflib.get_close_matches(target, ends, n=3) or ends[-8:]
            raise UserError(f"lora.targets: {model} has no layer {target!r}; use such as {', '.join(close)}")
        for name in matching:
            obstacle = _obstacle(layers[name])
            if obstacle is None and layers[name] not in called:
                obstacle = "its weights are used without calling it, so an update would do nothing"
            if obstacle:
                raise UserError(f"lora.targets: {name!r} of {model} cannot have an update: {obstacle}")
        found |= dict.fromkeys(matching)
    if not found:
        raise UserError(
            "lora.targets is empty; name layers, or leave it out for all linear layers of the blocks"
        )
    return list(found)


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot have an update that merges into its weight."""
    from timm.layers import Conv2dSame

    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv2d):
        return f"it is a {type(layer).__name__}"
    if layer.groups > 1:
        return "it is a depthwise or grouped convolution"
    if (
        type(layer) not in (nn.Conv2d, Conv2dSame)
        or {*layer.dilation} != {1}
        or layer.padding_mode != "zeros"
    ):
        return f"it is not a plain convolution but {layer}"
    return None


def _called(encoder: ImageEncoder | TextEncoder) -> set[nn.Module]:
    """The modules of the trunk that run as modules, and not as weights in another one's function."""
    seen: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: seen.add(module))
        for module in encoder.trunk.modules()
    ]
    if isinstance(encoder, TextEncoder):
        inputs = encoder.tokenizer.pad([encoder.tokenizer("a")])
    else:
        inputs = (torch.zeros(1, 3, *encoder.size),)
    modes = {module: module.training for module in encoder.modules()}
    device = next(encoder.parameters()).device
    try:
        with torch.no_grad():
            encoder.eval()(*(one.to(device) for one in inputs))
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    return seen


def _end(name: str) -> str:
    """The end of a layer's name that says something: fc1, downsample.0."""
    found = re.search(r"[^.]+(\.\d+)*$", name)
    assert found
    return found[0]
