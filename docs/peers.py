"""Draw docs/peers.svg from the first table of docs/performance.md: `python docs/peers.py`."""

from pathlib import Path

DOCS = Path(__file__).parent
OURS = ("method=", "support=")
# Rows that the chart leaves out: the unit of the time, and an approximate gradient.
OMITTED = ("bare", "gradient_filter=")
LEFT, ROW, PANEL, GAP, TOP = 300, 26, 230, 80, 48
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #222; }
    .title { font-weight: 600; }
    .name { text-anchor: end; }
    rect { fill: #90a4ae; }
    rect.ours { fill: #1976d2; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6e6e6; }
      rect { fill: #78909c; }
      rect.ours { fill: #64b5f6; }
    }
"""


def rows(page: str) -> list[tuple[str, float, float]]:
    """Return name, time as a ratio and MiB on Qwen3's head, for each row of the page's table."""
    lines = page[page.index("| method |") :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return [
        (_label(row[0]), float(row[3].split()[0]), float(row[4].replace(",", "")))
        for row in cells
        if not row[0].startswith(OMITTED)
    ]


def _label(method: str) -> str:
    prefix = "opd_kernels, " if method.startswith(OURS) else ""
    return prefix + method.replace("`", "").replace('"', "")


def chart(page: str) -> str:
    """Return the chart as SVG: one bar for each method in a panel of times and one of memory."""
    table = rows(page)
    height = TOP + ROW * len(table) + 10
    right = LEFT + PANEL + GAP
    panels = (
        (LEFT, "time, 1 = four matrix products", [time for _, time, _ in table], "{:.2f}"),
        (right, "peak extra memory, MiB", [memory for _, _, memory in table], "{:,.0f}"),
    )
    width = right + PANEL + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Time and peak memory on the head of Qwen3-0.6B">',
        f"<style>{STYLE}</style>",
    ]
    for n, (name, _, _) in enumerate(table):
        parts.append(f'<text class="name" x="{LEFT - 10}" y="{TOP + ROW * n + 17}">{name}</text>')
    for x, title, values, form in panels:
        parts.append(f'<text class="title" x="{x}" y="28">{title}</text>')
        for n, value in enumerate(values):
            kind = ' class="ours"' if table[n][0].startswith("opd_kernels") else ""
            y, length = TOP + ROW * n, PANEL * value / max(values)
            parts.append(f'<rect{kind} x="{x}" y="{y + 4}" width="{length:.1f}" height="17"/>')
            parts.append(f'<text x="{x + length + 6:.1f}" y="{y + 17}">{form.format(value)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (DOCS / "peers.svg").write_text(chart((DOCS / "performance.md").read_text()))
