"""`python -m hybridize`: the command line."""

from hybridize.cli import main

main()
