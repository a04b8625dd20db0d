"""Generated gRPC stubs of ``opticnerve.v1``; ``make protos`` writes them, git ignores them."""
