#!/usr/bin/env python3
"""Draws the headline cases of `keymill bench --json` as an SVG: one bar of ns per key for each contender.

    keymill bench --json > bench.jsonl
    python3 benches/plot.py bench.jsonl benches/kernels.svg "AMD EPYC 9000, one core"

The last argument, a note on the machine, is optional; `-` reads standard input. Thin lines mark the middle half of the
rounds. Needs nothing but Python 3.
"""

import json
import sys
from xml.sax.saxutils import escape

# The first case of each job, what its panel is called, and whom bars are compared with.
PANELS = [
    ("seal", dict(dek_len=32, aad_len=16, keks=1, batch=4096), "Seal", "wrap given data keys", "ring"),
    ("open", dict(dek_len=32, aad_len=16, keks=1, batch=4096), "Open", "unwrap them", "ring"),
    ("fill", dict(dek_len=32, batch=4096), "Fill", "random bytes of the data keys", "rand_chacha"),
    ("setup", dict(keks=1024), "Set-up", "derive and set up 1,024 KEKs (ns per KEK)", "aes-gcm"),
    ("job", dict(dek_len=32, aad_len=16, keks=1, batch=4096), "Whole job", "fill and seal", "ring"),
]
MEMBERS = ["job", "contender", "dek_len", "aad_len", "keks", "batch", "ns_per_key"]

WIDTH, LEFT, RIGHT = 760, 150, 190
ROW, BAR, HEAD, GAP, TOP, BOTTOM = 24, 15, 30, 16, 62, 34
INK, PALE, GRID = "#1f2328", "#5c6570", "#e3e6ea"
OURS, PEERS = "#0b6e99", "#b4bcc6"


def fail(message):
    sys.exit(f"plot.py: {message}")


def read_rows(name):
    try:
        file = sys.stdin if name == "-" else open(name, encoding="utf-8")
        with file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {name}: {error}")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            fail(f"{name}, line {number} is no JSON: {error}; use the output of `keymill bench --json`")
        missing = [member for member in MEMBERS if not isinstance(row, dict) or member not in row]
        if missing:
            fail(f"{name}, line {number} has no {', '.join(missing)}")
        time = row["ns_per_key"]
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 < time < 1e12:
            fail(f"{name}, line {number}: ns_per_key is {time!r}")
        rows.append(row)
    return rows


def panels_of(rows):
    """The panels that have rows."""
    panels = []
    for job, shape, title, what, peer in PANELS:
        chosen = [
            row
            for row in rows
            if row["job"] == job and all(row[member] == value for member, value in shape.items())
        ]
        if chosen:
            panels.append((title, what, peer, chosen))
    return panels


def text(x, y, words, size=12, color=INK, anchor="start", weight="normal"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
    )


def draw_panel(title, what, peer, rows, y):
    """One panel at height `y`, on a scale of its own."""
    out = [text(16, y + 16, title, 14, weight="bold"), text(LEFT, y + 16, what, 12, PALE)]
    peers = [row["ns_per_key"] for row in rows if row["contender"] == peer]
    scale = (WIDTH - LEFT - RIGHT) / max(row.get("ns_high") or row["ns_per_key"] for row in rows)
    y += HEAD
    out.append(
        f'<line x1="{LEFT}" y1="{y - 4}" x2="{LEFT}" y2="{y + ROW * len(rows) - 4}" stroke="{GRID}"/>'
    )
    for row in sorted(rows, key=lambda row: row["ns_per_key"]):
        time, middle = row["ns_per_key"], y + BAR / 2
        ours = row["contender"].startswith("keymill")
        weight = "bold" if ours else "normal"
        out.append(text(LEFT - 8, middle + 4, row["contender"], anchor="end", weight=weight))
        out.append(
            f'<rect x="{LEFT}" y="{y}" width="{time * scale:.1f}" height="{BAR}" rx="2" '
            f'fill="{OURS if ours else PEERS}"/>'
        )
        end = time
        if row.get("ns_low") and row.get("ns_high"):
            low, high = LEFT + row["ns_low"] * scale, LEFT + row["ns_high"] * scale
            out.append(
                f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}" stroke="{INK}"/>'
            )
            end = max(end, row["ns_high"])
        figure = f"{time:.1f} ns"
        if peers and ours:
            figure += f" ({peers[0] / time:.1f}x {peer})"
        out.append(text(LEFT + end * scale + 7, middle + 4, figure, weight=weight))
        y += ROW
    return out, y


def draw(panels, note):
    y, body = TOP, []
    for title, what, peer, rows in panels:
        drawn, y = draw_panel(title, what, peer, rows, y)
        body += drawn
        y += GAP
    height = y - GAP + BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, DejaVu Sans, sans-serif">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            text(16, 26, "Nanoseconds per key, less is better", 16, weight="bold"),
            text(
                16,
                44,
                "AES-256-GCM, 32-byte keys, 16 bytes of AAD, batches of 4,096, one KEK, one thread",
                12,
                PALE,
            ),
            *body,
            text(
                16,
                height - 12,
                " ".join(
                    ["Medians; thin lines: middle half; (2x ring): twice as fast as ring."]
                    + ([note + "."] if note else [])
                ),
                11,
                PALE,
            ),
            "</svg>",
            "",
        ]
    )


def main(arguments):
    if arguments in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if len(arguments) not in (2, 3):
        fail("usage: python3 benches/plot.py ROWS.jsonl OUT.svg [NOTE]; --help has more")
    rows = read_rows(arguments[0])
    panels = panels_of(rows)
    if not panels:
        fail(f"{arguments[0]} has none of the headline cases; run `keymill bench --json` unfiltered")
    picture = draw(panels, arguments[2].rstrip(".") if len(arguments) == 3 else "")
    try:
        with open(arguments[1], "w", encoding="utf-8") as file:
            file.write(picture)
    except OSError as error:
        fail(f"cannot write {arguments[1]}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
