"""Weights on disk: safetensors in, modules out, strictly; and the one writer of every checkpoint."""

import hashlib
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


# ---- key maps: our name (the official one) -> the other layout's. {} is a block's number; what follows a row's name in a
# tensor's name stays. Several names: their tensors are stacked by rows, in this order.

FLUX_DIFFUSERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
    "double_blocks.{}.img_attn.qkv": [
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ],
    "double_blocks.{}.txt_attn.qkv": [
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ],
    "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
    "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    "single_blocks.{}.linear1": [
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.proj_mlp",
    ],
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
    "final_layer.adaLN_modulation.1": "norm_out.linear",  # diffusers has scale before shift: halves change places
    "final_layer.linear": "proj_out",
}

DEPTH_HF = {  # Depth Anything's backbone; neck and head have the same names in both
    "backbone.cls_token": "backbone.embeddings.cls_token",
    "backbone.mask_token": "backbone.embeddings.mask_token",
    "backbone.pos_embed": "backbone.embeddings.position_embeddings",
    "backbone.patch_embed.proj": "backbone.embeddings.patch_embeddings.projection",
    "backbone.blocks.{}.norm1": "backbone.encoder.layer.{}.norm1",
    "backbone.blocks.{}.attn.qkv": [
        "backbone.encoder.layer.{}.attention.attention.query",
        "backbone.encoder.layer.{}.attention.attention.key",
        "backbone.encoder.layer.{}.attention.attention.value",
    ],
    "backbone.blocks.{}.attn.proj": "backbone.encoder.layer.{}.attention.output.dense",
    "backbone.blocks.{}.ls1.gamma": "backbone.encoder.layer.{}.layer_scale1.lambda1",
    "backbone.blocks.{}.norm2": "backbone.encoder.layer.{}.norm2",
    "backbone.blocks.{}.mlp": "backbone.encoder.layer.{}.mlp",
    "backbone.blocks.{}.ls2.gamma": "backbone.encoder.layer.{}.layer_scale2.lambda1",
    "backbone.norm": "backbone.layernorm",
}


def translate(name: str, key_map: dict[str, str | list[str]]) -> list[str]:
    """The other layout's names of what `name` (a module's or a tensor's) holds, in the order of its rows; [name] itself
    if no row of the map speaks of it."""
    for ours, theirs in key_map.items():
        match = re.fullmatch(re.escape(ours).replace(r"\{\}", r"(\d+)") + r"(\..+)?", name)
        if match:
            *numbers, rest = match.groups()
            return [t.format(*numbers) + (rest or "") for t in ([theirs] if isinstance(theirs, str) else theirs)]
    return [name]


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors to a temporary name, flushes and renames: a reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. FileNotFoundError, or ValueError if it is not one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a safetensors file at {path}, found none. See weights.md for how to get it.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file ({error}). "
            "Copy or download it again."
        ) from None


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Gives `tensors` to `module`, every name and shape exactly; dtypes become the module's. ValueError otherwise."""
    expected = module.state_dict()
    missing, surplus = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or surplus:
        raise ValueError(
            f"{source} does not hold a {type(module).__name__} of this preset: {len(missing)} tensors missing"
            f"{_examples(missing)}, {len(surplus)} surplus{_examples(surplus)}. Check --preset and the file."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, this preset expects {tuple(expected[name].shape)}. "
                "Check --preset and the file."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} holds values that are not finite. Copy or download the file again.")
    tensors = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=True, assign=True)


def _examples(names: set[str]) -> str:
    return f" ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: object) -> str:
    """Metadata text: the same object gives the same text."""
    return json.dumps(value, sort_keys=True)
