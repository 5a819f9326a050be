"""In-place writes in Dynamo graphs: which ones a norm may not span (AOTAutograd removes them)."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from cases import PLAIN, SCALE_CAST, declines, matches
from cases_near_misses import DIFFERENT, F32, V, rms
from cases_rounding import unit

WRITES = r"writes in place"


@declines(WRITES, F32, levels=("dynamo",))
def write_between(x):
    h = x.sin()
    inverse = torch.rsqrt(rms(h))
    h.add_(1)
    return h * inverse


@declines(WRITES, F32, levels=("dynamo",))
def set_item_between(x):
    h = x.sin()
    inverse = torch.rsqrt(rms(h))
    h[0] = 0
    return h * inverse


@declines(WRITES, F32, levels=("dynamo",))
def write_to_a_view_between(x):
    h = x.sin()
    inverse = torch.rsqrt(rms(h))
    h.view(16, 64)[3].mul_(2)
    return h * inverse


@declines(DIFFERENT, F32, levels=("dynamo",))
def augmented_assignment_between(x):
    h = x.sin()
    inverse = torch.rsqrt(rms(h))
    h *= 2
    return h * inverse


@declines(WRITES, F32, levels=("dynamo",))
def out_argument_between(x):
    h = x.sin()
    inverse = torch.rsqrt(rms(h))
    torch.add(h, 1, out=h)
    return h * inverse


@matches("rms_norm", PLAIN, F32, V, levels=("dynamo",))
def weight_written_between(x, w):
    v = w.sin()
    h = torch.rsqrt(rms(x))
    k = v.cos()
    v.zero_()
    return x * h * v, k


@declines(WRITES, F32, levels=("dynamo",))
def write_before(x):
    h = x.sin()
    k = h.cos()
    h.add_(1)
    return h * torch.rsqrt(rms(h)), k


@matches("rms_norm", PLAIN, F32, levels=("dynamo",))
def write_to_the_original_of_a_copy(x):
    h = x.sin()
    y = h.clone()
    h.add_(1)
    return y * torch.rsqrt(rms(y)), h


@declines(WRITES, F32, levels=("dynamo",))
def write_to_a_copy(x):
    h = x.sin()
    y = h.clone()
    y.add_(1)
    return y * torch.rsqrt(rms(y)), h


@declines(WRITES, F32, levels=("dynamo",))
def inverse_before_a_write_by_view(x):
    h = x.sin()
    view = h.unflatten(-1, (8, 8))[..., 0]
    inverse = torch.rsqrt(rms(h))
    view.zero_()
    return h * inverse


@declines(WRITES, F32, levels=("dynamo",))
def inplace_activation_between(x):
    h = x.sin()
    inverse = torch.rsqrt(rms(h))
    F.relu(h, inplace=True)
    return h * inverse


DYNAMO = {"levels": ("dynamo",)}


@matches("rms_norm", PLAIN, "f32[2,8,64]", **DYNAMO)
def same_expression_before_and_after_a_write(x):
    h = x.sin()
    a = h * 2
    h.add_(1)
    b = h * 2
    return a, unit(b)


@matches("rms_norm", PLAIN, "f32[2,8,64]", "f32[2,8,64]", **DYNAMO)
def write_after_the_norm(x, y):
    k = x.sin()
    h = unit(k)
    k.view(2, 8, 64).copy_(y)
    return h, k


@matches("rms_norm", PLAIN, "f32[2,8,64]", **DYNAMO)
def result_of_an_in_place_add(x):
    return unit(x.sin().add_(1))


@matches("rms_norm", PLAIN, "f32[2,8,64]", "f32[2,8,64]", **DYNAMO)
def unrelated_write_between(x, cache):
    mean = x.pow(2).mean(-1, keepdim=True)
    kept = cache.sin()
    kept[0] = 0
    return x * torch.rsqrt(mean + 1e-6), kept


# --- writers that are told to write by an argument -------------------------------------------


def _between(write):
    def norm(x):
        h = x.sin()
        inverse = torch.rsqrt(rms(h))
        write(h)
        return h * inverse

    return norm


_INDEX = torch.int64
_ARGUMENTS = {
    "a_dropout_module": torch.nn.Dropout(0.5, inplace=True),
    "an_elu_module": torch.nn.ELU(inplace=True),
    "a_hardtanh_module": torch.nn.Hardtanh(-0.5, 0.5, inplace=True),
    "relu_by_position": lambda h: F.relu(h, True),
    "remainder": lambda h: operator.imod(h, 3),
    "floor_division": lambda h: operator.ifloordiv(h, 2),
    "statistics_of_torchs_own": lambda h: torch.batch_norm(
        h.cos(), None, None, h[0, 0, :8], h[0, 1, :8].abs_(), True, 0.1, 1e-5, False
    ),
    "an_operator_of_several_overloads": lambda h: torch.ops.aten.add_(h, 1),
    "a_tuple_of_outputs": lambda h: torch.sort(
        h.cos(), out=(h, torch.empty(h.shape, dtype=_INDEX))
    ),
}
for _name, _write in _ARGUMENTS.items():
    declines(WRITES, F32, id=f"{_name}_between", **DYNAMO)(_between(_write))


@declines(WRITES, "f32[16,64]", **DYNAMO)
def rows_of_a_table_clipped_between(table):
    h = table.sin()
    inverse = torch.rsqrt(rms(h))
    rows = F.embedding(torch.zeros(2, dtype=_INDEX), h, max_norm=0.5)
    return h * inverse, rows


@matches("rms_norm", PLAIN, "f32[16,64]", **DYNAMO)
def rows_of_a_table_read_between(table):
    h = table.sin()
    inverse = torch.rsqrt(rms(h))
    rows = F.embedding(torch.zeros(2, dtype=_INDEX), h)
    return h * inverse, rows


@declines(WRITES, "f32[16,64]", **DYNAMO)
def statistics_written_between(x):
    h = x.sin()
    inverse = torch.rsqrt(rms(h))
    normed = F.batch_norm(x, h[0], h[1].abs(), training=True)
    return h * inverse, normed


@declines(WRITES, F32, **DYNAMO)
def eps_is_a_constant_that_is_scaled(x):
    eps = torch.tensor(0.5)
    eps.mul_(4.0)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@matches("rms_norm.scale_then_cast", SCALE_CAST, "bf16[64,2,8]", "bf16[64]", "f32[]",
         levels=("aten",))  # fmt: skip
def copy_beside_an_unrelated_write(x, w, counter):
    counter.add_(1)
    return F.rms_norm(x.permute(1, 2, 0), (64,), w, 1e-6)


@declines(DIFFERENT, F32, **DYNAMO)
def write_to_a_view_of_the_original_of_a_copy(x):
    h = x.sin()
    view = h.view(16, 64)
    inverse = torch.rsqrt(rms(h.contiguous()))
    view.add_(1)
    return h * inverse


@declines(WRITES, F32, **DYNAMO)
def what_dropout_returns_in_evaluation(x):
    h = x.sin()
    same = F.dropout(h, 0.5, False)
    inverse = torch.rsqrt(rms(h))
    same.mul_(2)
    return h * inverse


@declines(DIFFERENT, "f32[8,64]", **DYNAMO)
def rows_picked_by_an_index_that_moves(x):
    index = torch.zeros(4, dtype=_INDEX)
    inverse = torch.rsqrt(rms(x[index]))
    index.add_(1)
    return x[index] * inverse


@declines(DIFFERENT, "f32[8,64]", **DYNAMO)
def a_part_that_is_written_between_its_two_uses(x):
    h = x.sin()
    inverse = torch.rsqrt(rms(h[2:4]))
    h[3].mul_(2)
    return h[2:4] * inverse
