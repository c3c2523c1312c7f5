"""Attempts to refute a privacy claim: direct checks of the private mechanism, and attacks on it."""
