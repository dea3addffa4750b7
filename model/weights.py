"""Weights on disk: safetensors in, modules out, strictly; and the one writer of every checkpoint."""

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


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
