"""The benchmark suite of the repository: cases, the suite that runs them, the report made from its results."""
