"""What only looks like a norm, and why it is left alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import W, X, declines, untouched
from cases_rounding import unit

F32, V = "f32[2,8,64]", "f32[64]"
DIFFERENT = "mean is of a different tensor"


def rms(x, dim=-1):
    return x.pow(2).mean(dim, keepdim=True) + 1e-6


@declines("divided by 8.0, which is not the row length", "f32[2,8,64]")
def sum_over_root_length(x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + 1e-6)


@declines("eps is added outside the root", "f32[2,8,64]")
def eps_beside_a_norm(x):
    return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


@declines("clipped", "f32[2,8,64]")
def clip_to_length(x):
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (2.0 / (length + 1e-6)).clamp(max=1.0)


@declines(r"mean is over dim -2", F32)
def wrong_dim(x):
    return x * torch.rsqrt(rms(x, -2))


@declines(r"mean is over dim -3", F32)
def first_dim(x):
    return x * torch.rsqrt(rms(x, 0))


@declines(r"mean is over dim -3, -1", F32)
def first_and_last_dim(x):
    return x * torch.rsqrt(rms(x, (0, 2)))


@declines(r"dim -2", F32)
def channel_dim(x):
    return F.normalize(x, dim=1)


@declines(r"x\*\*3", F32)
def cubes(x):
    return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)


@declines(r"x\*\*1.9", F32)
def other_power(x):
    return x * torch.rsqrt(x.pow(1.9).mean(-1, keepdim=True) + 1e-6)


@declines(r"raised to -0.25", F32)
def fourth_root(x):
    return x * rms(x).pow(-0.25)


@declines(r"raised to -0.49", F32)
def nearly_the_root(x):
    return x * rms(x) ** -0.49


@declines(r"eps is added outside the root", F32)
def eps_outside(x):
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


@declines(r"eps is added outside the root", F32)
def eps_outside_the_norm(x):
    return x / (x.norm(dim=-1, keepdim=True) * 64**-0.5 + 1e-6)


@declines(DIFFERENT, F32)
def partial_variance(x):
    return x * torch.rsqrt(rms(x[..., :16]))


@declines(DIFFERENT, F32)
def shifted(x):
    return (x - 1) * torch.rsqrt(rms(x))


@declines(DIFFERENT, F32, F32)
def inverse_of_another_tensor(x, y):
    return y * torch.rsqrt(rms(x))


@declines(DIFFERENT, F32, "f32[64,64]")
def inverse_after_a_projection(x, p):
    return F.linear(x, p) * torch.rsqrt(rms(x))


@declines(DIFFERENT, X)
def statistics_before_rounding(x):
    h = x.float() * 1.1
    return h.to(x.dtype) * torch.rsqrt(rms(h))


@declines(r"LayerNorm", F32)
def layer_norm_by_hand(x):
    h = x - x.mean(-1, keepdim=True)
    return h * torch.rsqrt(rms(h))


@declines(r"LayerNorm", X, W)
def layer_norm_by_hand_narrow(x, w):
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return w * (h / torch.sqrt(rms(h))).to(x.dtype)


@declines(r"different tensor", F32)
def mean_of_a_product(x):
    return x * torch.rsqrt((x * x.roll(1, -1)).mean(-1, keepdim=True) + 1e-6)


@declines(r"a product of two different tensors", F32, V)
def weighted_squares(x, w):
    return x * torch.rsqrt((x * x * w).mean(-1, keepdim=True) + 1e-6)


@declines(r"absolute values", F32)
def absolute_values(x):
    return x / torch.sqrt(x.abs().mean(-1, keepdim=True) + 1e-6)


@declines(r"eps has shape \[64\]|different tensor|not a norm|eps has shape", F32, V)
def eps_of_many_elements(x, e):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e)


@declines(r"eps has shape \[8, 1\]; one element", F32, "f32[8,1]")
def eps_per_row(x, e):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e.abs())


@declines(r"eps is .*int64", F32, "i64[]")
def eps_integer(x, e):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e)


@declines(r"f64", "f64[2,8,64]")
def float64(x):
    return unit(x.double()) if False else x * torch.rsqrt(rms(x))


@declines(r"f64", F32)
def computed_in_float64(x):
    h = x.double()
    return (h * torch.rsqrt(rms(h))).float()


@declines(r"f64", X)
def norm_computed_in_float64(x):
    n = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    return x.float() / n.float()


@declines(r"also read by", F32)
def mean_returned(x):
    mean = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + 1e-6), mean


@declines(r"also read by", F32)
def variance_read_again(x):
    variance = rms(x)
    return x * torch.rsqrt(variance), variance.log()


@declines(r"also read by", F32)
def squares_read_again(x):
    squares = x.pow(2)
    return x * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-6), squares.sum()


@declines(r"also read by", X)
def wide_inverse_returned_narrow_used(x):
    inverse = torch.rsqrt(rms(x.float()))
    return x * inverse.to(x.dtype), inverse


@declines(r"not the row length", F32)
def wrong_length(x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 63 + 1e-6)


@declines(r"1/N is needed", F32)
def wrong_reciprocal_length(x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) * (1 / 63) + 1e-6)


@declines(r"sqrt\(N\) is needed", F32)
def wrong_root_length(x):
    return x / (x.norm(dim=-1, keepdim=True) * 0.1)


@declines(r".", F32)
def biased(x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1) + 1e-6)


@declines(r".", F32, "bool[2,8,64]")
def masked_mean(x, m):
    total = (x.pow(2) * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True)
    return x * torch.rsqrt(total + 1e-6)


@untouched(F32)
def inverse_clamped_above(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).clamp(max=10.0)


@declines(r"the inverse has shape|broadcast", "f32[8,8]")
def inverse_along_the_other_dim(x):
    return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)


@declines(r"the inverse has shape|broadcast", "f32[8,8]")
def inverse_expanded_along_the_other_dim(x):
    return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6).expand(8, 8)


@untouched("f32[8,8,64]")
def inverse_viewed_as_columns(x):
    inverse = torch.rsqrt(x.pow(2).mean(-1) + 1e-6)
    return x * inverse.unsqueeze(0).transpose(1, 2)[..., :1].transpose(0, 1)


# Rounded to bf16 and widened again, which is another tensor of the same dtype. Inductor of 2.11
# drops the pair ahead of its hooks, with or without fxpass, also when told to emulate casts.
_PAIRS = {"levels": ("dynamo",)} if torch.__version__ < "2.13" else {}


@declines(DIFFERENT, F32, **_PAIRS)
def inverse_of_a_rounded_copy(x):
    return x * torch.rsqrt(rms(x.bfloat16().float()))


@declines(DIFFERENT, F32, **_PAIRS)
def rounded_copy_with_the_inverse_of_the_wide(x):
    return x.bfloat16().float() * torch.rsqrt(rms(x))


@declines(DIFFERENT, "f32[8,64]")
def one_inverse_for_all_groups_of_the_row(x):
    inverse = torch.rsqrt(rms(x))
    return (x.view(8, 4, 16) * inverse.unsqueeze(-1)).view(8, 64)


@declines(r"mean of x\*\*2\.000001; x\*\*2 is needed", F32)
def exponent_next_to_two(x):
    return x * torch.rsqrt(x.abs().pow(2.000001).mean(-1, keepdim=True) + 1e-6)


@declines(r"raised to -0\.49999999; -0\.5 is needed", F32)
def exponent_next_to_a_root(x):
    return x * rms(x).pow(-0.49999999)


@untouched("f32[8,64]")
def inverse_of_the_row_before(x):
    return x * torch.rsqrt(rms(x)).roll(1, 0)


@untouched("f32[8,64]")
def inverse_of_the_other_half_of_the_rows(x):
    inverse = torch.rsqrt(rms(x))
    return torch.cat([x[:4] * inverse[4:], x[4:] * inverse[:4]])


@untouched("f32[8,64]")
def one_value_for_all_rows(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).mean() + 1e-6)


@declines(r".", F32, F32)
def weight_inside_the_squares(x, w):
    return x * torch.rsqrt((w * x).pow(2).mean(-1, keepdim=True) + 1e-6)


@declines(DIFFERENT, F32)
def dropout_between(x):
    return F.dropout(x, 0.5) * torch.rsqrt(rms(x))


@untouched(F32)
def scaled_addition_of_eps(x):
    return x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-3, alpha=2.0))


@declines(r"different tensor|not a norm", F32)
def relu_after(x):
    return F.relu(x) * torch.rsqrt(rms(x))


@declines(r"different tensor|not a norm", F32)
def where_after(x):
    return torch.where(x > 0, x, 0.1 * x) * torch.rsqrt(rms(x))


@untouched("f32[8,8]")
def spectral_norm(x):
    return x / torch.linalg.norm(x, 2)


@declines(r"different tensor", "f32[8,8]")
def transposed(x):
    return x.t() * torch.rsqrt(rms(x))


@declines(r"different tensor", "f32[8,8,64]")
def flipped(x):
    return x.flip(0) * torch.rsqrt(rms(x))


@declines(DIFFERENT, F32, levels=("dynamo",))
def detached(x):
    return x * torch.rsqrt(rms(x.detach()))


@untouched(F32, levels=("dynamo",))
def detached_mean(x):
    return x * torch.rsqrt(rms(x).detach())


@untouched(F32, levels=("dynamo",))
def detached_inverse(x):
    return x * torch.rsqrt(rms(x)).detach()


@declines(DIFFERENT, F32, levels=("dynamo",))
def detached_x_in_the_product(x):
    return x.detach() * torch.rsqrt(rms(x))


@declines(DIFFERENT, "f32[2,8,128]")
def mean_of_the_other_half(x):
    return x[..., :64] * torch.rsqrt(rms(x[..., 64:]))


@declines(DIFFERENT, "f32[64,64]")
def mean_of_the_transposed(x):
    return x * torch.rsqrt(rms(x.t()))


@declines("scaled before x is", F32, V)
def inverse_times_weight_first(x, w):
    return x * (torch.rsqrt(rms(x)) * w)


@declines("the operations between the mean and x", F32)
def negative_eps_subtracted(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - (-1e-6))


@untouched(F32)
def every_square_rounded_before_the_sum(x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True, dtype=torch.bfloat16) + 1e-3)
