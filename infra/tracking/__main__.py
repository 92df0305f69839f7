"""`python -m ddpm_pipeline.infra.tracking OPTIONS`: `mlflow server OPTIONS`, with the application in `app`."""

import sys
from pathlib import Path

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.tracking.app import users_of_server

# MLflow finds applications through the metadata of packages: this folder declares ours. MLflow's command line reads it
# when imported, so the import comes below.
sys.path.append(str(Path(__file__).with_name("plugin")))


def main() -> None:
    """Run the server until it is ended."""
    try:
        users_of_server()  # here it is one line; a worker of the server would be started again and again
    except UserError as error:
        sys.exit(f"error: {error}")
    from mlflow.cli import cli

    cli(["server", "--app-name", "ddpm", *sys.argv[1:]])


if __name__ == "__main__":
    main()
