"""`python -m jobs.cli`: the same as `ddpm`."""

from jobs.cli import main

main()
