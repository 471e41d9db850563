"""`python -m petals.cli`, the same as `petals`. Knows nothing else."""

from petals.cli.main import main

main()
