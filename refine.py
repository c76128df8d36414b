#!/usr/bin/env python3
"""Refine a GAN with a diffusion teacher: python refine.py --gan=… --teacher=…  (--help lists the options)."""

from refine.cli.main import run_command

if __name__ == "__main__":
    run_command("refine")
