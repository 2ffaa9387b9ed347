"""`python -m taildropout`: the same as the command `taildropout`."""

from .demo.cli import main

if __name__ == "__main__":
    main()
