"""Coverage now against coverage then: which norms are no longer rewritten, and why."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from fxpass.errors import FxpassError
from fxpass.report import Report, RewrittenSite
from fxpass.sites import Decline

Key = Callable[[RewrittenSite], Hashable]


@dataclass(frozen=True)
class Lost:
    """A norm of the baseline that has no counterpart, with its decline if there is one."""

    site: RewrittenSite
    now: Decline | None

    def __str__(self) -> str:
        why = f"now declined: {self.now.reason}" if self.now else "now not seen as a norm"
        name = self.site.module or f"%{self.site.node}"
        return f"lost {name} ({self.site.location}, {self.site.variant}): {why}"


def parse(text: str, path: str) -> Report:
    """A report written by `fxpass explain --json`, or the one inside a diff's JSON."""
    try:
        data = json.loads(text)
        return Report.from_dict(data.get("report", data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "needs the output of `fxpass explain TARGET --json`"
        raise FxpassError(f"{path} is no report ({error}); {hint}") from error


def lost(before: Report, now: Report) -> list[Lost]:
    """The norms rewritten before and not now.

    Lines move and modules are renamed, so sites are paired by module and line text first, then by
    module alone, then by line text alone; numbers of lines never count.
    """
    left, fresh = list(before.rewritten), list(now.rewritten)
    for key in (_module_and_line, _module, _line):
        left, fresh = _unpaired(left, fresh, key)
    return [Lost(site, _decline_of(site, now.declined)) for site in left]


def _module_and_line(site: RewrittenSite) -> Hashable:
    return site.module, _line(site)


def _module(site: RewrittenSite) -> Hashable:
    return site.module or None


def _line(site: RewrittenSite) -> Hashable:
    return (_file(site.location), site.source) if site.source else None


def _unpaired(
    old: list[RewrittenSite], new: list[RewrittenSite], key: Key
) -> tuple[list[RewrittenSite], list[RewrittenSite]]:
    """What is left of both lists once equal keys are paired; None pairs with nothing."""
    common = Counter(map(key, old)) & Counter(map(key, new))
    del common[None]
    return _without(old, common, key), _without(new, common, key)


def _without(
    sites: Iterable[RewrittenSite], paired: Counter[Hashable], key: Key
) -> list[RewrittenSite]:
    rest, left = Counter(paired), []
    for site in sites:
        if rest[key(site)] > 0:
            rest[key(site)] -= 1
        else:
            left.append(site)
    return left


def _decline_of(site: RewrittenSite, declined: Iterable[Decline]) -> Decline | None:
    """The decline that speaks of the same module, or else of the same line."""
    same = [m for m in declined if site.module and m.module == site.module]
    same += [m for m in declined if m.source and (_file(m.location), m.source) == _line(site)]
    return same[0] if same else None


def _file(location: str) -> str:
    return os.path.basename(location.rpartition(":")[0])
