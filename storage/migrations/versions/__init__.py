"""One file a revision; the sum of them equals ``storage.database.METADATA`` (a test)."""
