"""`python -m benchmarks.mishaps`."""

from .run import main

main()
