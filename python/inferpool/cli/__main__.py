"""``python -m inferpool.cli``, where the script ``inferpool`` is not on the path."""

from __future__ import annotations

from inferpool.cli import main

main(prog_name="inferpool")
