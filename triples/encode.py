"""Training triples of a JSON-lines file (data.py), encoded into what the losses need.

Encodings are kept on disk by what they were made of, so that a shuffled epoch cannot pair them wrongly and the frozen
encoders need not be in memory while training.
"""

import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from data import open_image, read_rows, resize, resolve, working_size
from model.depth import depth_image
from model.text import unknown_words
from model.weights import Source, save_tensors, to_json
from spatialdiff import (
    Preset, build, depth_target, encode_geometry, encode_image, encode_text, find_depth, load_depth, load_part, load_tokenizers,
)


@dataclass
class Batch:
    """Training samples of one picture size."""

    instructions: list[str]
    grid: tuple[int, int]  # token rows and columns, N = rows * columns
    reference: Tensor  # (B, N, C) packed latents
    target: Tensor  # (B, N, C)
    geometry: Tensor | None  # (B, l', d')
    depth: Tensor | None  # (B, K, head width): what the spatial head must say
    text: tuple[Tensor, Tensor] | None = None  # T5 tokens (B, L, Dt) and CLIP vector (B, Dp); None: still to be encoded


CACHE_FILE = 256 << 20  # bytes of encodings a file
CACHE_SECONDS = 60  # what is not yet written after this long is written, so that a killed run loses little


class FileTriples:
    """Triples of a JSON-lines file, encoded by frozen networks: now (cache None), or before the training and kept in the
    folder `cache`, from where they are read when needed.

    Encodings are named by the sha256 of what they were made of: file bytes and picture size, or the instruction. What the
    folder holds of other networks, sizes or precision is refused by name. One sample is encoded at a time, so that
    a batch has the same bits with and without a cache. gss: "lds", "eds" or "none". `sources`: of t5, clip, vae and, for
    geometry, vggt. ValueError for rows without a target or an instruction, or with words that a word-level tokenizer lacks.
    """

    def __init__(self, path: Path, preset: Preset, sources: dict[str, Source], weights: Path, gss: str, device, dtype,
                 cache: Path | None):
        self.preset, self.sources, self.weights, self.device, self.dtype = preset, sources, weights, device, dtype
        self.gss, self.folder, self.rows = gss, cache, read_rows(path)
        for key, remedy in (("tgt", "Training needs the picture after the edit."),
                            ("instruction", "Write them with python data.py instruct.")):
            lacking = [row["id"] for row in self.rows if not row.get(key)]
            if lacking:
                raise ValueError(f"Expected {key} in every row of {path}, but {len(lacking)} of {len(self.rows)} have none, "
                                 f"the first is {lacking[0]}. {remedy}")
        self.tokenizers = load_tokenizers(preset, weights)
        unknown = {word for row in self.rows for word in unknown_words(self.tokenizers[0], row["instruction"])}
        if unknown:
            raise ValueError(f"The preset {preset.name} does not know {len(unknown)} words of the instructions in {path}: "
                             f"{', '.join(sorted(unknown)[:10])}. The miniature reads sentences on its rendered scenes alone.")
        self.inputs = [self._inputs(path, row) for row in self.rows]
        if gss != "none" and any(inputs["depth"][3] is None for inputs in self.inputs):
            self.sources = sources | {"depth": find_depth(weights)[1]}  # missing, it is missed before anything is encoded
        self.networks, self.encoders, self.files = {}, {}, {}
        if cache is not None:
            self._check_cache()
            self._encode()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> Batch:
        """ValueError if the pictures differ in size."""
        samples = [{role: self._get(*given) for role, given in self.inputs[i].items()} for i in indices.tolist()]
        if len({tuple(s["target"][0].shape) for s in samples}) > 1:
            raise ValueError("Pictures of one batch must have one size; give --micro 1.")
        joined = {role: [torch.cat(x) for x in zip(*(s[role] for s in samples))] for role in samples[0]}
        one = lambda role: joined[role][0] if role in joined else None
        h, w = self.inputs[indices[0]]["target"][2]
        return Batch([self.rows[i]["instruction"] for i in indices.tolist()], (h // 16, w // 16), one("reference"), one("target"),
                     one("geometry"), one("depth"), tuple(joined["text"]))

    def mean_depth(self) -> Tensor | None:
        """(head width,), of the first rows: where the spatial head starts."""
        if self.gss == "none":
            return None
        return torch.cat([self._get(*inputs["depth"])[0] for inputs in self.inputs[:64]]).float().mean(dim=(0, 1))

    def _inputs(self, path: Path, row: dict) -> dict[str, tuple]:
        """role -> (kind, what it is made of ...): all that an encoding depends on besides the networks."""
        ref, tgt, depth = (resolve(path, row, key) for key in ("ref", "tgt", "depth_tgt"))
        for key, file in (("ref", ref), ("tgt", tgt), ("depth_tgt", depth)):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"Expected the {key} of {row['id']} at {file}, found no file; see python data.py check {path}.")
        try:
            with Image.open(ref) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF: on its side
                width, height = image.size[::-1] if turned else image.size
        except OSError as error:
            raise ValueError(f"The ref of {row['id']}, {ref}, cannot be read as a picture ({error}); see python data.py check {path}.") from error
        size = working_size(height, width, self.preset.side**2, square=not self.preset.keep_aspect)
        found = {"text": ("text", row["instruction"]), "reference": ("latent", ref, size), "target": ("latent", tgt, size)}
        if "vggt" in self.sources:
            found["geometry"] = ("geometry", ref, size)
        if self.gss != "none":
            found["depth"] = (self.gss, tgt, size, depth)
        return found

    def _encoder(self, kind: str, meta: bool = False):
        """A function from what an encoding of this kind is made of to its tensors, each (1, ...). It holds its networks.
        `meta`: without values, to learn the shapes."""
        device = "meta" if meta else self.device
        part = lambda name: build(self.preset, name, "meta", self.dtype) if meta else self._network(name)
        picture = lambda path, size: (torch.empty(1, *size, 3, dtype=torch.uint8, device="meta") if meta else
                                      torch.from_numpy(resize(open_image(path), *size))[None].to(device))
        if kind == "text":
            t5, clip = part("t5"), part("clip")
            return lambda prompt: encode_text(t5, clip, self.tokenizers, [prompt], self.preset)
        if kind == "geometry":
            vggt = part("vggt")
            return lambda path, size: (encode_geometry(vggt, picture(path, size), self.preset),)
        vae = part("vae")
        if kind == "latent":
            return lambda path, size: (encode_image(vae, picture(path, size)),)
        teacher = load_depth(self.weights, device) if "depth" in self.sources and not meta else None

        def depth(path: Path, size: tuple[int, int], exact: Path | None) -> tuple[Tensor]:
            if meta:
                disparity = torch.empty(1, *size, device="meta")
            elif exact:
                disparity = torch.from_numpy(read_disparity(exact))[None].to(device)
            else:
                disparity = depth_image(teacher, picture(path, size))
            return (depth_target(vae, disparity, math.isqrt(self.preset.connector.queries), self.gss),)

        return depth

    def _network(self, name: str):
        if name not in self.networks:
            self.networks[name] = load_part(self.preset, self.sources[name], self.device, self.dtype)
        return self.networks[name]

    @torch.no_grad()
    def _get(self, kind: str, *given) -> list[Tensor]:
        if self.folder is None:
            if kind not in self.encoders:
                self.encoders[kind] = self._encoder(kind)
            with torch.autocast(torch.device(self.device).type, enabled=False):
                return self.encoders[kind](*given)
        name = content_key(kind, *given)
        path, count = self.index[name]
        if path not in self.files:
            self.files[path] = safe_open(path, "pt")
        return [self.files[path].get_tensor(f"{name}.{i}") for i in range(count)]

    # The cache: files of encodings, and cache.json, which says what made each kind.

    def _facts(self, kind: str) -> dict:
        names = {"text": ("t5", "clip"), "latent": ("vae",), "geometry": ("vggt",)}.get(kind, ("vae", "depth"))
        p, facts = self.preset, {name: self.sources[name].digest()[:12] for name in names if name in self.sources} | {"dtype": str(self.dtype)[6:]}
        if kind == "text":
            return facts | {"tokens": [p.t5_length, p.clip_length]}
        facts |= {"side": p.side, "keep_aspect": p.keep_aspect}
        if kind == "geometry":
            return facts | {"layers": p.geometry_layers, "kept": p.geometry_tokens}
        return facts if kind == "latent" else facts | {"spatial tokens": p.connector.queries}

    def _check_cache(self) -> None:
        record = self.folder / "cache.json"
        made = json.loads(record.read_text()) if record.is_file() else {}
        for kind in dict.fromkeys(given[0] for given in self.inputs[0].values()):
            facts = json.loads(to_json(self._facts(kind)))
            differing = [key for key in facts if made.get(kind, facts).get(key) != facts[key]]
            if differing:
                raise ValueError(
                    f"The cache {self.folder} holds encodings ({kind}) made with "
                    + ", ".join(f"{key} {made[kind].get(key)}" for key in differing) + "; this run has "
                    + ", ".join(f"{key} {facts[key]}" for key in differing) + ". Give another --cache, or delete that folder.")
            made[kind] = facts
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = record.with_suffix(".tmp")
        fresh.write_text(json.dumps(made, indent=1))
        fresh.rename(record)

    def _read_index(self) -> dict[str, tuple[Path, int]]:
        """Encoding -> its file and how many tensors it has."""
        index = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    name = key.rsplit(".", 1)[0]
                    index[name] = (path, index.get(name, (path, 0))[1] + 1)
        return index

    def _encode(self) -> None:
        """Makes what the cache lacks, one kind after the other, so that the networks of one kind are in memory at a time."""
        self.index = self._read_index()
        missing: dict[str, dict[str, tuple]] = {}
        for kind, *given in (x for inputs in self.inputs for x in inputs.values()):
            name = content_key(kind, *given)
            if name not in self.index:
                missing.setdefault(kind, {})[name] = given
        if not missing:
            return
        self._report(missing)
        for kind, items in missing.items():
            encode, pending, began, written = self._encoder(kind), {}, time.time(), time.time()
            try:
                for done, (name, given) in enumerate(items.items(), 1):
                    with torch.no_grad():
                        pending |= {f"{name}.{i}": x.cpu().contiguous() for i, x in enumerate(encode(*given))}
                    if sum(x.nbytes for x in pending.values()) >= CACHE_FILE or time.time() - written > CACHE_SECONDS:
                        self._write(kind, pending)
                        pending, written = {}, time.time()
                    left = (time.time() - began) / done * (len(items) - done)
                    print(f"\rencoding {kind}: {done} of {len(items)}, {left / 60:.1f} min left ", end="", flush=True)
            finally:  # an interruption too
                if pending:
                    self._write(kind, pending)
                print()
            del encode
            self.networks.clear()
        self.index = self._read_index()

    def _write(self, kind: str, tensors: dict[str, Tensor]) -> None:
        name = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:16]  # two runs never write one file
        save_tensors(self.folder / f"{kind}-{name}.safetensors", tensors)

    def _report(self, missing: dict[str, dict[str, tuple]]) -> None:
        """Says how much will be written. ValueError if the disk has less."""
        total, parts = 0, []
        for kind, items in missing.items():
            encode, sizes, size = self._encoder(kind, meta=True), {}, 0
            for given in items.values():
                picture = given[1] if kind != "text" else None  # its height and width
                if picture not in sizes:
                    sizes[picture] = sum(x.nbytes for x in encode(*given))
                size += sizes[picture]
            total += size
            parts.append(f"{len(items)} {kind} {human(size)}")
        free = shutil.disk_usage(self.folder).free
        print(f"encodings    {', '.join(parts)}: {human(total)} to write into {self.folder} ({human(free)} free)")
        if total > free:
            raise ValueError(f"The encodings take {human(total)} and {self.folder} has {human(free)} left. Give a --cache "
                             "on a larger disk, fewer rows, or --no-cache.")


def read_disparity(path: Path) -> np.ndarray:
    """A row's `depth_tgt`, 16 bits grey, as disparity (H, W) fp32 in [-1, 1], near = +1."""
    try:
        with Image.open(path) as image:
            values = np.array(image, np.float32)
    except OSError as error:
        raise ValueError(f"Expected a picture of depth at {path}, found a file that cannot be read as one ({error}).") from error
    if values.ndim != 2 or image.mode not in ("I;16", "I"):
        raise ValueError(f"Expected 16-bit grey values (0 far, 65535 near) as depth_tgt in {path}, found a picture of mode {image.mode}.")
    return values / 65535 * 2 - 1


def human(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def content_key(kind: str, *given) -> str:
    """sha256 of what an encoding is made of; of a file, its bytes."""
    found = hashlib.sha256(kind.encode())
    for x in given:
        found.update(b"\0" + (file_digest(x) if isinstance(x, Path) else str(x)).encode())
    return found.hexdigest()


_digests: dict[Path, str] = {}


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, taken once a run."""
    if path not in _digests:
        with open(path, "rb") as file:
            _digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[path]
