"""The tiny models and the eager norm counter that the demo and the coverage benchmark rely on."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from zoo import dif, hf
from zoo.compare import batch_invariant, different
from zoo.shrink import Size
from zoo.watch import count_graph_norms, count_norms

HIDDEN = 16


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def centred_first(x):
    return rms(x - x.mean(-1, keepdim=True))


def other_tensor(x):
    return torch.sin(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def partial(x):
    return x * torch.rsqrt(x[..., :8].pow(2).mean(-1, keepdim=True) + 1e-6)


def in_place(x):
    y = x.clone()
    row = y.pow(2).mean(-1, keepdim=True)
    y.add_(1)
    return y * torch.rsqrt(row + 1e-6)


def clipped(x):
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (3 / (length + 1e-6)).clamp(max=1)


FORMS = {
    "rsqrt": (rms, 1),
    "square by product": (lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6), 1),
    "pow -0.5": (lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).pow(-0.5), 1),
    "divided by sqrt": (lambda x: x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt(), 1),
    "one over sqrt": (lambda x: x * (1 / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()), 1),
    "in float32": (lambda x: rms(x.float()).to(x.dtype), 1),
    "row cast first": (lambda x: x * rms_row(x.float()).to(x.dtype), 1),
    "normalize": (lambda x: F.normalize(x, dim=-1), 1),
    "rms_norm": (lambda x: F.rms_norm(x, (HIDDEN,)), 1),
    "twice": (lambda x: rms(rms(x)), 2),
    "grouped": (lambda x: rms(x.unflatten(-1, (2, -1))).flatten(-2), 1),
    "layer norm": (lambda x: F.layer_norm(x, (HIDDEN,)), 0),
    "layer norm by hand": (centred_first, 0),
    "another tensor scaled": (other_tensor, 0),
    "partial variance": (partial, 0),
    "x changed in between": (in_place, 0),
    "rows clipped in length": (clipped, 0),
    "standardised": (lambda x: x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6), 0),
}


def rms_row(x):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Form(torch.nn.Module):
    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(x)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(4, HIDDEN), (1, 1, HIDDEN)], ids=str)
def test_counter_tells_norms_from_lookalikes(name, shape):
    formula, expected = FORMS[name]
    x = torch.randn(shape).to(torch.bfloat16)
    assert count_norms(Form(formula), x).executed == expected


def test_module_that_is_called_norm_and_holds_none_is_reported():
    class FakeRMSNorm(torch.nn.Module):
        def forward(self, x):
            return x * 2

    count = count_norms(torch.nn.Sequential(FakeRMSNorm()), torch.ones(2, 4))
    assert count.executed == 0
    assert count.silent == {"FakeRMSNorm": 1}


MODELS = {
    # layers * (input, post attention) + final
    "llama": 5,
    # and q and k norms
    "qwen3": 9,
    # layers * (four around attention and MLP, q, k) + final
    "gemma3_text": 13,
    # encoder: two layers * two, final; decoder: two layers * three, final
    "t5": 12,
}


@pytest.mark.parametrize("model_type", MODELS)
def test_transformers_count(model_type):
    pytest.importorskip("transformers")
    built = hf.build(model_type, Size(hidden=64), tokens=8)
    count = count_norms(built.model, **built.inputs)
    assert count.executed == MODELS[model_type]
    assert sum(count.module_calls.values()) == count.executed
    assert not count.silent


def test_diffusers_count():
    pytest.importorskip("diffusers")
    built = dif.build("FluxTransformer2DModel")
    # two double layers * (q, k, and both again for the text), two single layers * (q, k)
    assert count_norms(built.model, **built.inputs).executed == 12


def test_norm_weights_are_spread_and_builds_repeat():
    pytest.importorskip("transformers")
    first, second = (hf.build("llama", Size(hidden=64)) for _ in range(2))
    weight = first.model.norm.weight
    assert weight.dtype == torch.bfloat16
    assert 0.5 <= weight.min() < weight.max() <= 1.5
    assert torch.equal(weight, second.model.norm.weight)
    gemma = hf.build("gemma3_text", Size(hidden=64)).model.norm.weight
    assert -0.5 <= gemma.min() < 0 < gemma.max() <= 0.5


def test_layers_that_share_a_graph_count_once_as_a_site():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return rms(x)

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            for _ in range(3):
                x = self.layer(x)
                torch._dynamo.graph_break()
            return x

    x = torch.randn(2, HIDDEN)
    graphs = count_graph_norms(Broken(), x)
    assert count_norms(Broken(), x).executed == 3
    assert graphs.executed <= 3
    assert graphs.sites <= graphs.executed


def test_different_compares_bits():
    left = torch.tensor([1.0, 2.0, float("nan"), 4.0])
    right = torch.tensor([1.0, 2.0, float("nan"), 4.5])
    assert different(left, right) == 0.25
    assert different(left, right.double()) == 1.0


def test_batch_invariant_notices_a_row_that_depends_on_its_batch():
    x = torch.randn(8, HIDDEN)
    assert batch_invariant(rms, (x,), (2, 7))
    assert not batch_invariant(lambda t: t - t.mean(), (x,), (2, 7))
