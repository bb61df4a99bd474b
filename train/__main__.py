"""`python -m train`: run, export, convert, evaluate."""

from train.cli import main

if __name__ == "__main__":
    main()
