"""Bytes, keys, index, work queue and audit trail. Imports none of the other packages."""
