"""A data-flow picture of one site as SVG: boxes in layers, each below everything it reads."""

from __future__ import annotations

from html import escape

from fxpass.diff import Flow

_WIDE, _HIGH, _GAP_X, _GAP_Y, _EDGE = 184, 40, 16, 26, 60


def picture(flow: Flow, title: str) -> str:
    """The SVG element; colours come from the page's style sheet."""
    layers = _layers(flow)
    places = _places(layers)
    width = max(len(layer) for layer in layers) * (_WIDE + _GAP_X) - _GAP_X + 2 * _EDGE
    height = len(layers) * (_HIGH + _GAP_Y) - _GAP_Y + 2 * _GAP_Y
    lines = [_line(places[edge.source], places[edge.target]) for edge in flow.edges]
    boxes = [
        _box(label, places[index], "input" if index < flow.inputs else "node")
        for index, label in enumerate(flow.labels)
    ]
    head = (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    )
    return "\n".join([head, *lines, *boxes, "</svg>"])


def _layers(flow: Flow) -> list[list[int]]:
    """Boxes by depth. Inputs stand right above their first reader, so that lines stay short."""
    depth = [0] * len(flow.labels)
    for edge in flow.edges:  # in graph order, so a source is final before it is read
        depth[edge.target] = max(depth[edge.target], depth[edge.source] + 1)
    for index in range(flow.inputs):
        readers = [depth[edge.target] for edge in flow.edges if edge.source == index]
        depth[index] = max(0, min(readers, default=1) - 1)
    found: list[list[int]] = [[] for _ in range(max(depth, default=0) + 1)]
    for index, level in enumerate(depth):
        found[level].append(index)
    return [layer for layer in found if layer]


def _places(layers: list[list[int]]) -> dict[int, tuple[int, int]]:
    """Upper left corners; each layer is centred."""
    most = max(len(layer) for layer in layers)
    found = {}
    for level, layer in enumerate(layers):
        start = _EDGE + (most - len(layer)) * (_WIDE + _GAP_X) // 2
        for column, index in enumerate(layer):
            left, top = start + column * (_WIDE + _GAP_X), _GAP_Y + level * (_HIGH + _GAP_Y)
            found[index] = (left, top)
    return found


def _line(source: tuple[int, int], target: tuple[int, int]) -> str:
    x1, y1 = source[0] + _WIDE // 2, source[1] + _HIGH
    x2, y2 = target[0] + _WIDE // 2, target[1]
    bend = (y2 - y1) // 2
    if bend > _GAP_Y:  # past other boxes, so around them
        aside = _WIDE * 21 // 20
        return f'<path class="flow" d="M{x1} {y1}C{x1 + aside} {y1} {x2 + aside} {y2} {x2} {y2}"/>'
    return f'<path class="flow" d="M{x1} {y1}C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}"/>'


def _box(label: str, place: tuple[int, int], kind: str) -> str:
    name, _, result = label.partition("\n")
    x, y = place
    return (
        f'<g class="{kind}"><rect x="{x}" y="{y}" width="{_WIDE}" height="{_HIGH}" rx="5"/>'
        f'<text x="{x + _WIDE // 2}" y="{y + 17}">{escape(_short(name))}</text>'
        f'<text class="kind" x="{x + _WIDE // 2}" y="{y + 32}">{escape(_short(result))}</text></g>'
    )


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
