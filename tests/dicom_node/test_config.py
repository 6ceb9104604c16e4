"""Settings: one source for defaults, example file and reference; every fault at once, with its remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from dicom_node import config
from dicom_node.config import ConfigurationError, Settings

ROOT = Path(__file__).parents[2]


def faults_of(tmp_path: Path, text: str = "", environ: dict[str, str] | None = None) -> list[str]:
    """Load ``text`` and return the faults."""
    path = tmp_path / "node.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        config.load(path, environ or {})
    return caught.value.faults


def test_example_file_holds_every_default() -> None:
    """conf/node.toml is what the settings say, and loading it gives the defaults."""
    path = ROOT / "conf" / "node.toml"
    assert path.read_text() == config.example_toml(), "run: dicom-node config --example > conf/node.toml"
    assert config.load(path, {}) == Settings()
    for section, values in tomllib.loads(path.read_text()).items():
        defaults = getattr(Settings(), section).model_dump(exclude_none=True)
        assert set(values) == set(defaults), section


def test_commented_examples_of_the_example_file_are_valid(tmp_path: Path) -> None:
    """The [[peers]] and [[routes]] blocks work once their comment signs are taken away."""
    text = (ROOT / "conf" / "node.toml").read_text()
    start = text.index("# [[peers]]")
    block = "\n".join(line.removeprefix("# ") for line in text[start:].splitlines() if " = " in line or line.startswith("# [["))
    path = tmp_path / "node.toml"
    path.write_text(block)
    assert config.load(path, {}).routes[0].to == ("pacs",)


def test_reference_is_current() -> None:
    """docs/configuration.md is generated from the settings."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == config.reference_markdown(), "run: dicom-node config --reference > docs/configuration.md"


def test_every_key_is_described() -> None:
    """No key without a meaning in words."""
    assert "| None |" not in config.reference_markdown()


def test_environment_overrides_the_file(tmp_path: Path) -> None:
    """DICOM_NODE_<SECTION>__<KEY>, its _FILE form, lists with commas, and the two aliases."""
    path = tmp_path / "node.toml"
    path.write_text('[dimse]\nport = 1\n[archive]\nregion = "file"\n')
    secret = tmp_path / "bucket"
    secret.write_text("from-file\n")
    settings = config.load(path, {
        "DICOM_NODE_DIMSE__PORT": "2", "DICOM_NODE_ARCHIVE__BUCKET_FILE": str(secret), "DICOM_AET": "OTHER",
        "DICOM_NODE_DICOMWEB__CORS_ORIGINS": "https://a.example, https://b.example",
    })  # fmt: skip
    assert (settings.dimse.port, settings.archive.bucket, settings.dimse.ae_title) == (2, "from-file", "OTHER")
    assert settings.dicomweb.cors_origins == ("https://a.example", "https://b.example")
    assert settings.archive.region == "file"


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    """Three faults of three kinds, three lines, each with its key path."""
    faults = faults_of(
        tmp_path,
        '[dimse]\nae_title = "MUCH_TOO_LONG_FOR_AN_AE"\nprot = 1\n[archive]\nstore = "tape"\n',
        {"DICOM_NODE_DICOMWEB__PRT": "1"},
    )
    text = "\n".join(faults)
    for expected in ("dimse.ae_title:", "dimse.prot: there is no such key", "archive.store:", "DICOM_NODE_DICOMWEB__PRT:"):
        assert expected in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[dimse]\nhost = "0.0.0.0"', "dimse.host: 0.0.0.0 is reachable from elsewhere but no peer may store"),
        ('[dicomweb]\nhost = "::"', "dicomweb.host: :: is reachable from elsewhere"),
        ('[archive]\nstore = "s3"\nacknowledge = "archive"', "archive.bucket:"),
        ('[archive]\nstore = "s3"', "archive.bucket:"),
        ('[archive]\nstore = "s3"\nbucket = "b"\ntags = ["loose"]', "archive.tags: 'loose'"),
        ('[keys]\nring = "kms"', "keys.kms_key_id:"),
        ('[database]\nurl = "postgresql://x"', "archive.store: with a PostgreSQL database"),
        (
            '[[webhooks]]\nname = "a"\nurl = "http://192.0.2.1/x"\nsecrets = ["0123456789abcdef0123456789abcdef"]',
            "webhooks.0.url: what is not this machine",
        ),
        ('[[webhooks]]\nname = "a"\nurl = "https://h/x"\nsecrets = ["short"]', "webhooks.0.secrets:"),
        ('[[routes]]\nto = ["nobody"]', "routes.0.to: no peer is called 'nobody'"),
        ('[[peers]]\nname = "a"\nae_title = "A"\n[[routes]]\nto = ["a"]', "routes.0.to: peer 'a' has no host and port"),
        ('[[peers]]\nname = "a"\nae_title = "A"\n[[peers]]\nname = "a"\nae_title = "B"', "the name 'a' stands twice"),
        ('[database]\nurl = "mysql://x"', "database.url"),
        ("[dimse\n", "not valid TOML"),
    ],
)
def test_incoherent_configuration_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """Secure by default: what would listen to strangers, or promise what it cannot hold, does not start."""
    assert expected in "\n".join(faults_of(tmp_path, text))


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A configuration file or secret file that is not there is a sentence."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        config.load(tmp_path / "absent.toml", {})
    assert "the file cannot be read" in faults_of(tmp_path, "", {"DICOM_NODE_ARCHIVE__BUCKET_FILE": str(tmp_path / "no")})[0]
