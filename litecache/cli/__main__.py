"""`python -m litecache.cli`."""

from __future__ import annotations

from litecache.cli import main

if __name__ == "__main__":
    main()
