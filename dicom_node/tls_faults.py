"""Why a TLS handshake came to nothing, and what to do, in words: from what OpenSSL says, on either side.

References
----------
RFC 5280 (certificates), RFC 8446 Section 6 (alerts), RFC 9325 (BCP 195)
"""

from __future__ import annotations

import ssl
from typing import Final, NamedTuple


class Fault(NamedTuple):
    """Why a handshake came to nothing."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


VERIFICATION: Final[dict[int, Fault]] = {
    # X509_V_ERR_*: what is wrong with the other side's certificate
    3: Fault("there is no usable revocation list of an authority of its chain", "put a current list of each authority into the file"),
    8: Fault("the revocation list is not signed by the authority", "fetch the list anew from the authority"),
    9: Fault("its certificate is not valid yet", "compare the clocks of both sides"),
    10: Fault("its certificate has expired", "it needs a new one"),
    11: Fault("the revocation list is not valid yet", "compare our clock with the authority's"),
    12: Fault("the revocation list is past its next update", "fetch a current list; until then no certificate is accepted"),
    18: Fault("its certificate is self-signed and not among the authorities", "if it is the right one, add it to the authorities' file"),
    19: Fault("its certificate comes of an authority we do not know", "if it may vouch for peers, add it to the authorities' file"),
    20: Fault("its certificate comes of an authority we do not know", "if it may vouch for peers, add it to the authorities' file"),
    21: Fault(
        "its certificate comes without the intermediate ones",
        "it must send the whole chain, or add the intermediate to the authorities' file",
    ),
    23: Fault("its certificate is revoked", "it needs a new one"),
    24: Fault("a certificate of its chain is no authority's", "it needs a certificate of a proper authority"),
    26: Fault("its certificate is not for this use (Extended Key Usage)", "a caller's must allow clientAuth, a receiver's serverAuth"),
    62: Fault(
        "its certificate is of another host name", "call it by a name of the certificate, or have its name added (Subject Alternative Name)"
    ),
    64: Fault(
        "its certificate is of another address",
        "call it by a name of the certificate, or have its address added (Subject Alternative Name)",
    ),
    66: Fault("the key of its certificate is too short", "it needs RSA of 2048 bits or more, or an elliptic curve"),
    67: Fault("the key of its authority is too short", "the authority needs RSA of 2048 bits or more, or an elliptic curve"),
    68: Fault("its certificate is signed with a broken digest (SHA-1 or MD5)", "it needs one signed with SHA-256 or better"),
}
_PLAIN: Final = Fault("what came is no TLS", "one side speaks plain DICOM: switch TLS on there, or off for this port or peer")
_VERSION: Final = Fault("it speaks only TLS 1.1 or older", "update it: BCP 195 allows TLS 1.2 and 1.3")
_SUITE: Final = Fault(
    "no cipher suite in common", "it needs TLS 1.3, or TLS 1.2 with ECDHE and AES-GCM or ChaCha20 (profile BCP 195; in DCMTK +py)"
)
_NO_CERTIFICATE: Final = Fault("it showed no certificate", "give it a certificate and key of an authority that we know")
_OURS_UNKNOWN: Final = Fault("it does not know the authority of our certificate", "give it the certificate of our authority")
_OURS_REFUSED: Final = Fault(
    "it does not accept our certificate", "its log says why; check that it knows our authority, and the certificate's names and dates"
)
REASONS: Final[dict[str, Fault]] = {
    "WRONG_VERSION_NUMBER": _PLAIN,
    "HTTP_REQUEST": Fault("what came is HTTP", "this port speaks DICOM over TLS; DICOMweb has a port of its own"),
    "HTTPS_PROXY_REQUEST": Fault("what came is HTTP", "this port speaks DICOM over TLS; DICOMweb has a port of its own"),
    "RECORD_LAYER_FAILURE": _PLAIN,
    "PACKET_LENGTH_TOO_LONG": _PLAIN,
    "RECORD_TOO_SMALL": _PLAIN,
    "BAD_RECORD_TYPE": _PLAIN,
    "INVALID_RECORD_TYPE": _PLAIN,
    "UNEXPECTED_RECORD": _PLAIN,
    "UNKNOWN_PROTOCOL": _PLAIN,
    "UNSUPPORTED_PROTOCOL": _VERSION,
    "VERSION_TOO_LOW": _VERSION,
    "TLSV1_ALERT_PROTOCOL_VERSION": Fault("it does not accept TLS 1.2 or 1.3", _VERSION.remedy),
    "NO_SHARED_CIPHER": _SUITE,
    "NO_SUITABLE_SIGNATURE_ALGORITHM": _SUITE,
    "NO_SHARED_SIGNATURE_ALGORITHMS": _SUITE,
    "NO_SUITABLE_GROUPS": _SUITE,
    "NO_SUITABLE_KEY_SHARE": _SUITE,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": Fault(
        "it found nothing in common, or wants a certificate of ours", f"give us one that it knows; else: {_SUITE.remedy}"
    ),
    "TLSV1_ALERT_INSUFFICIENT_SECURITY": _SUITE,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": _NO_CERTIFICATE,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": Fault(
        "it wants a certificate of ours", "configure a certificate and key of an authority that it knows"
    ),
    "TLSV1_ALERT_UNKNOWN_CA": _OURS_UNKNOWN,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": Fault("it says that our certificate has expired", "renew our certificate, and compare the clocks"),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": Fault("it says that our certificate is revoked", "get a new certificate for us"),
    "SSLV3_ALERT_BAD_CERTIFICATE": _OURS_REFUSED,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": _OURS_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _OURS_REFUSED,
    "TLSV1_ALERT_ACCESS_DENIED": _OURS_REFUSED,
    "SSLV3_ALERT_NO_CERTIFICATE": _OURS_REFUSED,
    "TLSV1_ALERT_DECRYPT_ERROR": _OURS_REFUSED,
    "EE_KEY_TOO_SMALL": VERIFICATION[66],
    "CA_KEY_TOO_SMALL": VERIFICATION[67],
    "CA_MD_TOO_WEAK": VERIFICATION[68],
    "WRONG_SIGNATURE_TYPE": _SUITE,
    "DH_KEY_TOO_SMALL": _SUITE,
    "TLSV1_ALERT_NO_RENEGOTIATION": Fault("it wanted to renegotiate", "that is not allowed; update it"),
    "NO_RENEGOTIATION": Fault("it wanted to renegotiate", "that is not allowed; update it"),
}


def handshake_fault(error: OSError, *, calling: bool = False) -> Fault:
    """Say in words why a TLS handshake failed, and what to do.

    Parameters
    ----------
    error
        What the handshake, or the first reading after it, raised.
    calling
        Whether we called.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        known = VERIFICATION.get(error.verify_code)
        return known or Fault(
            f"its certificate cannot be verified ({error.verify_message})", "its certificate and the authorities must fit"
        )
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    if reason in REASONS:
        return REASONS[reason]
    gone = "it speaks plain DICOM on this port, or it refuses us: its log says why"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError):
        return Fault(
            "it closed the connection within the TLS handshake", gone if calling else "look at its log: does it know our authority?"
        )
    if isinstance(error, TimeoutError):
        return Fault("it did not finish the TLS handshake in time", gone if calling else "does it speak TLS?")
    return Fault(f"the TLS handshake failed ({reason.replace('_', ' ').lower() or error.strerror or 'no reason'})", "look at both logs")
