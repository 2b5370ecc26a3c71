"""`python -m retrofit VERB ...`, the same as `retrofit VERB ...`."""

from retrofit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
