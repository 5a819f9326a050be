"""Targets for `prove` and `audit`: models whose rows are their own, and models whose are not."""

from __future__ import annotations

import torch

from fxpass.invariant.mode import active

SIZE = 48


@torch.library.custom_op("planted::centered", mutates_args=())
def centered(x: torch.Tensor) -> torch.Tensor:
    """Takes off the mean of the whole batch."""
    return x - x.mean()


@torch.library.custom_op("planted::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    """Other bits in batches of more than two rows, as a kernel picked by size would give."""
    return x * (1 + 2**-20) if x.shape[0] > 2 else x.clone()


@torch.library.custom_op("planted::leaky", mutates_args=())
def leaky(x: torch.Tensor) -> torch.Tensor:
    """Adds nothing, as long as all rows are finite."""
    return x + 0 * x.sum(0)


for _op in (centered, counted, leaky):
    _op.register_fake(torch.empty_like)


class Clean(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(SIZE)
        self.up, self.down = torch.nn.Linear(SIZE, 2 * SIZE), torch.nn.Linear(2 * SIZE, SIZE)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Planted(Clean):
    def __init__(self, op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x):
        y = super().forward(x)
        z = self.op(y)
        return torch.nn.functional.relu(z)


class Ids(torch.nn.Module):
    """Token ids, heads and flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, SIZE)
        self.out = torch.nn.Linear(SIZE, 11)

    def forward(self, ids, scale, mask):
        x = self.embedding(ids) * scale
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        x = torch.nn.functional.scaled_dot_product_attention(q, q, q, mask[:, None, None])
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)
        return {"logits": self.out(x).unflatten(0, ids.shape), "size": scale}


class Stateful(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def _rows(count: int = 4) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, SIZE)


def clean():
    torch.manual_seed(0)
    return Clean(), (_rows(),)


def planted_centered():
    torch.manual_seed(0)
    return Planted(centered), (_rows(),)


def planted_counted():
    torch.manual_seed(0)
    return Planted(counted), (_rows(),)


def planted_leaky():
    torch.manual_seed(0)
    return Planted(leaky), (_rows(),)


def planted_first():
    """A graph of three nodes, quick to compile."""
    return lambda x: counted(x * 2) + 1, (_rows(),)


def ids():
    torch.manual_seed(0)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    given = {"scale": torch.rand(SIZE), "mask": mask}
    return Ids(), (torch.randint(0, 11, (2, 5)),), given


def transposed():
    """Rows in dim 1 of the first argument; the second has as many, which are no rows."""
    weight = torch.randn(SIZE, SIZE)
    return lambda x, y: x.transpose(0, 1) @ weight + y.sum(), (_rows().T.contiguous(), _rows().T)


def capacity():
    """Experts that take half of the rows, those that score highest."""
    weight = torch.linspace(-1, 1, SIZE)

    def model(x):
        kept = (x * weight).sum(-1).topk(max(1, len(x) // 2)).indices
        return x.index_add(0, kept, x[kept])

    return model, (_rows(),)


def batch_norm():
    torch.manual_seed(1)
    norm = torch.nn.BatchNorm1d(SIZE)
    return torch.nn.Sequential(norm, torch.nn.ReLU()).train(), (torch.randn(4, SIZE, 3),)


def batch_norm_of_one():
    return torch.nn.BatchNorm1d(SIZE).train(), (_rows(),)


def dropout():
    return torch.nn.Dropout(0.5).train(), (_rows(),)


def stateful():
    return Stateful(), (_rows(),)


def placed():
    return lambda x: x + torch.arange(x.shape[0])[:, None], (_rows(),)


def one_number():
    return lambda x: x.sum(), (_rows(),)


def fails_alone():
    def model(x):
        if x.shape[0] == 1:
            raise ValueError("needs two rows")
        return x

    return model, (_rows(),)


def result_per_row():
    return lambda x: list(x), (_rows(),)


def rowless():
    return lambda x: x, (3,)


def softplus():
    return torch.nn.Softplus(), (_rows(),)


def scattered():
    def model(x, at):
        out = torch.zeros_like(x)
        return out.scatter_add(1, at, x).sum(-1).round().int().sum(-1)

    return model, (_rows(), torch.zeros(4, SIZE, dtype=torch.long))


@torch.compiler.disable
def eager_part(x):
    return x if active() else x + len(x)


def all_eager():
    return eager_part, (_rows(),)


def left_to_eager_code():
    return lambda x: eager_part(x * 2) + 1, (_rows(),)


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.LSTM(SIZE, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


def recurrent():
    return Recurrent().eval(), (torch.randn(3, 5, SIZE),)
