"""Targets for the tests of the command line: a small model, and one with a misspelt norm."""

from __future__ import annotations

import torch


def norm(x, w, dim=-1):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(dim, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64).bfloat16())
        self.proj = torch.nn.Linear(64, 64, bias=False).bfloat16()

    def forward(self, x):
        return x + self.proj(norm(x, self.weight))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block() for _ in range(3)])
        self.norm = torch.nn.RMSNorm(64).bfloat16()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Misspelt(Model):
    def forward(self, x):
        y = super().forward(x)
        return y + norm(x, self.norm.weight, dim=1)


class Branch(Model):
    """One norm outside, one in a branch of torch.cond."""

    def forward(self, x):
        y = norm(x, self.norm.weight)
        return torch.cond(y.sum() > 0, lambda a: norm(a, self.norm.weight), torch.abs, (y,))


def _inputs():
    return (torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),)


def make():
    torch.manual_seed(0)
    return Model().eval(), _inputs()


def make_misspelt():
    torch.manual_seed(0)
    return Misspelt().eval(), _inputs()


def make_branch():
    torch.manual_seed(0)
    return Branch().eval(), _inputs()


def make_on_gpu():
    return Model().eval().cuda(), tuple(x.cuda() for x in _inputs())


def check_close(model, x):
    """Fails once the first of the norms gives zeros (see tests/test_cli_bisect.py)."""
    return bool((model(x).float().abs().amax(-1) > 0.1).all())


def check_never(model, x):
    return False


def check_shape(model, x):
    assert model(x).shape == x.shape
