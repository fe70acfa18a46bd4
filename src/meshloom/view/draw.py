"""Pictures of graphs that have places: SVG as text, PNG by Pillow; both draw the same. No torch.

Tensors green, ops blue, communication and its edges red, other edges black; what `check` found fault with has a thick
orange line. All text is escaped: a trace is untrusted input.
"""

from __future__ import annotations

import io
from html import escape
from typing import Any

import networkx as nx

from meshloom.view.graph import si
from meshloom.view.place import COLOURS, HEIGHT, WIDTH, Placed, Point, place

_FAULT = "#ef6c00"
_LEGEND = {"op": "ops", "tensor": "tensors", "communication": "communication"}
_MARGIN, _HEAD, _LINE = 24.0, 84.0, 16.0
_NARROW, _BROAD = frozenset("iljtfrI.,:;'|()[] ·…/"), frozenset("mwMWABCDGHKNOQRUVX@%&×")
_MAX_PIXELS = 48_000_000  # of a PNG: what is larger is drawn smaller
_FONTS = ("NotoSansCJK-Regular.ttc", "NanumGothic.ttf", "AppleSDGothicNeo.ttc", "malgun.ttf", "DejaVuSans.ttf")


def svg(graph: nx.DiGraph, *, graphviz: bool | None = None) -> str:
    """The graph as an SVG document."""
    placed = place(graph, graphviz=graphviz)
    width, height = _size(placed, graph)
    title, notes, head = graph.graph.get("title", ""), *_notes(graph, width)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title><defs>{_arrow('end', '#222')}{_arrow('red', '#c62828')}"
        f'</defs><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{_MARGIN}" y="32" font-size="15" font-weight="600">{escape(title)}</text>',
        *(
            f'<text x="{_MARGIN}" y="{50 + _LINE * at}" fill="#555">{escape(line)}</text>'
            for at, line in enumerate(notes)
        ),
    ]
    for index, (kind, text) in enumerate(_legend(graph)):
        fill, line = COLOURS.get(kind, ("#fff", _FAULT))
        x = _MARGIN + 130 * index
        parts.append(
            f'<rect x="{x}" y="{head - 24}" width="14" height="12" rx="3" fill="{fill}" stroke="{line}"/>'
            f'<text x="{x + 20}" y="{head - 14}">{text}</text>'
        )
    parts.append(f'<g transform="translate({_MARGIN} {head})">')
    parts += [f'<text x="{x}" y="14" fill="#555">{escape(text)}</text>' for x, text in placed.headings]
    parts += [_svg_edge(way, graph.edges[edge].get("kind", "data")) for edge, way in placed.ways.items()]
    parts += [_svg_box(corner, graph.nodes[key]) for key, corner in placed.corners.items()]
    return "\n".join([*parts, "</g></svg>", ""])


def _size(placed: Placed, graph: nx.DiGraph) -> tuple[float, float]:
    width = max(placed.width + 2 * _MARGIN, 600)
    return width, placed.height + _notes(graph, width)[1] + _MARGIN


def _notes(graph: nx.DiGraph, width: float) -> tuple[list[str], float]:
    """The notes in lines that fit, and where the picture below them begins."""
    lines = [""]
    for word in str(graph.graph.get("notes", "")).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _length(longer, 12) > width - 2 * _MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines, _HEAD + _LINE * (len(lines) - 1)


def _length(text: str, size: float) -> float:
    """How long the text is about, in points: pictures are drawn with whatever font is there."""
    return size * sum(1.0 if ord(sign) > 0x2E7F else 0.34 if sign in _NARROW else 0.76 if sign in _BROAD else 0.59
                      for sign in text)  # fmt: skip


def _end_of(text: str, size: float, room: float) -> str:
    """The text, or its end after an ellipsis, as far as it fits."""
    if _length(text, size) <= room:
        return text
    while text and _length(text, size) > room - size:
        text = text[1:]
    return "…" + text


