"""``opticnerve plan``: how many workers of each pool some traffic needs, by simulation."""
