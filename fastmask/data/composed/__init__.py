"""Embedded data: scenes composed from real pixels and clips composed from real sounds, with exact truth."""
