"""Manifests for KubeRay, and the two small programs that run inside them."""
