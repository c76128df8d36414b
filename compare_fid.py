#!/usr/bin/env python3
"""Compare two networks before/after: python compare_fid.py --before=A --after=B --ref=…  (--help lists the options)."""

from refine.cli.main import run_command

if __name__ == "__main__":
    run_command("compare")
