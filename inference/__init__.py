"""The laboratory: decodes frames, runs models, writes reports. Knows nothing of doors."""
