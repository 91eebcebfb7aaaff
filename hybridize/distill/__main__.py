"""What torchrun and accelerate start: `torchrun -m hybridize.distill DIR --recipe R --data TEXT --out DIR`."""

import sys

from hybridize.cli import app

if __name__ == "__main__":
    sys.exit(app(["distill", *sys.argv[1:]]))
