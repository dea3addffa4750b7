"""The choice between Triton and PyTorch, and the MMDiT with either.    pytest tests/test_kernels.py

Triton's kernels run in its interpreter here (tests/conftest.py). Each kernel has its own test file.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels
from model.mmdit import MMDiT, MMDiTConfig, position_ids, rope_table

pytest.importorskip("triton")
import interpreter  # noqa: E402, F401  mends what the interpreter gets wrong
CONFIG = MMDiTConfig(16, 24, 48, 64, 4.0, 2, 2, 2, (4, 14, 14))


@pytest.fixture(autouse=True)
def restore():
    yield
    kernels.choose()


class Ops(TorchDispatchMode):
    """Names of our own ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "spatialdiff":
            self.names.add(op.name().removeprefix("spatialdiff::"))
        return op(*args, **(kwargs or {}))


def step(mmdit, checkpoint=False):
    """Velocity, spatial tokens and gradients of the inputs and of every parameter; and which of our ops ran."""
    g = torch.Generator().manual_seed(1)
    shapes = {"txt": (2, 5, 48), "target": (2, 12, 16), "reference": (2, 12, 16), "spatial": (2, 4, 64), "pooled": (2, 24)}
    given = {name: torch.randn(shape, generator=g).requires_grad_() for name, shape in shapes.items()}
    grid = torch.arange(4), torch.arange(3)
    ids = [torch.zeros(5, 3), position_ids(0, *grid), position_ids(1, *grid), position_ids(2, torch.arange(2) * 3.0, torch.arange(2) * 2.0)]
    pe = rope_table(torch.cat(ids), CONFIG.axes_dim, CONFIG.theta)
    mmdit.checkpoint_blocks = checkpoint
    mmdit.zero_grad()
    with Ops() as ops:
        mods = mmdit.modulations(torch.tensor([0.7, 0.2]), torch.tensor([2.5, 1.0]), given["pooled"])
        velocity, spatial = mmdit(given["txt"], given["target"], given["reference"], given["spatial"], pe, mods)
        (velocity.square().sum() + spatial.square().sum()).backward()
    gradients = {name: x.grad for name, x in given.items()} | {name: p.grad.clone() for name, p in mmdit.named_parameters()}
    return {"velocity": velocity.detach(), "spatial tokens": spatial.detach()} | gradients, ops.names


@pytest.fixture
def mmdit():
    g = torch.Generator().manual_seed(0)
    mmdit = MMDiT(CONFIG)
    for name, p in mmdit.named_parameters():
        p.data.normal_(1.0 if name.endswith(".scale") else 0.0, 0.1, generator=g)
    return mmdit


@pytest.mark.parametrize("checkpoint", [False, True])
def test_mmdit_with_kernels_equals_mmdit_without(mmdit, checkpoint):
    expected, ops = step(mmdit)
    assert not ops
    kernels.choose("triton", fused=True)
    found, ops = step(mmdit, checkpoint)
    assert {"attention", "attention_backward", "qk_norm_rope", "qk_norm_rope_backward", "modulate", "residual_modulate",
            "modulate_backward"} <= ops
    for name, truth in expected.items():
        assert (found[name] - truth).abs().max() <= 1e-5 * truth.abs().max(), name


def test_choice(monkeypatch):
    cpu = torch.device("cpu")
    assert kernels.describe(cpu) == "PyTorch (no Triton on cpu)"
    kernels.choose("triton", fused=True)
    assert kernels.describe(cpu) == "Triton; attention: triton"
    with pytest.raises(ValueError, match="must be one of auto, triton, sdpa, not flash"):
        kernels.choose("flash")
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs a GPU"):  # also where there is one, but --device is another
        kernels.choose("triton", device=cpu)
    kernels.choose("triton", device=torch.device("cuda"))


def test_timing_under_activation_checkpointing(monkeypatch):
    """The tensors that a timed attention saves are not the checkpoint's: with the same ones in both passes it goes on."""
    class Event:
        def __init__(self, **_): pass
        record = synchronize = lambda self: None
        elapsed_time = lambda self, other: 1.0

    def layer(x):
        q = x.view(1, 5, 2, 32)
        kernels.faster_attention(q, q, q)
        return x.sin().cos()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(kernels, "_faster", {})
    x = torch.randn(5, 64, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert kernels._faster
    torch.testing.assert_close(x.grad, -x.sin().sin() * x.cos())


def test_widths_without_a_kernel_run_in_pytorch():
    """Head width 24 and fp64: the references take over, whatever was chosen."""
    kernels.choose("triton", fused=True)
    with Ops() as ops:
        q = torch.randn(1, 3, 2, 24)
        kernels.attention(q, q, q)
        kernels.qk_norm_rope([torch.randn(1, 3, 3, 2, 24)], [torch.ones(24)] * 2, torch.zeros(3, 12, 2))
        x = torch.randn(1, 3, 64, dtype=torch.float64)
        kernels.modulate(x, x[:, :1], x[:, :1])
    assert not ops.names


@pytest.mark.parametrize("how", ["in place", "with gradients", "traced", "bf16"])
def test_gelu(how):
    """Every form against float64, far values too; [attn, gelu(mlp)] is the same beside attn."""
    x = torch.cat((torch.linspace(-9, 9, 1001), torch.tensor([-1e20, -40.0, 40.0, 1e20]))).view(1, 3, -1)
    attn = torch.arange(6.0).view(1, 3, 2)
    if how == "bf16":
        x, attn = x.bfloat16(), attn.bfloat16()
    u = (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
    truth = 0.5 * x.double() * (1 + torch.tanh(u))
    both = lambda attn, x: (kernels.gelu(x), kernels.beside_gelu(attn, x))  # noqa: E731
    both = torch.compile(both, backend="eager", fullgraph=True) if how == "traced" else both
    with torch.set_grad_enabled(how == "with gradients"):
        alone, joint = both(attn, x.clone())
    torch.testing.assert_close(alone.double(), truth, rtol=1e-2 if how == "bf16" else 1e-6, atol=1e-2 if how == "bf16" else 1e-6)
    assert torch.equal(joint[..., :2], attn) and torch.equal(joint[..., 2:], alone)
