"""Certificates of a deployment that rot on the way are told by their file."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs flwr, the extra `edge`")

from fedllm_sec.deploy.keys import make_certificates, named_in
from fedllm_sec.errors import FedError


@pytest.mark.parametrize(
    ("name", "words"), [("ca.pem", "no certificate"), ("ca.key", "no key"), ("server.pem", "no c")]
)
def test_a_file_that_is_no_certificate_or_key_is_named(tmp_path: Path, name: str, words: str):
    make_certificates(tmp_path)
    assert named_in(tmp_path / "server.pem") == ["localhost", "127.0.0.1"]
    (tmp_path / name).write_text("hello")
    with pytest.raises(FedError, match=rf"{name}: is {words}.*Copy it again, or remove the folder tls"):
        make_certificates(tmp_path, ["10.0.0.7"])
