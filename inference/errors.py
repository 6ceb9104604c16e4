"""The error tree of the laboratory.

::

    InferenceError
    ├── UnsupportedPixels   this picture cannot be decoded or analysed      not retryable
    └── ModelUnavailable    a bundle is missing, damaged or does not fit    retryable, an operator can mend it

    DeviceError             what networks run on failed: says nothing of the picture, so that no report may be written about it
    ├── DeviceLost          it is gone for this process, which has to end
    └── DeviceFull          it has no memory left now
"""

from __future__ import annotations

from typing import ClassVar


class InferenceError(Exception):
    """Base of all errors of the laboratory; the message names the cause and the remedy."""

    retryable: ClassVar[bool] = False
    """Whether running the same job again can succeed without a change of the picture."""


class UnsupportedPixels(InferenceError):
    """The pixel data cannot be decoded or analysed: no decoder, damaged, or beyond a limit."""

    retryable: ClassVar[bool] = False


class ModelUnavailable(InferenceError):
    """A model bundle cannot be used now: missing, damaged, of another digest, or not fitting its architecture."""

    retryable: ClassVar[bool] = True


class DeviceError(Exception):
    """Base of what befalls a device; no `InferenceError`, which the pipeline would write into the report of the picture."""


class DeviceLost(DeviceError):
    """The device failed under a computation; whatever this process asks of it from now on fails too."""


class DeviceFull(DeviceError):
    """There is no memory for a computation, on the device or of the machine; another time there may be."""
