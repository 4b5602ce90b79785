"""`python -m bnlab` is the `bnlab` command."""

from bnlab.cli.main import main

main()
