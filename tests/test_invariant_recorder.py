"""The recorder, and models in the mode: nothing reaches a kernel not known to be invariant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxpass
from fxpass.invariant import recorder
from fxpass.invariant.recorder import Recorder
from fxpass.invariant.table import LEAVES

torch.manual_seed(0)


def recorded(call, *args, **kwargs) -> Recorder:
    with torch.no_grad(), fxpass.batch_invariant_mode(), Recorder() as found:
        call(*args, **kwargs)
    return found


def test_what_varies_is_listed_with_its_line() -> None:
    x = torch.randn(2, 3)
    found = recorded(lambda: x.prod(-1))
    (unknown,) = found.unknown
    assert unknown.operator == "aten.prod.dim_int"
    assert "test_invariant_recorder.py:" in str(unknown)


def test_a_call_that_the_mode_leaves_to_torch_is_listed() -> None:
    x = torch.randn(4, 4, dtype=torch.complex64)
    assert [u.operator for u in recorded(lambda: x @ x.mT).unknown] == []  # complex: no floats
    y = torch.randn(3, 4).bfloat16()
    (unknown,) = recorded(lambda: torch.add(y, y, alpha=0.3)).unknown
    assert "alpha" in unknown.reason


WINDOWS = {
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool3d": lambda x: F.avg_pool3d(x.float().unsqueeze(2), (1, 3, 3)),
    "_adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "_adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x.unsqueeze(2), (1, 3, 2)),
    "max_pool3d_with_indices": lambda x: F.max_pool3d(x.unsqueeze(2), (1, 2, 2)),
    "upsample_linear1d": lambda x: F.interpolate(x.flatten(2), size=131, mode="linear"),
    "upsample_bilinear2d": lambda x: F.interpolate(x, size=(13, 17), mode="bilinear"),
    "upsample_trilinear3d": lambda x: F.interpolate(
        x.unsqueeze(2), size=(2, 13, 7), mode="trilinear"
    ),
    "upsample_bicubic2d": lambda x: F.interpolate(x, size=(13, 17), mode="bicubic"),
    "_upsample_bilinear2d_aa": lambda x: F.interpolate(
        x.float(), size=(5, 6), mode="bilinear", antialias=True
    ),
    "_upsample_bicubic2d_aa": lambda x: F.interpolate(
        x.float(), size=(5, 6), mode="bicubic", antialias=True
    ),
    "grid_sampler_3d": lambda x: F.grid_sample(
        x.float().unsqueeze(2), grid(x.float()), align_corners=True
    ),
    "im2col": lambda x: F.unfold(x, 3, padding=1),
    "col2im": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
    "log_sigmoid_forward": F.logsigmoid,
    "native_batch_norm": lambda x: F.batch_norm(
        x, *(torch.linspace(0.5, 2, x.shape[1]).to(x) for _ in range(4))
    ),
    "index_add": lambda x: x.new_zeros(len(x), 50).index_add(
        1, torch.arange(60, device=x.device) * 7 % 50, x.flatten(1)[:, :60]
    ),
}


def grid(x: torch.Tensor) -> torch.Tensor:
    """Places in and around a volume, the same for every one."""
    return torch.linspace(-1.1, 1.1, 105).view(1, 1, 5, 7, 3).to(x).expand(len(x), -1, -1, -1, -1)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_known_to_have_one_order(name: str, device: str) -> None:
    if name == "index_add" and device == "cuda":
        pytest.skip("atomic there, and listed")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((9, 3, 9, 11), (3, 33, 31, 37), (7, 1, 10, 10), (4, 16, 34, 34)):
            x = torch.randn(shape).to(device, dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                given = x.contiguous(memory_format=layout)
                # Dense if it is one sample.
                apart = torch.stack([given, given + 1], 1)[:, 0]
                with fxpass.batch_invariant_mode():
                    whole = WINDOWS[name](given)
                    assert torch.equal(WINDOWS[name](apart), whole)
                    for rows in (slice(0, 1), slice(1, 3), slice(-1, None)):
                        assert torch.equal(WINDOWS[name](given[rows]), whole[rows])
                        assert torch.equal(WINDOWS[name](apart[rows]), whole[rows])
                    if name in LEAVES:
                        assert torch.equal(WINDOWS[name](x), whole), "of any layout"
                assert whole.stride() == WINDOWS[name](given).stride()
    found = recorded(lambda: WINDOWS[name](x))
    assert found.seen[f"aten.{name}.default"] or f"aten.{name}.vec" in found.seen
    assert found.unknown == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_norm_of_cudnn(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, 5, 6, device="cuda", dtype=dtype)
    weight, bias, mean, var = (torch.rand(8, device="cuda") + 0.5 for _ in range(4))

    def call() -> tuple[torch.Tensor, ...]:
        return torch.ops.aten.cudnn_batch_norm(x, weight, bias, mean, var, False, 0.1, 1e-5)

    wanted = call()
    found = recorded(call)
    assert found.unknown == []
    with fxpass.batch_invariant_mode():
        made = call()
        learned = F.batch_norm(x, mean, var, weight.requires_grad_(), bias)
    torch.testing.assert_close(made, wanted)
    assert [t.stride() for t in made] == [t.stride() for t in wanted]
    assert torch.autograd.grad(learned.sin().sum(), weight)[0].isfinite().all()


def test_weights_do_not_follow_the_threads() -> None:
    v, g = torch.randn(32, 8, 16), torch.rand(1, 1, 16)
    before = torch.get_num_threads()
    try:
        with fxpass.batch_invariant_mode():
            made = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                made.append(torch._weight_norm(v, g, 2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    for dim, shape in ((2, g.shape), (0, (32, 1, 1)), (1, (1, 8, 1))):
        given = [v.clone().requires_grad_(), torch.rand(shape).requires_grad_()]
        wanted = torch._weight_norm(*given, dim)
        with fxpass.batch_invariant_mode():
            found = torch._weight_norm(*given, dim)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found.sin().sum(), given),
            torch.autograd.grad(wanted.sin().sum(), given),
        )


def test_what_accumulates_is_listed() -> None:
    places, values = torch.randint(0, 5, (40,)), torch.randn(40, 8)
    added = recorded(lambda: torch.zeros(5, 8).index_put_((places,), values, accumulate=True))
    assert [u.operator for u in added.unknown] == ["aten.index_put_.default"]
    assert not recorded(lambda: torch.zeros(40, 8).index_put_((torch.arange(40),), values)).unknown


def test_every_operator_of_a_window_is_tried() -> None:
    assert {*recorder.WINDOWS} - {*WINDOWS} == set()


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
