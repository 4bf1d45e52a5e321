"""Small vision transformers in timm's registry, and their forward as three published layouts define it.

`forward` reads tensors by the names of the layout and shares no code with timm: it is the oracle of the conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

WIDTH, DEPTH, HEADS, PATCH, SIZE = 16, 2, 2, 7, 28
ENTRY = {
    "input_size": (3, SIZE, SIZE), "fixed_input_size": True, "interpolation": "bicubic", "num_classes": 0,
    "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "first_conv": "patch_embed.proj", "classifier": "head",
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        "tiny_dinov2.test": {**ENTRY, "crop_pct": 1.0},
        "tiny_dinov2_reg.test": {**ENTRY, "crop_pct": 1.0},
        "tiny_clip.test": {**ENTRY, "crop_pct": 0.9, "num_classes": 8},
        "tiny_siglip.test": {**ENTRY, "crop_pct": 0.9, "crop_mode": "squash"},
        "tiny_oblong.test": {**ENTRY, "input_size": (3, SIZE, 2 * SIZE)},
        "tiny_border.test": {**ENTRY, "crop_mode": "border"},
    }
)
DINOV2 = {"init_values": 1e-5}
REGISTERS = {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}
CLIP = {"pre_norm": True, "norm_layer": torch.nn.LayerNorm}
SIGLIP = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}


def _create(variant: str, pretrained: bool, options: Mapping[str, Any], extra: Mapping[str, Any]) -> VisionTransformer:
    size = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "img_size": SIZE}
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**size, **options, **extra},
    )


@register_model
def tiny_dinov2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """As vit_small_patch14_dinov2."""
    return _create("tiny_dinov2", pretrained, DINOV2, kwargs)


@register_model
def tiny_dinov2_reg(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """As vit_small_patch14_reg4_dinov2."""
    return _create("tiny_dinov2_reg", pretrained, REGISTERS, kwargs)


@register_model
def tiny_clip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """As vit_base_patch32_clip_224."""
    return _create("tiny_clip", pretrained, CLIP, kwargs)


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """As vit_base_patch16_siglip_224."""
    return _create("tiny_siglip", pretrained, SIGLIP, kwargs)


@register_model
def tiny_oblong(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Its images are not square."""
    return _create("tiny_oblong", pretrained, {}, kwargs)


