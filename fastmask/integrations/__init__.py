"""One file for each foreign library: explicit functions that patch a given object."""
