"""The DIMSE door, the courier, the command line, and the composition root that puts all parts together."""
