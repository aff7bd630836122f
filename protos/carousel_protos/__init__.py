"""The contracts: messages of `carousel.v1`, and the bundle's reader and writer. Needs protobuf and nothing else."""

from carousel_protos.bundle import Bundle, BundleError, BundleWriter, find_versions, newest_version

__all__ = ["Bundle", "BundleError", "BundleWriter", "find_versions", "newest_version"]
