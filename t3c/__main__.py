"""Runs the command line: python -m t3c."""

from t3c.cli import main

if __name__ == "__main__":
    main()
