"""`python -m pyfinetune`: the command line, as `torchrun` and `accelerate launch` start it."""

from pyfinetune.cli import main

if __name__ == "__main__":
    main()
