"""`python -m refine {refine,compare,generate,inspect,export,doctor,ops} …`, see `refine.cli.main`."""

from refine.cli.main import main

if __name__ == "__main__":
    main()
