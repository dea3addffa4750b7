"""The rendered world as training data: files of pictures and exact depth, and their encodings, which are kept beside them
under the hash of the network that made them."""

import hashlib
import json
import math
import multiprocessing
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import scenes
from model.weights import read_tensors, save_tensors, to_json
from spatialdiff import depth_target, encode_geometry, encode_image
from triples.encode import Batch

SHARD = 250  # scenes a file
OTHER_SIDE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class World:
    """Which rendered scenes: `moves` moves and `others` generic edits of every scene, `shards` files of SHARD scenes."""

    level: str = "plain"
    size: int = 128
    moves: int = 2
    others: int = 1
    shards: int = 32

    def fingerprint(self) -> str:
        """Changes when the renderer or the layout rules change: a few small pictures, more layouts and edits."""
        probe = hashlib.sha256(f"{self.level} {self.size} {self.moves} {self.others} {SHARD}".encode())
        for seed in range(20):
            scene, edits = scenes.training_edits(seed, self.level, self.moves, self.others)
            for part in (scene, *(edit.target for edit in edits)):
                probe.update(" ".join(f"{t.name} {t.a:.3f} {t.b:.3f} {t.z:.3f} {t.size:.3f}" for t in part.objects).encode())
            probe.update(" ".join(edit.instruction for edit in edits).encode())
            if seed < 3:
                probe.update((scenes.render(scene, 32).rgb // 8).tobytes())
        return probe.hexdigest()[:12]


def render_shard(task: tuple[World, int, Path]) -> None:
    """Writes one file of scenes: ref (R, H, W, 3), tgt (E, H, W, 3) uint8, their z-depths fp16, root (E,) int64."""
    world, index, path = task
    ref, ref_depth, tgt, tgt_depth, root, edits = [], [], [], [], [], []
    for r in range(SHARD):
        scene, scene_edits = scenes.training_edits(index * SHARD + r, world.level, world.moves, world.others)
        picture = scenes.render(scene, world.size)
        ref.append(picture.rgb)
        ref_depth.append(picture.depth)
        for edit in scene_edits:
            picture = scenes.render(edit.target, world.size)
            tgt.append(picture.rgb)
            tgt_depth.append(picture.depth)
            root.append(r)
            edits.append((edit.kind, edit.relation, edit.instruction))
    tensors = {
        "ref": torch.from_numpy(np.stack(ref)),
        "tgt": torch.from_numpy(np.stack(tgt)),
        "ref_depth": torch.from_numpy(np.stack(ref_depth)).half(),
        "tgt_depth": torch.from_numpy(np.stack(tgt_depth)).half(),
        "root": torch.tensor(root),
    }
    save_tensors(path, tensors, {"edits": to_json(edits)})


def scene_shards(world: World, cache: Path) -> list[Path]:
    """Files of the world's scenes under `cache`; those not there yet are rendered, one process per core."""
    folder = Path(cache) / f"scenes-{world.level}-{world.fingerprint()}"
    paths = [folder / f"{i:04}.safetensors" for i in range(world.shards)]
    missing = [(world, i, path) for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        start = time.time()
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), len(missing))) as pool:
            for done, _ in enumerate(pool.imap_unordered(render_shard, missing), 1):
                left = (time.time() - start) / done * (len(missing) - done)
                print(f"\rrendering scenes: {done * SHARD} of {len(missing) * SHARD}, {left:.0f} s left ", end="", flush=True)
        print()
    return paths


def mirror_shards(paths: list[Path]) -> list[Path]:
    """The same scenes seen in a mirror, left and right exchanged in their words: files beside the given ones, made if not
    there yet. They cost no rendering. True to the levels whose light comes from anywhere, which leaves out plain."""
    mirrored = [path.with_stem(f"{path.stem}-mirror") for path in paths]
    for path, made in zip(paths, mirrored):
        if not made.is_file():
            tensors, metadata = read_tensors(path)
            edits = [(kind, *(re.sub(r"\b(left|right)\b", lambda m: OTHER_SIDE[m[0]], text) for text in words))
                     for kind, *words in json.loads(metadata["edits"])]
            flipped = {name: x if name == "root" else x.flip(2).contiguous() for name, x in tensors.items()}
            save_tensors(made, flipped, {"edits": to_json(edits)})
    return mirrored


