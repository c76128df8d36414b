"""`python -m refine {refine,compare,generate,inspect} …`"""

from refine.cli.main import main

if __name__ == "__main__":
    main()
