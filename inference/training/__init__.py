"""How the reference bundles were made: ``python -m inference.training.<name>``. Not needed to run a node."""
