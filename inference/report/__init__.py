"""Results as DICOM: Structured Reports and Segmentations, written directly and the same every time."""

from inference.report.builder import build_reports
from inference.report.codes import CodingSchemes
from inference.report.identity import NodeIdentity

__all__ = ["CodingSchemes", "NodeIdentity", "build_reports"]
