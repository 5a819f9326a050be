"""A stand-in for AMD's aiter that takes nothing its contract does not allow.

`install` puts modules `aiter` and `aiter.ops` into sys.modules, in one of the versions met in the
wild: parameters, their order, and wrappers that hide them behind (*args, **kwargs). Each call is
checked to the letter and computed with the reference, in the roundings of the code path that the
call would take on a GPU. Tensors may be on the CPU.
"""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpass.kernels import aiter_api, reference
from fxpass.spec import NormSpec

W32 = "row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,mul_weight:f32,cast:{0}"
HF = "row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,cast:{0},mul_weight:{0}"
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}


class ContractError(AssertionError):
    """A call that would read or write the wrong memory, or take another path, on a GPU."""


def require(condition: bool, message: str) -> None:
    """A plain `assert` could be caught and taken for a kernel that cannot run."""
    if not condition:
        raise ContractError(f"aiter stand-in: {message}")


@dataclass(frozen=True)
class Call:
    """What one call received."""

    function: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    model_sensitive: int


@dataclass
class Standin:
    """One version of aiter."""

    order: aiter_api.Version
    truncates: bool = False
    """bf16 results lose their low bits, as on gfx942."""
    calls: list[Call] = field(default_factory=list)

    def rmsnorm2d_fwd(self, *args: Any) -> torch.Tensor:
        """out = norm(input)."""
        given = self._named(self.order.plain, args)
        x, weight, flag = given["input"], given["weight"], given["use_model_sensitive_rmsnorm"]
        self._check_rows("input", x, strided=self.order.row_stride and not flag)
        self._check_weight(weight, x)
        self.calls.append(Call("rmsnorm2d_fwd", tuple(x.shape), x.stride(), flag))
        return self._norm(x, weight, given["epsilon"], flag)

    def rmsnorm2d_fwd_with_add(self, *args: Any) -> None:
        """residual_out = input + residual_in; out = norm(residual_out)."""
        given = self._named(self.order.add, args)
        tensors = {n: given[n] for n in ("input", "residual_in", "out", "residual_out")}
        x, flag = given["input"], given["use_model_sensitive_rmsnorm"]
        for name, tensor in tensors.items():
            self._check_rows(name, tensor, strided=False)
            require(tensor.shape == x.shape and tensor.dtype == x.dtype, f"{name} unlike input")
        self._check_weight(given["weight"], x)
        _check_apart([tensors["out"], tensors["residual_out"]], [x, tensors["residual_in"]])
        require(flag == 1, "without the flag the sum is normalised before it is rounded")
        self.calls.append(Call("rmsnorm2d_fwd_with_add", tuple(x.shape), x.stride(), flag))
        total = self._stored(x.float() + tensors["residual_in"].float(), x.dtype)
        tensors["residual_out"].copy_(total)
        tensors["out"].copy_(self._norm(total, given["weight"], given["epsilon"], flag))

    def _named(self, parameters: tuple[str, ...], args: tuple[Any, ...]) -> dict[str, Any]:
        require(len(args) == len(parameters), f"{len(args)} arguments, needs {parameters}")
        given = dict(zip(parameters, args, strict=True))
        require(type(given["epsilon"]) is float, f"epsilon is {given['epsilon']!r}")
        flag = given.setdefault("use_model_sensitive_rmsnorm", 0)
        require(type(flag) is int and flag in (0, 1), f"the flag is {flag!r}: wrong order?")
        gemma = given.get("gemma_norm", False)
        require(gemma is False, f"gemma_norm is {gemma!r}: wrong order?")
        for name in given.keys() & {"input", "weight", "out", "residual_in", "residual_out"}:
            require(isinstance(given[name], torch.Tensor), f"{name} is no tensor: wrong order?")
            fake = isinstance(given[name], torch._subclasses.FakeTensor)
            require(not fake, f"{name} is fake: somebody traces into the call")
        return given

    def _check_rows(self, name: str, x: torch.Tensor, strided: bool) -> None:
        require(x.dim() == 2, f"{name} is {x.dim()}-D; the kernel takes size(1) for hidden")
        require(x.dtype in NAMES, f"{name} is {x.dtype}")
        require(x.numel() > 0, f"{name} is empty: a fault on a GPU")
        require(8 <= x.shape[1] <= 8192 and x.shape[1] % 8 == 0, f"hidden is {x.shape[1]}")
        require(x.stride(1) == 1, f"{name} has last stride {x.stride(1)}")
        if strided:
            apart = x.shape[0] == 1 or x.stride(0) >= x.shape[1]
            require(apart, f"{name} has rows {x.stride(0)} apart")
        else:
            require(x.is_contiguous(), f"{name} has strides {x.stride()}, needs contiguous")

    def _check_weight(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        require(weight.shape == x.shape[1:], f"weight is {tuple(weight.shape)}")
        require(weight.dtype == x.dtype, f"weight is {weight.dtype}, input {x.dtype}")
        require(weight.is_contiguous(), f"weight has strides {weight.stride()}")

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, flag: int) -> torch.Tensor:
        name = NAMES[x.dtype]
        if not self.truncates:
            spec = NormSpec.parse(f"x={name} {(HF if flag else W32).format(name)} weight={name}")
            return reference.launch(spec, x, None, weight, None, eps)[0]
        value = x.float()
        value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
        value = self._stored(value, x.dtype).float() if flag else value
        return self._stored(value * weight.float(), x.dtype)

    def _stored(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.truncates and dtype is torch.bfloat16:
            value = (value.contiguous().view(torch.int32) & -65536).view(torch.float32)
        return value.to(dtype)


def _check_apart(written: list[torch.Tensor], read: list[torch.Tensor]) -> None:
    """No output may share memory with another tensor."""
    for index, one in enumerate(written):
        for other in [*written[index + 1 :], *read]:
            shared = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
            require(not shared, "an output shares memory with another tensor")


def install(monkeypatch: Any, version: str, *, hidden: bool = False, **changes: Any) -> Standin:
    """Make `import aiter` find a version (a key of `aiter_api.VERSIONS`) until the test ends.

    `hidden`: the functions take (*args, **kwargs), and only torch.ops.aiter tells their parameters.
    """
    made = Standin(aiter_api.VERSIONS[version], **changes)
    package, ops = types.ModuleType("aiter"), types.ModuleType("aiter.ops")
    functions = {"rmsnorm2d_fwd": made.order.plain, "rmsnorm2d_fwd_with_add": made.order.add}
    for name, parameters in functions.items():
        wrapper = _wrapper(getattr(made, name), ("*args, **kwargs",) if hidden else parameters)
        setattr(package, name, wrapper)
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiter", package)
    monkeypatch.setitem(sys.modules, "aiter.ops", ops)
    if hidden:
        monkeypatch.setattr(aiter_api, "_operator", lambda name: _operator(functions[name]))
    forget(monkeypatch)
    return made


def forget(monkeypatch: Any) -> None:
    """Look for aiter anew, now and after the test."""
    monkeypatch.setattr(aiter_api, "load", functools.cache(aiter_api.load.__wrapped__))


def _wrapper(method: Any, parameters: tuple[str, ...]) -> Any:
    """A function with these parameters, all of them by position."""
    named = ", ".join(parameters)
    passed = "*args" if "*args" in named else named
    code = f"def function({named}):\n    return method({passed})\n"
    scope: dict[str, Any] = {"method": method}
    exec(code, scope)
    return scope["function"]


def _operator(parameters: tuple[str, ...]) -> Any:
    arguments = [types.SimpleNamespace(name=name) for name in parameters]
    schema = types.SimpleNamespace(arguments=arguments)
    return types.SimpleNamespace(default=types.SimpleNamespace(_schema=schema))
