"""The HTTP door: STOW-RS, WADO-RS and QIDO-RS (DICOM PS3.18)."""
