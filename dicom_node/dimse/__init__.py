"""The DIMSE door (DICOM PS3.7, PS3.8); the only importer of pynetdicom."""
