"""Throughput measurements: what a server answers per second, beside what the machine and a plain server can do."""