def load_images(shards: list[Path], raw_depth: bool = False) -> tuple[Tensor, Tensor]:
    """All pictures (N, H, W, 3) uint8 of the files, references and targets, and their depths (N, H, W) fp16: as
    disparity in [-1, 1], or as they are."""
    files = [read_tensors(path)[0] for path in shards]
    images = torch.cat([f[key] for f in files for key in ("ref", "tgt")])
    depths = torch.cat([f[key] for f in files for key in ("ref_depth", "tgt_depth")])
    return images, depths if raw_depth else disparity(depths)


def disparity(depth: Tensor) -> Tensor:
    """z-depths (N, H, W) -> disparity pictures fp16, each from -1 (farthest) to +1 (nearest): scenes.disparity."""
    return torch.from_numpy(np.stack([scenes.disparity(d) for d in depth.float().numpy()])).half()


@dataclass
class SceneTriples:
    """Encodings in memory, fp16. References and what belongs to them are stored once for all their edits."""

    reference: Tensor  # (R, N, C) packed latents
    target: Tensor  # (E, N, C)
    root: Tensor  # (E,) row of `reference` and `geometry`
    instructions: list[str]  # E
    geometry: Tensor | None = None  # (R, l', d')
    depth: Tensor | None = None  # (E, K, head width)

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, indices: Tensor) -> Batch:
        root, side = self.root[indices], math.isqrt(self.target.shape[1])
        return Batch([self.instructions[i] for i in indices.tolist()], (side, side), self.reference[root], self.target[indices],
                     None if self.geometry is None else self.geometry[root], None if self.depth is None else self.depth[indices])

    def mean_depth(self) -> Tensor | None:
        """(head width,): where the spatial head starts."""
        return None if self.depth is None else self.depth.float().mean(dim=(0, 1))


def encode_scenes(shards: list[Path], vae, vggt, preset, gss: str, kinds: tuple[str, ...], amp: bool, hashes: dict,
                  with_moves: set[Path] | None = None) -> SceneTriples:
    """Triples of the shards' edits of these kinds; moves of the shards in `with_moves` only, if given.

    vggt None: no geometry; gss "none": no depth. Encodings are kept beside each shard, one file for each network, named
    by the hash of its weights (`hashes`: part -> hash), so that every stage finds what another one has made.
    """
    grid, precision = round(preset.connector.queries**0.5), "bf16" if amp else "fp32"
    wanted = {"reference": (f"{hashes['vae']}-reference", "ref", lambda x: encode_image(vae, x))}
    wanted["target"] = (f"{hashes['vae']}-target", "tgt", lambda x: encode_image(vae, x))
    if vggt is not None:
        kept = f"{preset.geometry_tokens}{','.join(map(str, preset.geometry_layers))}"
        wanted["geometry"] = (f"{hashes['vggt']}-geometry-{kept}", "ref", lambda x: encode_geometry(vggt, x, preset))
    if gss != "none":
        encode_depth = lambda depths: depth_target(vae, disparity(depths.cpu()).to(depths.device), grid, gss)
        wanted["depth"] = (f"{hashes['vae']}-{gss}{grid}", "tgt_depth", encode_depth)

    device, rows, parts, instructions = next(vae.parameters()).device, 0, [], []
    for n, path in enumerate(shards):
        raw, part = None, {}
        for name, (key, source, encode) in wanted.items():
            kept = path.with_name(f"{path.stem}.{key}-{precision}.safetensors")
            if not kept.is_file():
                raw = raw or read_tensors(path)[0]
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    pieces = [encode(piece.to(device)).half().cpu() for piece in raw[source].split(16)]
                save_tensors(kept, {name: torch.cat(pieces)})
            part |= read_tensors(kept)[0]
        if raw:
            print(f"\rencoding: {n + 1} of {len(shards)} files ", end="\n" if n + 1 == len(shards) else "", flush=True)
        with safe_open(path, "pt") as file:
            edits, root = json.loads(file.metadata()["edits"]), file.get_tensor("root")
        chosen = [i for i, (kind, _, _) in enumerate(edits) if kind in kinds and (kind != "move" or with_moves is None or path in with_moves)]
        part |= {name: part[name][chosen] for name in ("target", "depth") if name in part}
        parts.append(part | {"root": root[chosen] + rows})
        instructions += [edits[i][2] for i in chosen]
        rows += len(part["reference"])
    return SceneTriples(instructions=instructions, **{name: torch.cat([p[name] for p in parts]) for name in parts[0]})
