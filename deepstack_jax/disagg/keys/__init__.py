"""The keys that nodes of the split have: one that all of them share, or one per node that an authority has signed."""
