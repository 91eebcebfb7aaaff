"""What torchrun and accelerate start: `torchrun -m hybridize.eval DIR --tasks T --task-data DIR`."""

import sys

from hybridize.cli import app

if __name__ == "__main__":
    sys.exit(app(["eval", *sys.argv[1:]]))
