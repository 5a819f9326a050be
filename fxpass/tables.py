"""The tables of supported variants and kernels, printed from the formulas and the contracts."""

from __future__ import annotations

from collections.abc import Iterable

from fxpass.dtypes import short
from fxpass.kernels import Kernel, kernels
from fxpass.patterns import FAMILIES, FINISHES


def variant_table() -> str:
    """Markdown: every family, then every finish a family may have."""
    from tabulate import tabulate

    rows = [(f"`{f.name}`", "family", f.about) for f in FAMILIES]
    rows += [(f"`.{f.name}`" if f.name else "(none)", "finish", f.about) for f in FINISHES]
    return tabulate(rows, headers=("name", "kind", "met in"), tablefmt="github")


def kernel_table() -> str:
    """Markdown: one row per kernel, from its contract."""
    return kernel_rows(kernels(), "github")


def kernel_rows(shown: Iterable[Kernel], style: str) -> str:
    """The same for some kernels, in one of tabulate's styles."""
    from tabulate import tabulate

    head = ("kernel", "platform", "x", "weight", "hidden", "layout", "rounding", "residual", "BI")
    return tabulate([_row(kernel) for kernel in shown], headers=head, tablefmt=style)


def _row(kernel: Kernel) -> tuple[str, ...]:
    contract = kernel.contract
    most = contract.hidden.most
    return (
        f"`{kernel.name}`",
        ", ".join(contract.platforms),
        ", ".join(map(short, contract.x)),
        ", ".join(contract.weight),
        f"{contract.hidden.least} and up" if most is None else f"{contract.hidden.least}-{most}",
        str(contract.layout),
        ", ".join(rounding.value for rounding in contract.rounding),
        _yes(contract.residual),
        _yes(contract.batch_invariant),
    )


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
