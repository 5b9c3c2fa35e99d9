"""Draw the house: python docs/house.py writes docs/house.svg from the package's own imports.

A box is a room, with its modules and lines; a floor imports only from floors below it. Grey lines
are imports between rooms.
"""

import ast
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lorabook"
FLOORS = (
    ("studio",),
    ("training",),
    ("sweeps", "hub"),
    ("live",),
    ("lora",),
    ("metrics", "machine"),
    ("pipelines", "images", "show"),
    ("worlds", "blocks", "lowrank", "schedulers", "upstream", "checks", "types", "bootstrap"),
)
SAYS = {
    "studio": "the sliders",
    "training": "one loop, its data and its checkpoints",
    "sweeps": "many images in few denoising passes",
    "hub": "share",
    "live": "an adapter on a pipeline",
    "lora": "an adapter as data",
    "metrics": "CLIP",
    "machine": "doctor, Colab, Kaggle",
    "pipelines": "load a model",
    "images": "captioned images",
    "show": "grids, plots, tables",
}
WIDTH, HEIGHT, GAP = 960, 58, 44
COLORS = ("#335f8a", "#2b6f8f", "#1f6f33", "#75640f", "#a83746", "#7d2a5b", "#4a5866", "#5a6868")


def modules_of(room: str) -> list[Path]:
    """The modules of a room, a folder or one file."""
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def imports_of(room: str) -> set[str]:
    """The other rooms that a room imports from."""
    rooms = set()
    for path in modules_of(room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorabook."):
                rooms.add(node.module.split(".")[1])
    return rooms - {room}


def boxes() -> dict[str, tuple[float, float, float]]:
    """Left, top and width of each room."""
    places = {}
    for number, floor in enumerate(FLOORS):
        lines = [sum(len(p.read_text().splitlines()) for p in modules_of(room)) for room in floor]
        free = WIDTH - 40 - 12 * (len(floor) - 1) - 92 * len(floor)
        left = 20.0
        for room, count in zip(floor, lines, strict=True):
            width = 92 + free * count / sum(lines) * min(1, sum(lines) / 2400 + 0.35)
            places[room] = (left, 20 + number * (HEIGHT + GAP), width)
            left += width + 12
    return places


def svg() -> str:
    """The picture, readable on a light and on a dark page."""
    places, parts = boxes(), []
    for room, (left, top, width) in places.items():
        for other in sorted(imports_of(room) & places.keys()):
            x, y, w = places[other]
            parts.append(
                f'<path d="M{left + width / 2:.0f} {top + HEIGHT} '
                f"C{left + width / 2:.0f} {top + HEIGHT + 30} {x + w / 2:.0f} {y - 30} "
                f'{x + w / 2:.0f} {y}" fill="none" stroke="#888" stroke-opacity=".35"/>'
            )
    for number, floor in enumerate(FLOORS):
        for room in floor:
            left, top, width = places[room]
            files = [path for path in modules_of(room) if path.name != "__init__.py"]
            lines = sum(len(path.read_text().splitlines()) for path in modules_of(room))
            count = f"{len(files)} modules, {lines} lines" if len(files) > 1 else f"{lines} lines"
            title = f"{room}/" if len(files) > 1 else room
            texts = (title, SAYS.get(room, ""), count) if room in SAYS else (title, count)
            parts.append(
                f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{HEIGHT}" rx="6" '
                f'fill="{COLORS[number]}"/>'
            )
            for row, text in enumerate(texts):
                weight = "bold" if row == 0 else "normal"
                parts.append(
                    f'<text x="{left + 8:.0f}" y="{top + 18 + 16 * row}" font-weight="{weight}" '
                    f'font-size="{13 if row == 0 else 10.5}" fill="#fff">{escape(text)}</text>'
                )
    height = 20 + len(FLOORS) * (HEIGHT + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" role="img">'
        "<title>The rooms of lorabook and their imports</title>"
        f"{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    (Path(__file__).parent / "house.svg").write_text(svg())
