"""`python -m refine COMMAND …`; `python -m refine --help` lists the commands, which `refine.cli.main` knows."""

from refine.cli.main import main

if __name__ == "__main__":
    main()
