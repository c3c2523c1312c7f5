"""Faster ways to compute the same: each is tried against the plain way before a run uses it."""
