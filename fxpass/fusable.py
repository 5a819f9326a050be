"""Whether a kernel of its own would break a larger fusion of the compiler.

A norm's kernel writes its result, and the compiler's kernel that follows reads it again. Where a
matmul reads the result, it has to be in memory anyway. Where only elementwise operators and
reductions do, the compiler would have kept it in registers, and so it would with an x that such an
operator makes for the norm alone. The bytes are per row: the answer is the same for every batch.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx

from fxpass import facts
from fxpass.sites import Site
from fxpass.uses import is_passive

_VIEWS = frozenset(
    "alias detach expand permute select slice split split_with_sizes squeeze t transpose unbind"
    " unsqueeze view _unsafe_view reshape".split()
)
_FUSED = frozenset(
    # Those without torch.Tag.pointwise that Inductor makes part of a kernel.
    "_to_copy clone constant_pad_nd cat convert_element_type where"
    " amax amin max min mean prod sum var var_mean".split()
)
_CASTS = ("_to_copy", "convert_element_type")
_GETITEM = "getitem"


def lost(site: Site, taken: Container[fx.Node]) -> str | None:
    """What a separate kernel would write and read in vain, in words, or None.

    `taken` are the nodes that kernels take over, of this site and of all others.
    """
    result = facts.of(site.anchor)
    x = facts.of(site.x)
    hidden = facts.static(site.hidden)
    if result is None or x is None or hidden is None:
        return None
    readers = _fused_readers(site, taken)
    if readers:
        moved = 2 * hidden * result.dtype.itemsize
        return (
            f"only {_count(len(readers), 'fusable operator')} ({readers[0].name}, ...) read the"
            f" result; fused with the norm they save writing and reading it, {moved} bytes a row"
        )
    made_by = maker(site, taken)
    if made_by is not None:
        moved = 2 * hidden * x.dtype.itemsize
        return (
            f"{made_by.name} makes x for this norm alone; fused with the norm it saves writing and"
            f" reading x, {moved} bytes a row"
        )
    return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _fused_readers(site: Site, taken: Container[fx.Node]) -> list[fx.Node]:
    """All readers of the result if the compiler can fuse each of them, else nothing."""
    found = []
    for out in site.out_nodes:
        for reader in _through_views(out):
            if reader in site.interior:
                continue
            if _feeds(reader, taken) or not _is_fused(reader):
                return []
            found.append(reader)
    return list(dict.fromkeys(found))


def _feeds(reader: fx.Node, taken: Container[fx.Node]) -> bool:
    """Whether a kernel of another norm reads the value, perhaps through a cast of its own."""
    cast = _name(reader) in _CASTS
    return reader in taken or (cast and any(user in taken for user in reader.users))


def _through_views(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, also as a view of it."""
    for user in node.users:
        if is_passive(user):
            continue
        if _name(user) in _VIEWS or _name(user) == _GETITEM:
            yield from _through_views(user)
        else:
            yield user


def maker(site: Site, taken: Container[fx.Node]) -> fx.Node | None:
    """The operator that computes x if the compiler can fuse it and nobody else reads x."""
    inside = set(site.interior)
    node = site.x
    while all(user in inside or is_passive(user) for user in node.users):
        if _name(node) not in _VIEWS:
            return node if _is_fused(node) and node not in taken else None
        inside.add(node)
        node = node.all_input_nodes[0]
    return None


def _is_fused(node: fx.Node) -> bool:
    """True for operators that Inductor computes inside a kernel with others."""
    target: Any = node.target
    if not hasattr(target, "overloadpacket"):
        return False
    if torch.Tag.pointwise not in target.tags and _name(node) not in _FUSED:
        return False
    made = facts.of(node)
    read = [found for found in map(facts.of, node.all_input_nodes) if found is not None]
    # A copy between devices is a launch of its own; a 0-d CPU tensor is a scalar to a GPU kernel.
    return made is not None and all(f.device == made.device or not f.shape for f in read)


def _name(node: fx.Node) -> str:
    """`permute` of `aten.permute.default`, `getitem`, or an empty string."""
    if node.op != "call_function":
        return ""
    target = node.target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", ""))
