"""The sentences of a report, for a person who reads one line of it."""

from __future__ import annotations

from inference.records import Failure, FrameAnalysis, ImageAnalysis, Indicator

DISCLAIMER = "Not for clinical use: reference models. AI result, not verified by a clinician."

_INDICATOR_NAMES = {"malignancy": "malignancy", "urgent_referral": "urgent referral", "high_priority_referral": "high-priority referral"}


def percent(probability: float) -> str:
    """A probability for the eye: one digit after the point."""
    return f"{100 * probability:.1f} %"


def _bound(threshold: float) -> str:
    return f"{100 * threshold:.4f}".rstrip("0").rstrip(".") + " %"


def _against(indicator: Indicator) -> str:
    side = "above" if indicator.positive else "below"
    return f"{_INDICATOR_NAMES[indicator.key]} {percent(indicator.probability)}, {side} the threshold ({_bound(indicator.threshold)})"


def refusal(frame: FrameAnalysis) -> str | None:
    """Why no disease was looked for on this frame; None when the gates let it through."""
    if frame.valid:
        return None
    reasons = []
    if frame.quality is None:
        reasons.append("image quality could not be determined")
    elif not frame.quality.acceptable:
        reasons.append(
            f"image quality {frame.quality.score:.0f} of 100 ({frame.quality.band}), below the accept threshold {frame.quality.threshold:g}"
        )
    if frame.domain is None:
        reasons.append("image domain could not be determined")
    elif not frame.domain.dermatological:
        reasons.append(f"not recognised as skin (certainty {percent(frame.domain.confidence)}, threshold {_bound(frame.domain.threshold)})")
    return "Not analysed: " + "; ".join(reasons) + "."


def conclusion(frame: FrameAnalysis) -> str:
    """One sentence of what was found on a frame."""
    refused = refusal(frame)
    if refused is not None:
        return refused
    parts = []
    if frame.diagnosis is not None and frame.diagnosis.categories:
        first = frame.diagnosis.categories[0]
        meaning = first.code.meaning
        parts.append(f"Most likely: {meaning[:1].lower() + meaning[1:]} {percent(first.probability)}")
    parts += [_against(indicator) for indicator in frame.indicators if indicator.key in _INDICATOR_NAMES]
    if frame.segmentation is not None:
        count = len(frame.segmentation.lesions)
        parts.append(f"{count} lesion outlined" if count == 1 else f"{count} lesions outlined")
    return "; ".join(parts) + "." if parts else "No clinical item gave a result."


def failures(analysis: ImageAnalysis) -> list[str]:
    """What is missing from the analysis and why, one line each; empty when it is complete."""

    def line(failure: Failure, frame: int | None) -> str:
        where = f" (frame {frame})" if frame is not None else ""
        return f"Not computed: {failure.item}{where}: {failure.reason}"

    several = analysis.frame_count > 1
    lines = [line(failure, None) for failure in analysis.failures]
    lines += [line(failure, frame.frame_number if several else None) for frame in analysis.frames for failure in frame.failures]
    if analysis.frame_count > len(analysis.frames):
        lines.append(f"Analysed {len(analysis.frames)} of {analysis.frame_count} frames.")
    return lines


def completion_description(analysis: ImageAnalysis) -> str:
    """What is missing, short (Completion Flag Description, 0040,A492); empty when nothing is."""
    items = sorted(
        {failure.item for failure in analysis.failures} | {failure.item for frame in analysis.frames for failure in frame.failures}
    )
    parts = [f"Not computed: {', '.join(items)}"] if items else []
    if analysis.frame_count > len(analysis.frames):
        parts.append(f"{len(analysis.frames)} of {analysis.frame_count} frames analysed")
    return "; ".join(parts)
