"""A federation on this machine, or on a Ray cluster: which clients train where, and how many at once."""