def _legend(graph: nx.DiGraph) -> list[tuple[str, str]]:
    kinds = {facts["kind"] for _, facts in graph.nodes(data=True)}
    shown = [(kind, text) for kind, text in _LEGEND.items() if kind in kinds or not kinds]
    if any(facts.get("fault") for _, facts in graph.nodes(data=True)):
        shown.append(("fault", "fault found by check"))
    return shown


def _arrow(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
    )


def _svg_edge(way: list[Point], kind: str) -> str:
    colour, marker = ("#c62828", "red") if kind == "communication" else ("#222", "end")
    (x, y), *rest = way
    curve = " ".join(f"{px:.1f},{py:.1f}" for px, py in rest)
    dashes = ' stroke-dasharray="4 3"' if kind == "order" else ""
    return (
        f'<path d="M{x:.1f} {y:.1f}C{curve}" fill="none" stroke="{colour}" stroke-opacity=".6"{dashes} '
        f'marker-end="url(#{marker})"/>'
    )


def _texts(facts: dict[str, Any]) -> tuple[str, str]:
    label = _end_of(facts["label"], 12, WIDTH - 16)
    if facts["kind"] == "tensor":
        return label, si(facts["bytes"], "B") if facts["bytes"] else ""
    amount, unit = (facts["bytes"], "B") if facts["kind"] == "communication" else (facts["flops"], "FLOP")
    told = [f"{facts['num_ops']} ×"] if facts["num_ops"] > 1 else []
    told += [si(amount, unit)] if amount else []
    if facts["module"] and facts["module"] != facts["label"]:
        room = WIDTH - 16 - _length(" · ".join([*told, ""]), 10)
        told.append(_end_of(facts["module"], 10, room))
    return label, " · ".join(told)


def _tooltip(facts: dict[str, Any]) -> str:
    told = f"{facts['name']} {facts['module']} {facts['phase']}: {facts['num_ops']} ops, {facts['flops']:,} FLOP, "
    told += f"{facts['bytes']:,} bytes"
    return f"{told}; FAULT {facts['fault']}" if facts.get("fault") else told


def _svg_box(corner: Point, facts: dict[str, Any]) -> str:
    (x, y), (fill, line) = corner, COLOURS[facts["kind"]]
    radius = 17 if facts["kind"] == "tensor" else 6
    mark = f'stroke="{_FAULT}" stroke-width="3.5"' if facts.get("fault") else f'stroke="{line}"'
    above, below = _texts(facts)
    return (
        f'<g><title>{escape(_tooltip(facts))}</title><rect x="{x:.1f}" y="{y:.1f}" width="{WIDTH:.0f}" '
        f'height="{HEIGHT:.0f}" rx="{radius}" fill="{fill}" {mark}/>'
        f'<text x="{x + 9:.1f}" y="{y + 15:.1f}">{escape(above)}</text>'
        f'<text x="{x + 9:.1f}" y="{y + 29:.1f}" font-size="10" fill="#555">{escape(below)}</text></g>'
    )


# -- PNG


