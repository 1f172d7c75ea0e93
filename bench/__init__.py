"""Benchmarks of npscope; not part of the installed package."""
