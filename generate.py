#!/usr/bin/env python3
"""Images from a network: python generate.py --network=… --seeds=0-35 --outdir=…  (--help lists the options)."""

from refine.cli.main import run_command

if __name__ == "__main__":
    run_command("generate")
