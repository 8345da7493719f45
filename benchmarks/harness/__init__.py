"""What all benchmarks share: the registry's types, agreement checks, timing, memory, the machine, result files."""
