"""The signature is botocore's, whatever the request."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from unittest import mock

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st

from storage.s3_signature import Signer

WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
NAMES = st.sampled_from(["range", "if-none-match", "x-amz-tagging", "x-amz-storage-class", "content-md5", "content-length", "user-agent"])
PATHS = st.text(st.sampled_from("abz019/-._~"), max_size=30).map("/bucket/".__add__)
SECRETS = st.text(st.sampled_from("abcXYZ019/+"), min_size=1, max_size=40)


class Known(S3SigV4Auth):
    """Botocore's signer, of a body whose digest is known."""

    def payload(self, request: AWSRequest) -> str:
        """Return it."""
        return str(request.context["payload"])


def by_botocore(method: str, path: str, headers: dict[str, str], payload: str, credentials: ReadOnlyCredentials, moment: datetime) -> str:
    """Return the Authorization header that botocore gives."""
    request = AWSRequest(method=method, url=f"http://{headers['host']}{path}", headers=headers)
    request.context["payload"] = payload
    with mock.patch("botocore.auth.get_current_datetime", return_value=moment.replace(tzinfo=None)):
        Known(credentials, "s3", "eu-central-1").add_auth(request)
    return str(request.headers["Authorization"])


@given(
    st.sampled_from(["GET", "PUT"]),
    PATHS,
    st.dictionaries(NAMES, WORDS),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.tuples(SECRETS, st.none() | SECRETS),
    st.integers(0, 10**9).map(lambda seconds: datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)),
)
def test_as_botocore(
    method: str, path: str, headers: dict[str, str], payload: str, secrets: tuple[str, str | None], moment: datetime
) -> None:
    """Any headers, spaces in them included, any credentials with and without a token, any moment; also by the key that is kept."""
    credentials = ReadOnlyCredentials("access-key", *secrets)
    told = {"host": "127.0.0.1:9000", **headers}
    signer = Signer("eu-central-1")
    first = signer.headers(method, path, told, payload, credentials, moment)
    assert first["authorization"] == by_botocore(method, path, told, payload, credentials, moment)
    assert signer.headers(method, path, told, payload, credentials, moment) == first
    assert first.get("x-amz-security-token") == (secrets[1] or None)
    next_day, other = moment + timedelta(days=1), ReadOnlyCredentials("access-key", "other", None)
    for later, by in ((next_day, credentials), (next_day, other)):
        found = signer.headers(method, path, told, payload, by, later)["authorization"]
        assert found == by_botocore(method, path, told, payload, by, later)
