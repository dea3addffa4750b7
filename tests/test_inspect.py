"""Budgets of the kernels' machine code, compiled ahead of time for GPUs that need not be there.

`python -m pytest tests/test_inspect.py` tries the reader of machine code on kernels made for it;
`python -m pytest tests/test_inspect.py -m slow` compiles every production launch (about a minute without a cache).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
triton = pytest.importorskip("triton")
if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
    pytest.skip("this build of Triton brings no NVIDIA tools", allow_module_level=True)

TARGETS = ("sm_80", "sm_90", "sm_100")
MATRIX = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "sm_100": {"UTCHMMA"}}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block may have
SHARE = {("sm_80", "forward"): 0.72, ("sm_90", "forward"): 0.64, ("sm_80", "backward"): 0.72, ("sm_90", "backward"): 0.72}
# 32 bits: the fp32 statistics of a row (lse, delta); everything 16-bit moves 128 bits at a time
ATTENTION_ACCESSES = {"LDG.128", "LDGSTS.128", "STG.128", "UTMALDG", "UTMASTG", "LDG.32", "LDGSTS.32", "STG.32"}


def compile_without_interpreter(*command) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def problems(row: dict) -> list[str]:
    """What is wrong with a production kernel; [] if nothing."""
    if "error" in row:
        return [row["error"]]
    direction = "forward" if "forward" in row["kernel"] else "backward"
    target, accesses, found = row["target"], row["accesses"], []
    if row["stack"] or row["spills"]:
        found.append(f"spills: stack {row['stack']}, {row['spills']} accesses")
    if row["shared"] > SHARED[target]:
        found.append(f"{row['shared']} bytes of shared memory")
    if row["atomics"]:
        found.append("atomics")
    if not any(name.startswith(("LDG", "UTMALDG")) for name in accesses):
        found.append("reads nothing")
    if not any(name.startswith(("STG", "UTMASTG")) for name in accesses):
        found.append("writes nothing")
    if row["operation"] == "attention":
        if set(row["matrix"]) != MATRIX[target]:
            found.append(f"matrix instructions {row['matrix']}")
        if not set(accesses) <= ATTENTION_ACCESSES:
            found.append(f"accesses {accesses}")
        # the bar is set for the model's lengths; a ragged tail is peeled off the loop, but crowds its registers
        if (target, direction) in SHARE and row["lengths"] != [3500] and (row["share"] or 0) < SHARE[target, direction]:
            found.append(f"tensor-core share {row['share']}")
    else:
        partial_sums = {"STG.32"} if direction == "backward" else set()  # fp32, one row per program
        if not set(accesses) <= {"LDG.128", "STG.128"} | partial_sums or accesses.get("STG.32", 0) > 1:
            found.append(f"accesses {accesses}")
        if direction == "forward" and row["registers"] > 64:
            found.append(f"{row['registers']} registers")
    return found


@pytest.fixture(scope="module")
def production() -> list[dict]:
    return compile_without_interpreter("-m", "kernels.inspect", "--json", *(f"--target={t}" for t in TARGETS))


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason=f"the budgets are set for Triton 3.9, this is {triton.__version__}: see `python -m kernels.inspect`",
)
def test_every_production_launch_keeps_its_budget(production):
    found = {f"{r['operation']} {r['kernel']} {r['target']} {r['lengths']}": problems(r) for r in production}
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.slow
def test_everything_compiles(production):
    for target in TARGETS:
        for n in (3584, 9728, 3500):
            rows = [r for r in production if r["target"] == target and n in r["lengths"]]
            assert not [r for r in rows if "error" in r]
            for operation, kernels in {"attention": 3, "rope": 2, "modulate": 2, "residual_modulate": 2}.items():
                names = {r["kernel"] for r in rows if r["operation"] == operation}
                assert len(names) == kernels and sum("forward" in name for name in names) == 1, (target, n, operation)


PROBE = """
import json, sys
import torch, triton, triton.language as tl
from kernels.inspect import compiled, describe

@triton.jit
def empty_forward(x_ptr, y_ptr, SIZE: tl.constexpr):
    pass

@triton.jit
def product_forward(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(n):
        x = tl.load(x_ptr + k * SIZE * SIZE + i)
        total = tl.dot(x, x, total)
    tl.store(y_ptr + i, total.to(tl.bfloat16))

@triton.jit
def narrow_forward(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + 2 * i) + tl.load(x_ptr + 2 * i + 1))

@triton.jit
def atomic_backward(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.atomic_add(y_ptr + tl.arange(0, SIZE), tl.load(x_ptr + tl.arange(0, SIZE)).to(tl.float32))

bf16, fp32 = (torch.empty(1 << 16, dtype=d, device="meta") for d in (torch.bfloat16, torch.float32))
launches = {
    "empty": lambda: empty_forward[(1,)](bf16, bf16, 256),
    "product": lambda: product_forward[(1,)](bf16, bf16, 100, 64),
    "spilling": lambda: product_forward[(1,)](bf16, bf16, 100, 256, num_warps=4),
    "narrow": lambda: narrow_forward[(1,)](bf16, bf16, 1024),
    "atomic": lambda: atomic_backward[(1,)](bf16, fp32, 256),
}
for target in ("sm_80", "sm_90", "sm_100"):
    for name, launch in launches.items():
        (kernel,) = compiled(launch, target=target)
        print(json.dumps(dict(name=name, lengths=[3584]) | describe(kernel, target)))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> dict[tuple[str, str], dict]:
    script = tmp_path_factory.mktemp("probe") / "probe.py"
    script.write_text(PROBE)
    return {(row["name"], row["target"]): row for row in compile_without_interpreter(script)}


@pytest.mark.parametrize("target", TARGETS)
def test_bad_kernels_are_found(probes, target):
    found = lambda name, operation: " | ".join(problems(probes[name, target] | dict(operation=operation)))  # noqa: E731
    assert all(what in found("empty", "attention") for what in ("matrix instructions {}", "reads nothing", "writes nothing"))
    assert "reads nothing" in found("empty", "rope") and "accesses" in found("narrow", "rope")
    assert "atomics" in found("atomic", "modulate") and "spills" not in found("product", "attention")
    if target != "sm_100":  # whose accumulators are in tensor memory
        assert "spills" in found("spilling", "attention")


@pytest.mark.parametrize("target, name, flops_per_warp", [
    ("sm_80", "HMMA", 2 * 16 * 8 * 16), ("sm_90", "HGMMA", 2 * 64 * 64 * 16 // 4),
])  # fmt: skip
def test_the_loop_holds_the_products_of_one_iteration(probes, target, name, flops_per_warp):
    row = probes["product", target]
    assert row["matrix"] == {name: 2 * 64**3 // (flops_per_warp * row["warps"])}
    assert 0 < row["share"] < 1 and 0 < row["loop"] < row["instructions"]


def test_it_refuses_to_run_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "kernels.inspect"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr and "Traceback" not in done.stderr
