"""``make gpu``: on a CUDA machine, everything is built, tested, checked, measured and summed up in nine minutes."""
