"""`python -m ddpm_pipeline.jobs.cli`: the same as `ddpm`."""

from ddpm_pipeline.jobs.cli import main

main()
