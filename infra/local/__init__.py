"""The local stack: S3 (JuiceFS's gateway), MLflow and Ray as real servers on loopback, ended by pid."""

from ddpm_pipeline.infra.local.client_environment import check_ray, environment, export_environment, sign_in
from ddpm_pipeline.infra.local.stack import LocalStack, ServiceStatus

__all__ = ["LocalStack", "ServiceStatus", "check_ray", "environment", "export_environment", "sign_in"]
