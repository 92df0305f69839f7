"""S3 servers on which generations are tried."""

from tests.s3_servers import moto, moto_server, seaweedfs, seaweedfs_server

__all__ = ["moto", "moto_server", "seaweedfs", "seaweedfs_server"]
