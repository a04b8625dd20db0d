"""gRPC as every service uses it: server lifecycle, client channels, errors at the edge."""
