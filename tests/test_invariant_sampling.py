"""The example: a request gets the same tokens alone and inside a shuffled batch."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "same_tokens.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_tokens_in_eager_mode(example, dtype: torch.dtype) -> None:
    assert example["compare"]("cpu", dtype, "eager") == (0, 0)


def test_same_tokens_compiled(example) -> None:
    assert example["compare"]("cpu", torch.float32, "compiled") == (0, 0)


def test_tokens_follow_the_seed_and_the_prompt(example) -> None:
    """Or equal tokens would say nothing."""
    model = example["make"]("cpu", torch.float32)
    request = example["Request"]
    made = [example["decode"](model, model, [request((1, 2), seed)])[0][0] for seed in (None, 1, 2)]
    assert len({tuple(tokens) for tokens in made}) == 3
    other = example["decode"](model, model, [request((3, 2))])[0][0]
    assert other[2:] != made[0][2:]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_tokens_on_a_gpu(example, how: str, dtype: torch.dtype) -> None:
    assert example["compare"]("cuda", dtype, how) == (0, 0)
