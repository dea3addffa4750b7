"""The fused operations of the MMDiT's core, and the only place that chooses how each runs.

    qk_norm_rope       RMSNorm and rotary embedding of q and k, both streams into one joint buffer
    attention          softmax(q k^T / sqrt(D)) v
    modulate           (1 + scale) LayerNorm(x) + shift
    residual_modulate  x + gate y, and modulate of it
    gelu, beside_gelu  torch's own, or faster steps on a CPU

All but the last have a file with the mathematics, a PyTorch reference and Triton kernels. On a CPU the references run;
Triton need not be installed. On a GPU norm-RoPE and modulation run in Triton, and attention in whatever is faster there:
Triton or torch's scaled_dot_product_attention, timed once for each shape (the latter in fp32, which has no matrix units
without rounding, and in compiled graphs, where nothing can be timed). `choose` overrides that.
"""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kernels.attention import attention_reference, attention_triton
from kernels.backend import triton
from kernels.gelu import beside_gelu, gelu  # noqa: F401  for the model
from kernels.modulate import modulate_reference, modulate_triton, residual_modulate_reference, residual_modulate_triton
from kernels.rope import qk_norm_rope_reference, qk_norm_rope_triton

ATTENTION = ("auto", "triton", "sdpa")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_attention, _fused = "auto", None  # set by `choose`
_faster: dict[tuple, str] = {}  # what `auto` measured


def choose(attention: str = "auto", fused: bool | None = None, device: torch.device | None = None) -> None:
    """How to run from now on. attention: one of ATTENTION; fused: norm-RoPE and modulation in Triton (None: on a GPU);
    device: where it will (None: a GPU if there is one).

    ValueError for what cannot run. On a CPU Triton's kernels run in its interpreter only (TRITON_INTERPRET=1): a test.
    """
    global _attention, _fused
    if attention not in ATTENTION:
        raise ValueError(f"--attention must be one of {', '.join(ATTENTION)}, not {attention}.")
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if attention == "triton" and not on_gpu and (triton is None or not triton.knobs.runtime.interpret):
        raise ValueError("--attention triton needs a GPU; leave it at auto.")
    if triton is None and (attention == "triton" or fused):
        raise ValueError("Triton is not installed (it exists for Linux); leave --attention at auto.")
    _attention, _fused = attention, fused


def describe(device: torch.device) -> str:
    """What runs on `device`, and why, in one line."""
    if _fused is None and device.type != "cuda":
        return f"PyTorch (no Triton on {device.type})"
    if triton is None:
        return "PyTorch (Triton is not installed)"
    return "Triton; attention: " + {"auto": "the faster of Triton and SDPA, timed once a shape"}.get(_attention, _attention)


def in_triton(x: Tensor) -> bool:
    """Whether norm-RoPE and modulation of x run in Triton."""
    wanted = x.device.type == "cuda" if _fused is None else _fused
    return wanted and triton is not None and x.dtype in KERNEL_DTYPES


def qk_norm_rope(streams: list[Tensor], scales: list[Tensor], pe: Tensor) -> Tensor:
    """See kernels/rope.py."""
    fits = in_triton(streams[0]) and streams[0].shape[-1] in (32, 64, 128, 256)
    return (qk_norm_rope_triton if fits else qk_norm_rope_reference)(streams, scales, pe)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See kernels/modulate.py."""
    return (modulate_triton if in_triton(x) else modulate_reference)(x, shift, scale)


def residual_modulate(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See kernels/modulate.py."""
    return (residual_modulate_triton if in_triton(x) else residual_modulate_reference)(x, gate, y, shift, scale)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, N, H, D), k, v (B, M, H, D), any strides -> (B, N, H, D). See kernels/attention.py."""
    how = _attention
    if triton is None or v.dtype not in KERNEL_DTYPES or v.shape[-1] not in (32, 64, 128):
        how = "sdpa"
    elif how == "auto":
        how = "sdpa" if v.device.type != "cuda" or v.dtype == torch.float32 else faster_attention(q, k, v)
    return (attention_triton if how == "triton" else attention_reference)(q, k, v)


def faster_attention(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Times both ways once for this shape on this GPU, forward and, where gradients are kept, backward; says so."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    key = (*q.shape, k.shape[1], v.dtype, grad, v.device)
    if key in _faster or torch.compiler.is_compiling():  # a traced graph cannot be timed: what was measured, or SDPA
        return _faster.get(key, "sdpa")
    seconds, unchanged = {}, lambda x: x
    for name, run in (("triton", attention_triton), ("sdpa", attention_reference)):
        inputs = [x.detach().requires_grad_(grad) for x in (q, k, v)]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        with saved_tensors_hooks(unchanged, unchanged):  # important: activation checkpointing must not count what is saved here
            for i in range(8):
                if i == 3:  # compiled and warm
                    start.record()
                out = run(*inputs)
                if grad:
                    torch.autograd.grad(out, inputs, out)
        end.record()
        end.synchronize()
        seconds[name] = start.elapsed_time(end) / 5
    _faster[key] = min(seconds, key=seconds.get)
    print(f"attention of {tuple(q.shape)} over {k.shape[1]} keys: Triton {seconds['triton']:.2f} ms, SDPA {seconds['sdpa']:.2f} ms"
          f"{' with gradients' * grad}; {_faster[key]} is used")
    return _faster[key]
