"""The data sets of Storage Commitment: equal to what pydicom makes of them, bounded for what a stranger makes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pynetdicom.dsutils import decode, encode

from dicom_node.dimse.references import (
    CommitmentInformation,
    TooManyReferences,
    UnreadableReferences,
    read_information,
    write_information,
)
from storage.commitments import Reference
from tests.dicom_node.commitment_peer import information

uids = st.lists(st.integers(1, 10**9), min_size=2, max_size=6).map(lambda parts: ".".join(map(str, parts)))
references = st.builds(Reference, uids, uids)


@settings(max_examples=50, deadline=None)
@given(uids, st.lists(references, max_size=8), st.lists(st.tuples(references, st.integers(0, 0xFFFF)), max_size=8), st.booleans())
def test_what_is_written_is_read(uid: str, referenced: list[Reference], failed: list[tuple[Reference, int]], implicit: bool) -> None:
    """Read of written is the same, in both syntaxes."""
    data = write_information(uid, referenced, failed, implicit=implicit)
    assert read_information(data, implicit=implicit, limit=16) == CommitmentInformation(uid, tuple(referenced), tuple(failed))


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("undefined", [True, False])
def test_agrees_with_pydicom(implicit: bool, undefined: bool) -> None:
    """What pydicom writes is read, with lengths or without, and foreign elements beside; what we write pydicom reads the same."""
    pairs = [("1.2.840.10008.5.1.4.1.1.7", "1.2.3"), ("1.2.840.10008.5.1.4.1.1.77.1.4", "1.2.33")]
    made = information("1.9.9", pairs, {("1.2.4", "1.2.5"): 0x0112})
    made.RetrieveAETitle = "SOMEWHERE"
    for item in made.ReferencedSOPSequence:
        inner = Dataset()
        inner.CodeMeaning = "nothing to us"
        item.PurposeOfReferenceCodeSequence = [inner]
        item.PurposeOfReferenceCodeSequence.is_undefined_length = undefined
        item.is_undefined_length_sequence_item = undefined
    made["ReferencedSOPSequence"].value = Sequence(made.ReferencedSOPSequence)
    made["ReferencedSOPSequence"].is_undefined_length = undefined
    data = encode(made, implicit, True)
    assert data is not None
    wanted = CommitmentInformation("1.9.9", tuple(Reference(*pair) for pair in pairs), ((Reference("1.2.4", "1.2.5"), 0x0112),))
    assert read_information(data, implicit=implicit, limit=3) == wanted
    from io import BytesIO  # noqa: PLC0415

    ours = decode(BytesIO(write_information(wanted.transaction_uid, wanted.referenced, wanted.failed, implicit=implicit)), implicit, True)
    assert ours == information("1.9.9", pairs, {("1.2.4", "1.2.5"): 0x0112})


def test_too_many_are_not_counted_to_the_end() -> None:
    """A hundred thousand references end at the limit."""
    data = write_information("1.2", [Reference("1.2", f"1.3.{n}") for n in range(100_000)], implicit=True)
    with pytest.raises(TooManyReferences):
        read_information(data, implicit=True, limit=10)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans(), st.integers(0, 200), st.integers(0, 255))
def test_hostile_bytes_are_unreadable_and_no_more(noise: bytes, implicit: bool, where: int, byte: int) -> None:
    """Noise, cut off ends and changed bytes raise our errors alone."""
    good = bytearray(write_information("1.2.3", [Reference("1.2", "1.3")] * 3, [(Reference("1.4", "1.5"), 7)], implicit=implicit))
    changed = good.copy()
    changed[where % len(good)] = byte
    for data in (noise, bytes(good[:where]), bytes(changed), bytes(good) + noise):
        try:
            read_information(data, implicit=implicit, limit=10)
        except (UnreadableReferences, TooManyReferences):
            continue


@pytest.mark.parametrize("implicit", [True, False])
def test_nesting_is_bounded(implicit: bool) -> None:
    """A hundred thousand sequences in one another are refused, not followed."""
    header = b"\x08\x00\x40\x11" + (b"" if implicit else b"SQ\0\0") + b"\xff" * 4
    with pytest.raises(UnreadableReferences):
        read_information((header + b"\xfe\xff\x00\xe0" + b"\xff" * 4) * 100_000, implicit=implicit, limit=10)
