"""Weights on disk: official files, recognised by their tensors, go strictly into our modules; and one writer of checkpoints.

    python -m model.weights PATH...     what each file or folder holds, without loading it

Only safetensors are read. Modules have the official names: BFL's for the transformer and the autoencoder, Hugging
Face's for T5 and CLIP, VGGT's. Where people also have another layout, one key map converts it. Nothing is copied
without need: on a CPU, weights that have the wanted dtype stay in the memory-mapped file.
"""

import hashlib
import json
import math
import os
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
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

VAE_DIFFUSERS = {  # the decoder's levels are counted from the other end; attention's 1 x 1 filters are matrices there
    "encoder.down.{}.block.{}.nin_shortcut": "encoder.down_blocks.{}.resnets.{}.conv_shortcut",
    "encoder.down.{}.block.{}": "encoder.down_blocks.{}.resnets.{}",
    "encoder.down.{}.downsample.conv": "encoder.down_blocks.{}.downsamplers.0.conv",
    **{f"decoder.up.{i}.block.{{}}.nin_shortcut": f"decoder.up_blocks.{3 - i}.resnets.{{}}.conv_shortcut" for i in range(4)},
    **{f"decoder.up.{i}.block.{{}}": f"decoder.up_blocks.{3 - i}.resnets.{{}}" for i in range(4)},
    **{f"decoder.up.{i}.upsample.conv": f"decoder.up_blocks.{3 - i}.upsamplers.0.conv" for i in range(4)},
    **{
        f"{half}.{ours}": f"{half}.{theirs}"
        for half in ("encoder", "decoder")
        for ours, theirs in {
            "mid.block_1": "mid_block.resnets.0",
            "mid.block_2": "mid_block.resnets.1",
            "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
            "mid.attn_1.q": "mid_block.attentions.0.to_q",
            "mid.attn_1.k": "mid_block.attentions.0.to_k",
            "mid.attn_1.v": "mid_block.attentions.0.to_v",
            "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
            "norm_out": "conv_norm_out",
        }.items()
    },
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


# ---- what a file is, by the tensors in it ---------------------------------------------------------------------------

LAYOUTS = (  # network, layout, how names of its tensors begin, key map
    ("mmdit", "BFL", "double_blocks.", {}),
    ("mmdit", "diffusers", "transformer_blocks.", FLUX_DIFFUSERS),
    ("vae", "BFL", "encoder.down.", {}),
    ("vae", "diffusers", "encoder.down_blocks.", VAE_DIFFUSERS),
    ("t5", "Hugging Face", "encoder.block.", {}),
    ("clip", "Hugging Face", "text_model.encoder.", {}),
    ("vggt", "VGGT", "frame_blocks.", {}),
    ("depth", "Hugging Face", "neck.fusion_stage.", DEPTH_HF),
    ("connector", "SpatialDiff", "query", {}),
    ("spatial_head", "SpatialDiff", "fc2.", {}),
)
PREFIXES = (  # of a network's names, in files that hold more than it
    "",
    "aggregator.",  # VGGT-1B
    "model.diffusion_model.",  # all-in-one checkpoints, from here on
    "vae.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.t5xxl.transformer.",
)
UNUSED = {  # beginnings of names that some files have and nothing here reads
    "t5": ("encoder.embed_tokens.", "decoder.", "lm_head."),  # the first is shared.weight once more
    "clip": ("text_model.embeddings.position_ids", "vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = (".scale_weight", ".weight_scale")  # of an fp8 X.weight: X.scale_weight, in newer files X.weight_scale
FP8_EXTRAS = ("scaled_fp8", ".comfy_quant", ".scale_input", ".input_scale", *SCALES)  # marks and scales, not weights


@dataclass(frozen=True, eq=False)
class Source:
    """One network on disk: its layout and where each of its tensors lies, as the headers say. Nothing is loaded."""

    network: str
    layout: str
    prefix: str
    key_map: dict = field(repr=False)
    tensors: dict[str, tuple[Path, str, tuple[int, ...]]] = field(repr=False)  # name without prefix: file, dtype, shape
    metadata: dict[str, str] = field(repr=False)

    @cached_property
    def files(self) -> list[Path]:
        return sorted({path for path, _, _ in self.tensors.values()})

    @cached_property
    def scaled(self) -> bool:
        """Whether fp8 weights are to be multiplied by scales, rather than plainly cast."""
        return any(name.endswith(("scaled_fp8", ".comfy_quant", *SCALES)) for name in self.tensors)

    @cached_property
    def weights(self) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
        """Its tensors without what no network here has."""
        unused = UNUSED.get(self.network, ())
        return {n: t for n, t in self.tensors.items() if not n.endswith(FP8_EXTRAS) and not n.startswith(unused)}

    def __str__(self) -> str:
        place = self.files[0] if len(self.files) == 1 else self.files[0].parent / "*.safetensors"
        dtypes = [dtype for _, dtype, _ in self.weights.values()]
        dtypes = sorted(set(dtypes), key=dtypes.count, reverse=True)
        place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
        return f"{place} ({self.layout} names, {'scaled ' * self.scaled}{', '.join(dtypes)})"

    def digest(self) -> str:
        """sha256 that tells its files from others; see `digest`."""
        return hashlib.sha256("".join(map(digest, self.files)).encode()).hexdigest()

    def mismatch(self, expected: dict[str, Tensor]) -> str:
        """Why a module with the state dict `expected` cannot be filled from here; "" if it can."""
        wanted, wrong = {}, []
        for name, tensor in expected.items():
            theirs, shape = translate(name, self.key_map), tuple(tensor.shape)
            wanted |= dict.fromkeys(theirs)
            entries = [self.weights[n] for n in theirs if n in self.weights]
            if len(entries) == len(theirs):
                shapes = [entry[2] for entry in entries]
                if stacked(shapes) not in (shape, shape[:-2] if shape[-2:] == (1, 1) else shape):
                    wrong.append(f"{' and '.join(theirs)} of shape {' and '.join(map(str, shapes))} where {shape} was expected")
                elif not {entry[1] for entry in entries} <= {*FLOATS, *FP8}:
                    wrong.append(f"{theirs[0]} stored as {entries[0][1]}, a quantisation that is not read here")
        missing = [n for n in wanted if n not in self.weights]
        surplus = [n for n in self.weights if n not in wanted]
        clauses = [f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
                   for what, names in (("missing", missing), ("surplus", surplus)) if names]
        return "; ".join(clauses + wrong[:1])

    def read(self, name: str, handles: dict, device, dtype: torch.dtype) -> Tensor:
        """One tensor on `device` in `dtype`; on a CPU one that has this dtype already stays in the mapped file."""
        path, stored, _ = self.tensors[name]
        tensor = handles[path].get_tensor(self.prefix + name).to(device)
        if stored in FP8:
            tensor = tensor.to(dtype)
            if self.scaled:
                tensor.mul_(self.scale(name, handles))
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite. Copy or download the file again.")
        return tensor.to(dtype)

    def scale(self, name: str, handles: dict) -> float:
        """What an fp8 weight of a scaled file is multiplied by."""
        stem = name.removesuffix(".weight")
        found = [stem + ending for ending in SCALES if stem + ending in self.tensors]
        path, _, shape = self.tensors[found[0]] if found else (self.tensors[name][0], "", None)
        if shape not in ((), (1,)):
            raise ValueError(f"{path}: {name} is fp8 and its file says that such weights have one scale each, but found "
                             f"{f'scales of shape {shape}' if found else 'none'}. Get the bf16 file, see weights.md.")
        return handles[path].get_tensor(self.prefix + found[0]).item()


def stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape of tensors one below the other; None if they do not fit so."""
    if len(shapes) == 1:
        return shapes[0]
    return (sum(s[0] for s in shapes), *shapes[0][1:]) if len({s[1:] for s in shapes}) == 1 else None


def fill(module: nn.Module, source: Source, device="cpu") -> nn.Module:
    """Fills a module that was built on the meta device, tensor by tensor, every name and shape exactly.

    Each tensor goes straight from the mapped file to `device` in the dtype the module has for it. ValueError, in a
    sentence, if names or shapes differ, a scale is missing or a value is not finite.
    """
    expected, state = module.state_dict(), {}
    if clause := source.mismatch(expected):
        raise ValueError(f"{source} does not hold a {type(module).__name__} of this preset: {clause}. Check the preset and the file.")
    with ExitStack() as stack:
        handles = {path: stack.enter_context(safe_open(path, framework="pt")) for path in source.files}
        for name, like in expected.items():
            rows = [source.read(n, handles, device, like.dtype) for n in translate(name, source.key_map)]
            tensor = torch.cat(rows) if len(rows) > 1 else rows[0]
            if source.layout == "diffusers" and name.startswith("final_layer.adaLN_modulation."):
                tensor = torch.cat(tensor.chunk(2)[::-1])
            state[name] = tensor.reshape(like.shape)
    module.load_state_dict(state, strict=True, assign=True)
    return module


def identify(files: list[Path]) -> list[Source]:
    """The networks in a file, or in the shards of one, by the names of their tensors. Errors as `read_header`."""
    found, tensors, metadata = [], {}, {}
    for path in files:
        header, metadata = read_header(path)
        tensors |= {name: (path, *entry) for name, entry in header.items()}
    if any(re.search("lora|lokr|hada_|lycoris", name) for name in tensors):  # of which model/lora.py reads some
        return [Source("lora", "its own", "", {}, tensors, metadata)]
    for prefix in PREFIXES:
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        for network, layout, sign, key_map in LAYOUTS:
            if any(name.startswith(sign) for name in inside):
                found.append(Source(network, layout, prefix, key_map, inside, metadata))
    return found


def scan(path: Path) -> tuple[list[Source], list[str]]:
    """All networks in a file or anywhere below a folder, those that load without conversion first; and a sentence about
    each file that cannot be read or recognised."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Expected weights at {path}, found nothing there. See weights.md for how to get them.")
    groups: dict[tuple, list[Path]] = {}
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        shard = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", file.name)
        groups.setdefault((file.parent, shard[1], int(shard[2])) if shard else (file,), []).append(file)
    sources, problems = [], []
    for key, files in groups.items():
        try:
            if len(key) == 3 and path.is_dir() and len(files) != key[2]:
                raise ValueError(f"{files[0].parent} holds {len(files)} of the {key[2]} files {key[1]}-*-of-{key[2]:05}.safetensors: "
                                 "download the missing ones.")
            if not (found := identify(files)):
                raise ValueError(f"{files[0]} is a safetensors file, but of no network known here; see weights.md.")
            sources += found
        except ValueError as error:
            problems.append(str(error))
    return sorted(sources, key=lambda s: (bool(s.key_map), any(t[1] in FP8 for t in s.tensors.values()))), problems


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Dtype and shape of every tensor of a safetensors file, and its metadata. FileNotFoundError, or ValueError with a
    sentence that says what the file is instead."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a safetensors file at {path}, found none. See weights.md for how to get it.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} {what_else(Path(path))} ({error}).") from None


def what_else(path: Path) -> str:
    """What a file that is no complete safetensors file seems to be, and what to do, as a clause."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if size == 0:
        return "is empty: download it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights: run `git lfs pull` beside it, or download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")) or text.startswith(b'{"error'):
        return "is a web page or an error message, not weights: accept the licence where it is published, log in, download again"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a pickle, which can run code and is never loaded: get the .safetensors file of the same weights"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, which is not read here: get the .safetensors file"
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length < 100_000_000:
        return f"({size:,} bytes) is cut short or its header is damaged: download or copy it again"
    return f"({size:,} bytes) is not a safetensors file: see weights.md for what belongs here"


# ---- our own files --------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors to a temporary name, flushes and renames: a reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Errors as `read_header`."""
    _, metadata = read_header(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def digest(path: Path) -> str:
    """sha256 of a file; of one beyond 64 MB, of its size and of 64 evenly spaced pieces of 1 MB, the first and the last
    included."""
    size, piece = path.stat().st_size, 1 << 20
    with open(path, "rb") as file:
        if size <= 64 * piece:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for i in range(64):
            file.seek((size - piece) * i // 63)
            found.update(file.read(piece))
        return found.hexdigest()


def to_json(value: object) -> str:
    """Metadata text: the same object gives the same text."""
    return json.dumps(value, sort_keys=True)


# ---- command line ---------------------------------------------------------------------------------------------------


def main() -> int:
    """Prints what each path holds; 0 if all of it would load, 1 if not."""
    from spatialdiff import sizes

    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    failed = False
    for path in map(Path, sys.argv[1:]):
        sources, problems = scan(path) if path.exists() else ([], [f"{path} does not exist."])
        for source in sources:
            count = sum(math.prod(shape) for _, _, shape in source.weights.values())
            print(f"{source.network:13}{source}: {len(source.weights)} tensors, {count:,} parameters")
            if source.network == "lora":
                continue
            clauses = {name: source.mismatch(module.state_dict()) for name, module in sizes(source.network).items()}
            fitting = [name for name, clause in clauses.items() if not clause]
            nearest = min(clauses, key=lambda name: len(clauses[name]))
            print(" " * 13 + (f"complete, {fitting[0]}" if fitting else f"nearest to {nearest}, but {clauses[nearest]}"))
            failed |= not fitting
        for problem in problems:
            print(problem)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
