"""A diff as one HTML file that needs no network: for browsers, issues and CI artifacts."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxpass.diff import Diff, SiteDiff
from fxpass.diff_svg import picture
from fxpass.diff_text import kind

_TEMPLATE = "diff.html.jinja"


@dataclass(frozen=True)
class Kind:
    """Sites that change alike, with one picture for all of them."""

    title: str
    count: int
    before: str
    after: str


@dataclass(frozen=True)
class Summary:
    """The numbers at the top."""

    rewritten: int
    declined: int
    graphs: int
    kernels: dict[str, int]
    nodes_before: int
    nodes_after: int
    launches: Counted
    bytes: Counted
    bytes_copied: int
    numerics: dict[str, int]


@dataclass(frozen=True)
class Counted:
    """A sum before and after, over the norms where both are known."""

    before: int
    after: int
    known: int
    left_out: int

    def __str__(self) -> str:
        if not self.known:
            return "not known"
        return f"{self.before:,} → {self.after:,}"


def page(diff: Diff, numbers: Mapping[str, Any] | None = None) -> str:
    """The whole file. `numbers`: what `numerics.Numbers.to_dict` gives, if it was measured."""
    import jinja2

    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    kinds = _kinds(diff.sites)
    return environment.get_template(_TEMPLATE).render(
        diff=diff,
        numbers=numbers,
        summary=_summary(diff),
        kinds=[_drawn(sites) for sites in kinds],
        kind_of={id(site): index for index, sites in enumerate(kinds) for site in sites},
        identify=id,
        records=[_record(site) for site in diff.sites],
        misses=[json.dumps(dataclasses.asdict(miss), indent=1) for miss in diff.report.declined],
        report=diff.report.to_json(),
    )


def _record(site: SiteDiff) -> str:
    """What the button at a norm copies: its record, and its nodes on both sides."""
    data = dataclasses.asdict(site.record)
    return json.dumps({**data, "before": site.before, "after": site.after}, indent=1)


def _summary(diff: Diff) -> Summary:
    sites = diff.report.rewritten
    return Summary(
        rewritten=len(sites),
        declined=len(diff.report.declined),
        graphs=diff.report.graphs,
        kernels=diff.report.kernels,
        nodes_before=sum(site.nodes_before for site in sites),
        nodes_after=sum(site.nodes_after for site in sites),
        launches=_counted((site.launches_before, site.launches_after) for site in sites),
        bytes=_counted((site.bytes_before, site.bytes_after) for site in sites),
        bytes_copied=sum(site.bytes_copied or 0 for site in sites),
        numerics=dict(Counter(site.numerics for site in sites)),
    )


def _counted(pairs: Iterable[tuple[int | None, int | None]]) -> Counted:
    listed = list(pairs)
    known = [(old, new) for old, new in listed if old is not None and new is not None]
    before, after = sum(old for old, _ in known), sum(new for _, new in known)
    return Counted(before, after, len(known), len(listed) - len(known))


def _kinds(sites: Sequence[SiteDiff]) -> list[list[SiteDiff]]:
    groups: dict[Hashable, list[SiteDiff]] = {}
    for site in sites:
        groups.setdefault(kind(site), []).append(site)
    return list(groups.values())


def _drawn(sites: Sequence[SiteDiff]) -> Kind:
    first = sites[0]
    title = f"{first.record.variant} to {first.record.kernel}"
    return Kind(
        title,
        len(sites),
        picture(first.flow_before, f"{title}: before"),
        picture(first.flow_after, f"{title}: after"),
    )
