"""Benchmarks and the demo. They use the package; nothing in it but the command line's bench verb knows them."""
