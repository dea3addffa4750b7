"""modulate and residual_modulate against float64: the Triton kernels in the interpreter and the references.

    pytest tests/test_modulate.py
"""

import pytest
import torch

from kernels.modulate import (
    modulate_reference,
    modulate_triton,
    residual_modulate_reference,
    residual_modulate_triton,
)

triton = pytest.importorskip("triton")
import interpreter  # noqa: E402, F401

TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
CASES = [(1, 1, 8), (2, 2, 64), (1, 17, 72), (2, 33, 1016)]  # B, N, C
FUNCTIONS = {"triton": (modulate_triton, residual_modulate_triton),
             "reference": (modulate_reference, residual_modulate_reference)}  # fmt: skip


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def inputs(B, N, C, dtype, offset=0.0):
    """x, gate, y, shift, scale as leaves: views of wider tensors that are NaN elsewhere."""
    generator = torch.Generator().manual_seed(N + C)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    leaves = []
    for values in (draw(B, N, C) * 2 + offset, draw(B, 1, C), draw(B, N, C), draw(B, 1, C), draw(B, 1, C)):
        wide = torch.full((B, values.shape[1] + 2, C + 32), torch.nan, dtype=dtype)
        leaves.append(wide[:, 1:-1, 16 : 16 + C].copy_(values).detach().requires_grad_())
    return leaves, (draw(B, N, C).to(dtype), draw(B, N, C).to(dtype))


def float64(h, shift, scale):
    h = h.double()
    h = h - h.mean(-1, keepdim=True)
    return (1 + scale.double()) * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() + shift.double()


@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_modulate(backend, dtype, case):
    (x, _, _, shift, scale), (dout, _) = inputs(*case, dtype)
    expected = float64(x, shift, scale)
    out = FUNCTIONS[backend][0](x, shift, scale)
    assert out.dtype == dtype and out.is_contiguous()
    grads = torch.autograd.grad(out, (x, shift, scale), dout)
    expected_grads = torch.autograd.grad(expected, (x, shift, scale), dout.double())
    errors = [relative(a, b) for a, b in zip((out, *grads), (expected, *expected_grads))]
    print("errors: " + " ".join(f"{e:.1e}" for e in errors))  # shown by pytest -s
    assert max(errors) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_residual_modulate(backend, dtype, case):
    leaves, douts = inputs(*case, dtype)
    x, gate, y, shift, scale = leaves
    exact = x.double() + gate.double() * y.double()
    rounded = exact + (exact.to(dtype).double() - exact).detach()  # LayerNorm reads what the next layers will
    expected = (exact, float64(rounded, shift, scale))
    out = FUNCTIONS[backend][1](x, gate, y, shift, scale)
    grads = torch.autograd.grad(out, leaves, douts)
    expected_grads = torch.autograd.grad(expected, leaves, [d.double() for d in douts])
    errors = [relative(a, b) for a, b in zip((*out, *grads), (*expected, *expected_grads))]
    print("errors: " + " ".join(f"{e:.1e}" for e in errors))
    # autograd adds the two gradients of h in 16 bits: up to three roundings where the kernel rounds once
    assert max(errors) <= TOLERANCE[dtype] * (3 if backend == "reference" and dtype != torch.float32 else 1)


def test_large_mean():
    """The variance is taken around the mean: a mean 100 times the spread costs no digits."""
    (x, _, _, shift, scale), _ = inputs(1, 17, 128, torch.float32, offset=200.0)
    expected = float64(x, shift, scale)
    assert relative(modulate_triton(x, shift, scale), expected) <= 5e-5  # 1 / 2^24 of the mean is 1e-5 of the spread
    x = torch.full((1, 2, 64), 3.0)  # no variance at all: eps keeps it finite
    assert torch.equal(modulate_triton(x, shift[..., :64], scale[..., :64]), shift[..., :64].expand(1, 2, 64))


def test_fused_equals_unfused():
    """Also where rounding of the residual matters."""
    (x, gate, y, shift, scale), _ = inputs(2, 33, 1016, torch.bfloat16)
    h, out = residual_modulate_triton(x, gate, y, shift, scale)
    assert torch.equal(out, modulate_triton(h, shift, scale))


def test_nothing_is_written_outside(monkeypatch):
    """Every buffer the launchers allocate lies between guard bands; long enough for a program of several tokens, the
    last of them incomplete."""
    bands = []

    def guarded(size):
        buffer = torch.full((size.numel() + 2048,), 77.0)
        bands.append(buffer)
        return buffer[1024:-1024].view(size)

    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: guarded(x.shape))
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: guarded(torch.Size(size)))
    leaves, douts = inputs(1, 513, 24, torch.float32)
    grads = torch.autograd.grad(residual_modulate_triton(*leaves), leaves, douts)
    monkeypatch.undo()
    expected = torch.autograd.grad(residual_modulate_reference(*leaves), leaves, douts)
    assert max(map(relative, grads, expected)) <= 2e-6
    assert len(bands) == 5  # h, out, dx, dy, partial sums
    for buffer in bands:
        assert (buffer[:1024] == 77).all() and (buffer[-1024:] == 77).all() and (buffer[1024:-1024] != 77).all()


def test_opcheck_and_gradcheck():
    leaves, _ = inputs(1, 3, 16, torch.float32)
    x, gate, y, shift, scale = leaves
    torch.library.opcheck(modulate_triton, (x, shift, scale))
    torch.library.opcheck(residual_modulate_triton, tuple(leaves))
    tolerance = dict(eps=1e-2, atol=2e-2, rtol=2e-2, fast_mode=True)
    assert torch.autograd.gradcheck(modulate_triton, (x, shift, scale), **tolerance)
    assert torch.autograd.gradcheck(residual_modulate_triton, tuple(leaves), **tolerance)


def test_meta_tensors_and_compile():
    leaves, _ = inputs(1, 3, 16, torch.float32)
    x, gate, y, shift, scale = leaves
    assert residual_modulate_triton(*(t.detach().to("meta") for t in leaves))[1].shape == x.shape
    torch._dynamo.reset()
    for function in (residual_modulate_triton, residual_modulate_reference):
        h, out = torch.compile(function, backend="aot_eager", fullgraph=True)(*leaves)
        assert relative(out, float64(h, shift, scale)) <= 2e-6


def test_refusals():
    (x, gate, y, shift, scale), _ = inputs(1, 3, 16, torch.float32)
    with pytest.raises(AssertionError, match="multiple of 8"):
        modulate_triton(x[..., :12], shift[..., :12], scale[..., :12])
    with pytest.raises(AssertionError, match="16 bytes"):
        modulate_triton(torch.empty(1, 3, 17)[..., 1:], shift, scale)
    with pytest.raises(AssertionError, match="Modulations"):
        modulate_triton(x, shift[0], scale)
