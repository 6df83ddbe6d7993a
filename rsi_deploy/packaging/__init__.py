"""Conversion of bundles to packages for serving engines: Triton, KServe, Ray Serve, ORT format."""