def png(graph: nx.DiGraph, *, graphviz: bool | None = None) -> bytes:
    """The graph as a PNG file, two pixels a point; smaller where that would be more than 48 million pixels."""
    from PIL import Image, ImageDraw

    placed = place(graph, graphviz=graphviz)
    width, height = _size(placed, graph)
    notes, head = _notes(graph, width)
    scale = min(2.0, (_MAX_PIXELS / (width * height)) ** 0.5)
    image = Image.new("RGB", (round(width * scale), round(height * scale)), "#ffffff")
    pen = _Pen(ImageDraw.Draw(image), scale)
    pen.text((_MARGIN, 18), graph.graph.get("title", ""), 15, "#111111")
    for at, text in enumerate(notes):
        pen.text((_MARGIN, 40 + _LINE * at), text, 12, "#555555")
    for index, (kind, text) in enumerate(_legend(graph)):
        fill, line = COLOURS.get(kind, ("#ffffff", _FAULT))
        pen.box((_MARGIN + 130 * index, head - 24), (14, 12), 3, fill, line, 1)
        pen.text((_MARGIN + 130 * index + 20, head - 25), text, 12, "#111111")
    pen.shift = (_MARGIN, head)
    for x, text in placed.headings:
        pen.text((x, 3), text, 12, "#555555")
    for edge, way in placed.ways.items():
        pen.curve(way, "#d66a6a" if graph.edges[edge].get("kind") == "communication" else "#7a7a7a")
    for key, corner in placed.corners.items():
        facts = graph.nodes[key]
        fill, line = COLOURS[facts["kind"]]
        fault = bool(facts.get("fault"))
        radius = 17 if facts["kind"] == "tensor" else 6
        pen.box(corner, (WIDTH, HEIGHT), radius, fill, _FAULT if fault else line, 3.5 if fault else 1)
        above, below = _texts(facts)
        pen.text((corner[0] + 9, corner[1] + 4), above, 12, "#111111")
        pen.text((corner[0] + 9, corner[1] + 20), below, 10, "#555555")
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=len(graph) < 500)
    return file.getvalue()


class _Pen:
    """Draws in points on an image of `scale` pixels a point."""

    def __init__(self, on: Any, scale: float) -> None:
        self.on, self.scale, self.shift = on, scale, (0.0, 0.0)
        self._fonts: dict[tuple[bool, int], Any] = {}

    def at(self, point: Point) -> Point:
        """The pixel of a point."""
        return (point[0] + self.shift[0]) * self.scale, (point[1] + self.shift[1]) * self.scale

    def text(self, point: Point, text: str, size: float, colour: str) -> None:
        """Write, from the upper left corner on."""
        font = self._font(text.isascii(), max(4, round(size * self.scale)))
        self.on.text(self.at(point), text, fill=colour, font=font)

    def box(self, corner: Point, size: Point, radius: float, fill: str, line: str, width: float) -> None:
        """A box with round corners."""
        x, y = self.at(corner)
        shape = (x, y, x + size[0] * self.scale, y + size[1] * self.scale)
        self.on.rounded_rectangle(shape, radius * self.scale, fill, line, max(1, round(width * self.scale)))

    def curve(self, way: list[Point], colour: str) -> None:
        """A way, with an arrow at its end."""
        points = [self.at(point) for point in bezier(way)]
        self.on.line(points, fill=colour, width=max(1, round(0.8 * self.scale)))
        (x1, y1), (x2, y2) = points[-2], points[-1]
        length = max(1e-6, ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5)
        dx, dy = (x2 - x1) / length * 6 * self.scale, (y2 - y1) / length * 6 * self.scale
        self.on.polygon([(x2, y2), (x2 - dx - dy / 2, y2 - dy + dx / 2), (x2 - dx + dy / 2, y2 - dy - dx / 2)], colour)

    def _font(self, ascii_only: bool, size: int) -> Any:
        from PIL import ImageFont

        if (ascii_only, size) not in self._fonts:
            font: Any = None
            for name in () if ascii_only else _FONTS:  # Pillow's own has Latin letters only
                try:
                    font = ImageFont.truetype(name, size)
                    break
                except OSError:
                    continue
            self._fonts[ascii_only, size] = font or ImageFont.load_default(size)
        return self._fonts[ascii_only, size]


def bezier(way: list[Point], *, steps: int = 10) -> list[Point]:
    """Points on the cubic Bézier curves of a way."""
    points = [way[0]]
    for place_ in range(0, len(way) - 3, 3):
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = way[place_ : place_ + 4]
        for step in range(1, steps + 1):
            t = step / steps
            s = 1 - t
            w = s**3, 3 * s * s * t, 3 * s * t * t, t**3
            points.append(
                (w[0] * ax + w[1] * bx + w[2] * cx + w[3] * dx, w[0] * ay + w[1] * by + w[2] * cy + w[3] * dy)
            )
    return points