@register_model
def tiny_border(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Its images have borders."""
    return _create("tiny_border", pretrained, {}, kwargs)


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random tensors, of a size at which each of them moves the output."""
    torch.manual_seed(seed)
    return {name: torch.randn(shape) * (0.3 if len(shape) > 1 else 0.5) for name, shape in shapes.items()}


def _blocks(names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a transformer's blocks under a layout's names."""
    w, shapes = WIDTH, {}
    for i in range(DEPTH):
        block = {
            "norm1": (w,), "qkv": (3 * w, w), "proj": (w, w), "norm2": (w,), "fc1": (4 * w, w), "fc2": (w, 4 * w),
        }  # fmt: skip
        for key, shape in block.items():
            weight, bias = names[key].format(i=i, kind="weight"), names[key].format(i=i, kind="bias")
            shapes |= {weight: shape, bias: shape[:1]}
        if "scale" in names:
            shapes |= {names["scale"].format(i=i, n=n): (w,) for n in (1, 2)}
    return shapes


DINOV2_NAMES = {
    "norm1": "blocks.{i}.norm1.{kind}", "qkv": "blocks.{i}.attn.qkv.{kind}", "proj": "blocks.{i}.attn.proj.{kind}",
    "norm2": "blocks.{i}.norm2.{kind}", "fc1": "blocks.{i}.mlp.fc1.{kind}", "fc2": "blocks.{i}.mlp.fc2.{kind}",
    "scale": "blocks.{i}.ls{n}.gamma",
}  # fmt: skip
CLIP_NAMES = {
    key: f"visual.transformer.resblocks.{{i}}.{name}"
    for key, name in {
        "norm1": "ln_1.{kind}", "qkv": "attn.in_proj_{kind}", "proj": "attn.out_proj.{kind}", "norm2": "ln_2.{kind}",
        "fc1": "mlp.c_fc.{kind}", "fc2": "mlp.c_proj.{kind}",
    }.items()
}  # fmt: skip


def dinov2_file(registers: bool, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint as facebookresearch/dinov2 publishes it (dinov2_vits14_pretrain.pth, …_reg4_pretrain.pth)."""
    w, grid = WIDTH, (SIZE // PATCH) ** 2
    shapes = {
        "cls_token": (1, 1, w), "pos_embed": (1, 1 + grid, w), "mask_token": (1, w),
        "patch_embed.proj.weight": (w, 3, PATCH, PATCH), "patch_embed.proj.bias": (w,),
        "norm.weight": (w,), "norm.bias": (w,), **_blocks(DINOV2_NAMES),
    }  # fmt: skip
    return _random(shapes | ({"register_tokens": (1, 4, w)} if registers else {}), seed)


def openclip_file(seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of OpenCLIP (open_clip_pytorch_model.bin): the image tower under visual., the text tower beside."""
    w, grid = WIDTH, (SIZE // PATCH) ** 2
    shapes = {
        "visual.class_embedding": (w,), "visual.positional_embedding": (1 + grid, w), "visual.proj": (w, 8),
        "visual.conv1.weight": (w, 3, PATCH, PATCH), **_blocks(CLIP_NAMES),
        **{f"visual.{name}.{kind}": (w,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
        "text_projection": (8, 8), "token_embedding.weight": (5, 8), "logit_scale": (),
    }  # fmt: skip
    return _random(shapes, seed)


def _transformer(x: Tensor, state: Mapping[str, Tensor], names: Mapping[str, str], eps: float) -> Tensor:
    """The blocks of a layout on tokens [n, t, w]."""
    for i in range(DEPTH):
        part = {
            (key, kind): state[names[key].format(i=i, kind=kind)]
            for key in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
            for kind in ("weight", "bias")
        }

        def linear(y: Tensor, key: str, part: Any = part) -> Tensor:
            return F.linear(y, part[key, "weight"], part[key, "bias"])

        def norm(y: Tensor, key: str, part: Any = part) -> Tensor:
            return F.layer_norm(y, (WIDTH,), part[key, "weight"], part[key, "bias"], eps)

        def scale(n: int, i: int = i) -> Tensor:
            return state[names["scale"].format(i=i, n=n)] if "scale" in names else torch.ones(WIDTH)

        q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in linear(norm(x, "norm1"), "qkv").chunk(3, 2))
        mixed = ((q @ k.transpose(2, 3)) / q.shape[3] ** 0.5).softmax(3) @ v
        x = x + scale(1) * linear(mixed.transpose(1, 2).flatten(2), "proj")
        x = x + scale(2) * linear(F.gelu(linear(norm(x, "norm2"), "fc1")), "fc2")
    return x


def dinov2_features(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """DINOv2's x_norm_clstoken [n, w] of normalised images: positions on the class token, none on the registers."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], PATCH).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    x = _transformer(x, state, DINOV2_NAMES, 1e-6)
    return F.layer_norm(x[:, 0], (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)


def openclip_features(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """OpenCLIP's pooled class token [n, w] after ln_post, before the projection, of normalised images."""
    tower = {name.removeprefix("visual."): tensor for name, tensor in state.items()}
    x = F.conv2d(images, tower["conv1.weight"], None, PATCH).flatten(2).mT
    x = torch.cat([tower["class_embedding"].expand(len(x), 1, -1), x], 1) + tower["positional_embedding"]
    x = F.layer_norm(x, (WIDTH,), tower["ln_pre.weight"], tower["ln_pre.bias"], 1e-5)
    x = _transformer(x, state, CLIP_NAMES, 1e-5)
    return F.layer_norm(x[:, 0], (WIDTH,), tower["ln_post.weight"], tower["ln_post.bias"], 1e-5)


def big_vision_file(depth: int = DEPTH, seed: int = 0) -> dict[str, Any]:
    """The arrays of a .npz as google-research/big_vision publishes SigLIP: the image tower under params/img/."""
    w, heads, each = WIDTH, HEADS, WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (PATCH, PATCH, 3, w), "embedding/bias": (w,),
        "pos_embedding": (1, (SIZE // PATCH) ** 2, w), "MAPHead_0/probe": (1, 1, w),
        "Transformer/encoder_norm/scale": (w,), "Transformer/encoder_norm/bias": (w,),
    }  # fmt: skip
    norms = ["MAPHead_0/LayerNorm_0"]
    for block in ["MAPHead_0", *(f"Transformer/encoderblock_{i}" for i in range(depth))]:
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for key in ("query", "key", "value"):
            shapes |= {f"{attention}/{key}/kernel": (w, heads, each), f"{attention}/{key}/bias": (heads, each)}
        shapes |= {f"{attention}/out/kernel": (heads, each, w), f"{attention}/out/bias": (w,)}
        shapes |= {f"{block}/MlpBlock_0/Dense_0/kernel": (w, 4 * w), f"{block}/MlpBlock_0/Dense_0/bias": (4 * w,)}
        shapes |= {f"{block}/MlpBlock_0/Dense_1/kernel": (4 * w, w), f"{block}/MlpBlock_0/Dense_1/bias": (w,)}
        norms += [] if block == "MAPHead_0" else [f"{block}/LayerNorm_0", f"{block}/LayerNorm_1"]
    shapes |= {f"{norm}/{kind}": (w,) for norm in norms for kind in ("scale", "bias")}
    text = {"params/t": (), "params/txt/head/kernel": (8, 8)}
    named = _random({f"params/img/{name}": shape for name, shape in shapes.items()} | text, seed)
    return {name: tensor.numpy() for name, tensor in named.items()}


def big_vision_features(arrays: Mapping[str, Any], images: Tensor) -> Tensor:
    """SigLIP's features [n, w] of normalised images: the probe's attention over the tokens, and its MLP."""
    w = {name.removeprefix("params/img/"): torch.from_numpy(array) for name, array in arrays.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}/scale"], w[f"{name}/bias"], 1e-6)

    def mlp(x: Tensor, block: str) -> Tensor:
        first, second = (f"{block}/MlpBlock_0/Dense_{i}" for i in (0, 1))
        hidden = F.gelu(x @ w[f"{first}/kernel"] + w[f"{first}/bias"], approximate="tanh")
        return hidden @ w[f"{second}/kernel"] + w[f"{second}/bias"]

    def attend(x: Tensor, y: Tensor, block: str) -> Tensor:
        name = f"{block}/MultiHeadDotProductAttention_0"
        q, k, v = (
            torch.einsum("ntw,whd->nthd", z, w[f"{name}/{key}/kernel"]) + w[f"{name}/{key}/bias"]
            for z, key in ((x, "query"), (y, "key"), (y, "value"))
        )
        weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[3] ** 0.5).softmax(3)
        mixed = torch.einsum("nhqk,nkhd->nqhd", weights, v)
        return torch.einsum("nqhd,hdw->nqw", mixed, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]

    kernel = w["embedding/kernel"].permute(3, 2, 0, 1)
    x = F.conv2d(images, kernel, w["embedding/bias"], PATCH).flatten(2).mT + w["pos_embedding"]
    for block in (f"Transformer/encoderblock_{i}" for i in range(DEPTH)):
        y = norm(x, f"{block}/LayerNorm_0")
        x = x + attend(y, y, block)
        x = x + mlp(norm(x, f"{block}/LayerNorm_1"), block)
    x = norm(x, "Transformer/encoder_norm")
    pooled = attend(w["MAPHead_0/probe"].expand(len(x), -1, -1), x, "MAPHead_0")
    return (pooled + mlp(norm(pooled, "MAPHead_0/LayerNorm_0"), "MAPHead_0"))[:, 0]
