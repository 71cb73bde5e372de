"""The one set-up of clients that pictures, prepared sets and results have in common."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from clippo.data.datasets import open_source
from clippo.errors import ClippoError
from clippo.prepared import Location
from clippo.remote import client, connect, reason
from clippo.results import ResultStore
from tests.conftest import S3Server


def said(use: Callable[[], object]) -> str:
    with pytest.raises(ClippoError) as caught:
        use()
    message = str(caught.value)
    assert caught.value.__cause__ is None, "it may show what the request was signed with"
    assert "\n" not in message
    return message.partition(": ")[2]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "no connection to http://127.0.0.1:9; check AWS_ENDPOINT"),
        ("AWS_SECRET_ACCESS_KEY", "not-the-secret", "access denied ("),
        ("AWS_ACCESS_KEY_ID", "", "no credentials; set AWS_ACCESS_KEY_ID"),
    ],
)
def test_pictures_prepared_sets_and_results_fail_soon_and_in_the_same_words(
    s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    place = f"s3://{s3_env.bucket}/remote"
    uses = (
        lambda: open_source(f"folder:{place}", 0),
        lambda: Location(tmp_path, place).sizes("any"),
        lambda: ResultStore(place).check(),
    )
    for use in uses:
        began = time.monotonic()
        message = said(use)
        assert time.monotonic() - began < 15
        assert message.startswith(words)
        assert not any(secret in message for secret in (s3_env.key, s3_env.secret, "not-the-secret"))


def test_a_client_is_kept_until_credentials_change(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"s3://{s3_env.bucket}"
    first = client(f"{place}/one")
    assert client(f"{place}/two") is first
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "renewed")
    assert client(f"{place}/one") is not first


def test_a_path_and_a_url_of_one_folder_are_one_place(tmp_path: Path) -> None:
    assert connect(f"file://{tmp_path}/a/")[1] == connect(f"{tmp_path}/a")[1] == str(tmp_path / "a")


def test_an_expired_credential_is_told_from_a_wrong_place() -> None:
    # The test server gives out none that expire; this is what AWS answers.
    response = {"Error": {"Code": "ExpiredToken", "Message": "The provided token has expired."}}
    told = reason(translate_boto_error(ClientError(response, "PutObject")))
    assert told.startswith("access denied (The provided token has expired.)")
    assert "check the credentials" in told
