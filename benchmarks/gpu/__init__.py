"""``make gpu``: builds, tests, checks and measures everything on a CUDA machine in nine minutes, with a summary."""
