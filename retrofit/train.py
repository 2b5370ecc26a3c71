"""`accelerate launch ... -m retrofit.train RECIPE ...`, the same options as `retrofit train RECIPE ...`."""

import sys

from retrofit.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
