"""The skin picture of ``dicom-node send --demo``."""

from inference.drawing import draw_skin_picture

__all__ = ["draw_skin_picture"]
