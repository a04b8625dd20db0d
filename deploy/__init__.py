"""Running the services together: the local supervisor behind ``opticnerve up``."""
