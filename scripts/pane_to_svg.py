"""A terminal's screen, as `tmux capture-pane -ep` gives it, as an SVG: docs/top.svg.

tmux capture-pane -ep -t PANE | python scripts/pane_to_svg.py docs/top.svg "litecache top"
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> int:
    path, title = sys.argv[1:]
    screen = Text.from_ansi(sys.stdin.read().rstrip())
    width = max(len(line) for line in screen.plain.split("\n"))
    console = Console(width=width, record=True, file=io.StringIO(), color_system="truecolor")
    console.print(screen)
    Path(path).write_text(console.export_svg(title=title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
