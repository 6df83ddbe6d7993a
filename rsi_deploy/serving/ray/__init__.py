"""The same server as an application of Ray Serve."""
