"""Attention without a GPU: its bits in Triton's interpreter, and what it compiles to."""

import re

import pytest
import torch
from triton_offline import (
    TARGETS,
    assert_machine_code,
    compiled,
    own_cache,  # noqa: F401 - a fixture
)
from triton_offline import interpreter as interpreted

from fxpass.kernels.invariant import attention_plan
from fxpass.kernels.invariant.mm_schedule import Device

triton = pytest.importorskip("triton")

H200 = TARGETS[1]
BF16 = torch.bfloat16
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
WHOLE = (
    "rows lq lk heads group mask_batch mask_head mask_row mask_col out_batch out_head out_row"
    " q_batch q_head q_row k_batch k_head k_row v_batch v_head v_row"
).split()


interpreter = interpreted("invariant_attention_interpreted.py")


def built(lq, lk, head, dtype, target, causal=False, mask="none"):
    """The kernel for aligned tensors: 2 sequences, 32 heads of q, 8 of k."""
    from fxpass.kernels.invariant import attention_triton

    q, k = (torch.empty(2, heads, size, head, dtype=dtype, device="meta")
            for heads, size in ((32, lq), (8, lk)))  # fmt: skip
    found = attention_plan.schedule(q, k, head)
    constants = {
        "PACK": found.pack,
        "BLOCK_M": found.block_m,
        "LEVELS": attention_plan.block_n(head, dtype).bit_length() - 1,
        "CHUNK": attention_plan.CHUNK,
        "D": head,
        "DV": head,
        "D_PAD": attention_plan.padded(head),
        "DV_PAD": attention_plan.padded(head),
        "CAUSAL": causal,
        "MASK": mask,
        "SPLIT": found.split,
    }
    types = dict.fromkeys(WHOLE, "i32") | dict.fromkeys("qkv", POINTERS[dtype])
    types |= {"out": "*fp32" if found.split else POINTERS[dtype], "scale": "fp32"}
    types |= {"mask": {"bool": "*u8"}.get(mask, POINTERS[dtype]), "lse": "*fp32", "m_out": "*fp32"}
    options = attention_plan.options(found, mask, target[0] == "hip")
    return compiled(attention_triton.attention, types, constants, target, **options)


CASES = {
    "prefill": (1024, 1024, 128, torch.bfloat16, True, "none"),
    "decode": (1, 4096, 128, torch.bfloat16, False, "none"),
    "masked": (40, 100, 80, torch.float16, False, "bool"),
    "wide": (256, 256, 256, torch.bfloat16, False, "add"),
    "narrow": (256, 256, 16, torch.float16, False, "none"),
    "float32": (64, 64, 128, torch.float32, True, "none"),
}


# Every case compiles for every target; a kernel takes seconds, so each target has two or three.
WHERE = {
    "prefill": ("80", "90", "gfx942"),
    "decode": ("90", "gfx950"),
    "masked": ("gfx942",),
    "wide": ("80", "gfx942"),
    "narrow": ("gfx950",),
    "float32": ("90", "100"),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name in CASES for target in TARGETS if str(target[1]) in WHERE[name]],
)
def test_compiles(name, target):
    lq, lk, head, dtype, causal, mask = CASES[name]
    found = built(lq, lk, head, dtype, target, causal, mask)
    assert_machine_code(found, target)
    limit = {"80": 163, "90": 227, "100": 227, "gfx942": 64, "gfx950": 160}[str(target[1])]
    assert found.metadata.shared <= limit * 1024, found.metadata.shared


@pytest.mark.parametrize("target", [TARGETS[2], TARGETS[4]], ids=lambda target: str(target[1]))
def test_merge_compiles(target):
    from fxpass.kernels.invariant import attention_triton
    from fxpass.kernels.invariant.triton_math import FIXED

    types = dict.fromkeys(("parts", "sums", "tops", "lse"), "*fp32") | {"out": "*bf16"}
    types |= dict.fromkeys(
        ("rows", "chunks", "lq", "heads", "out_batch", "out_head", "out_row"), "i32"
    )
    constants = {"ROWS": 4, "DV": 128, "DV_PAD": 128}
    found = compiled(attention_triton.merge, types, constants, target, num_warps=4, **FIXED)
    assert_machine_code(found, target)


def test_matrix_instructions():
    """Tensor cores where there are any for the dtype, and float32 as float32, not tf32."""
    prefill, decode, single = (
        built(*CASES[name][:4], H200, *CASES[name][4:]).asm["ptx"]
        for name in ("prefill", "decode", "float32")
    )
    assert "wgmma.mma_async" in prefill
    assert "mma.sync" in decode
    assert "tf32" not in single
    assert "mma" not in single


@pytest.mark.parametrize("target", [*TARGETS[:2], TARGETS[3]], ids=lambda target: str(target[1]))
def test_a_mask_changes_no_order_of_k(target):
    """What a matrix instruction adds at once follows kWidth, which Triton takes from loads."""
    widths = [
        set(re.findall(r"kWidth = \d+", built(1, 600, 64, BF16, target, False, mask).asm["ttgir"]))
        for mask in ("none", "bool", "add")
    ]
    assert len(widths[0]) == 1
    assert widths[1:] == widths[:1] * 2


def test_one_instruction_where_tiles_would_choose_it():
    """Blackwell has one instruction for large tiles and another for small ones."""
    for lq, lk in ((1, 5000), (40, 100), (1024, 1024)):
        q, k = (torch.empty(2, heads, size, 128, dtype=BF16, device="meta")
                for heads, size in ((32, lq), (8, lk)))  # fmt: skip
        blackwell, consumer = (
            attention_plan.schedule(q, k, 128, Device("nvidia", major, 132, 0).mixes_instructions)
            for major in (10, 12)
        )
        assert blackwell.block_m == 128
        assert consumer == attention_plan.schedule(q, k, 128)


@pytest.mark.parametrize(("family", "block_m"), [("amd", 16), ("nvidia", 128)])
def test_the_one_tile_is_nvidia_s(monkeypatch, family, block_m):
    """RDNA's major version is 10 to 12 as well."""
    device = Device(family, 11, 60, 64 << 10)
    monkeypatch.setattr(attention_plan, "device_of", lambda index: device)
    asked = []
    monkeypatch.setattr(attention_plan, "_tiles", lambda *given: asked.append(given[6]))
    q, k = (torch.empty(1, heads, 1, 128, dtype=BF16, device="meta") for heads in (32, 8))
    attention_plan.Plan(q, k, k, None, False, None, aligned=True)
    assert asked[0].block_m == block_m


def test_bits_in_the_interpreter(interpreter):
    printed, _ = interpreter.communicate()
    assert interpreter.returncode == 0, printed
