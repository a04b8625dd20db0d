"""What ``opticnerve.client`` is made of: pictures and contents know no wire, the rest does."""
