"""Whole networks, in training and at inference, against what users have today."""
