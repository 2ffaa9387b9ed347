"""Loss as a function of k: measured, and what to conclude."""
