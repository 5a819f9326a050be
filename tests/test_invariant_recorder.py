"""The recorder, and models in the mode: nothing reaches a kernel not known to be invariant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxpass
from fxpass.invariant.recorder import Recorder

torch.manual_seed(0)


def recorded(call, *args, **kwargs) -> Recorder:
    with torch.no_grad(), fxpass.batch_invariant_mode(), Recorder() as found:
        call(*args, **kwargs)
    return found


def test_what_varies_is_listed_with_its_line() -> None:
    x = torch.randn(2, 3, 8, 8)
    found = recorded(lambda: F.avg_pool2d(x, 3))
    (unknown,) = found.unknown
    assert unknown.operator == "aten.avg_pool2d.default"
    assert "test_invariant_recorder.py:" in str(unknown)


def test_a_call_that_the_mode_leaves_to_torch_is_listed() -> None:
    x = torch.randn(4, 4, dtype=torch.complex64)
    assert [u.operator for u in recorded(lambda: x @ x.mT).unknown] == []  # complex: no floats
    y = torch.randn(3, 4).bfloat16()
    (unknown,) = recorded(lambda: torch.add(y, y, alpha=0.3)).unknown
    assert "alpha" in unknown.reason


def test_outside_the_mode_reductions_are_listed() -> None:
    with Recorder() as found:
        torch.randn(3, 4).sum(-1)
    assert [u.operator for u in found.unknown] == ["aten.sum.dim_IntList"]


def test_a_classifier_with_its_loss() -> None:
    net = torch.nn.Sequential(
        torch.nn.Linear(20, 33), torch.nn.GELU(), torch.nn.LayerNorm(33), torch.nn.SiLU(),
        torch.nn.Linear(33, 7, bias=False), torch.nn.GroupNorm(1, 7), torch.nn.Softmax(-1),
    )  # fmt: skip

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = net(x)
        return F.cross_entropy(z, y) + F.log_softmax(z, 0).mean() + z.std() + z.logsumexp(0).sum()

    found = recorded(loss, torch.randn(5, 20), torch.randint(0, 7, (5,)))
    assert found.unknown == []
    assert found.seen["aten.addmm.default"] == 1


NAMES = ("Llama", "Qwen3", "Gemma", "GPT2", "Mixtral")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_language_models(name: str, attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0,
    }  # fmt: skip
    if name == "GPT2":
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = recorded(model, torch.randint(0, 99, (3, 11)))
    assert {str(u) for u in found.unknown} == set()


def test_a_block_of_a_diffusion_transformer() -> None:
    attention = pytest.importorskip("diffusers.models.attention")
    block = attention.BasicTransformerBlock(32, 4, 8, cross_attention_dim=16).eval()
    found = recorded(block, torch.randn(2, 9, 32), encoder_hidden_states=torch.randn(2, 5, 16))
    assert {str(u) for u in found.unknown} == set()
