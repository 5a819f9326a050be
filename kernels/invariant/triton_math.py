# ruff: noqa: N803 - constants are uppercase, constant conditions stand alone
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,import-untyped"
"""What the Triton kernels of this folder share: a sum in a fixed order, exp and log.

Everything here is a function of the values alone. `tl.sum` over many elements adds in an order that
depends on the layout, hence on the number of warps and on pointer alignment; over two there is only
one order, so a tree is a chain of such sums. Nothing may be contracted into a fused multiply-add by
a compiler that sees it in one schedule only: launch with `enable_fp_fusion=False` (`FIXED`).

    exp_nonpositive  2 ulp: the reduction is exact, the rest is the device's exp2 on [-0.5, 0.5]
                     (NVIDIA ex2.approx 2 ulp, AMD v_exp_f32 1 ulp)
    log_positive     1 ulp, in float32 operations that every device rounds alike
"""

from __future__ import annotations

import triton
import triton.language as tl

FIXED = {"enable_fp_fusion": False}
"""Launch options of every kernel that uses these functions."""


@triton.jit
def pairs(x, LEVELS: tl.constexpr):
    """(rows, n) -> (rows, n / 2**LEVELS): neighbours are added, LEVELS times."""
    for _ in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    return x


@triton.jit
def total(units, LEVELS: tl.constexpr, LAST: tl.constexpr):
    """(rows, 2**(LEVELS + LAST)) -> the sum of each row, nearest first.

    A scalar if there is one row, else (rows, 1). LAST > 0, for one row only: the last levels follow
    one exchange through shared memory, where each would be one.
    """
    units = pairs(units, LEVELS)
    if LAST > 0:
        units = tl.gather(units, tl.arange(0, 2**LAST)[None, :], axis=1)
        units = pairs(units, LAST)
    # A tile would force its layout upon the row's elements.
    if units.shape[0] == 1:
        return tl.sum(units)
    else:
        return units


@triton.jit
def largest(x):
    """The largest element of each row that is not NaN; a scalar if there is one row."""
    if x.shape[0] == 1:
        return tl.max(x)
    else:
        return tl.max(x, axis=1, keep_dims=True)


@triton.jit
def float_of(bits):
    """The float64 that a launcher passed as an integer; a Python float would arrive as float32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def exp_nonpositive(x):
    """exp(x) for x <= 0 or NaN; subnormal results too."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)  # exp(-104) rounds to 0; a NaN stays
        n = tl.fma(x, 1.4426950216293335, 12582912.0) - 12582912.0  # the nearest integer
        rest = tl.fma(x, 1.4426950216293335, -n)
        rest = tl.fma(x, 1.925963033500112e-08, rest)
        # 2**(n + 64) is a normal number for every n in [-150, 0].
        power = ((n.to(tl.int32) + 191) << 23).to(tl.float32, bitcast=True)
        return (tl.exp2(rest) * power) * 5.421010862427522e-20  # 2**-64


@triton.jit
def inverse(x):
    """1 / x, correctly rounded."""
    return 1.0 / x if x.dtype == tl.float64 else tl.div_rn(1.0, x)


@triton.jit
def root(x):
    """The square root, correctly rounded."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def log_positive(x):
    """log(x) for a normal x > 0, or NaN (FreeBSD's logf)."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
        k = ((bits >> 23) - 127).to(tl.float32)
        f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
        s = tl.div_rn(f, 2.0 + f)
        z = s * s
        w = z * z
        odd = w * (0.4000097215175629 + w * 0.24279078841209412)
        even = z * (0.6666666269302368 + w * 0.2849878668785095)
        half = 0.5 * f * f
        found = s * (half + (odd + even)) + k * 9.058000614459161e-06
        found = ((found - half) + f) + k * 0.6931380629539490
        # NaN and infinity have no such bits.
        return tl.where(x < float("inf"), found, x)
