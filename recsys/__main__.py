"""`python -m recsys` is the `recsys` command."""

from experiments.cli import main

if __name__ == "__main__":
    main()
