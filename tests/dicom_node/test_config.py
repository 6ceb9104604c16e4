"""Settings: one source for defaults, example file and reference; every fault at once, with its remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from dicom_node import config, config_faults
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
            'the 1st [[webhooks]] ("a"), url: what is not this machine',
        ),
        ('[[webhooks]]\nname = "a"\nurl = "https://h/x"\nsecrets = ["short"]', 'the 1st [[webhooks]] ("a"), secrets:'),
        ('[[routes]]\nto = ["dicomweb"]', "the 1st [[routes]], to: 'dicomweb' can be the name of no peer"),
        ('[[routes]]\nto = ["no body"]', "the 1st [[routes]], to: 'no body' can be"),
        ('[[peers]]\nname = "a"\nae_title = "A"\n[[routes]]\nto = ["a"]', "the 1st [[routes]], to: peer 'a' has no host and port"),
        ('[[peers]]\nname = "a"\nae_title = "A"\n[[peers]]\nname = "a"\nae_title = "B"', "the name 'a' stands twice"),
        ('[database]\nurl = "mysql://x"', "database.url"),
        ("[tls]\nenabled = true", "tls.certificate: TLS needs a certificate and its key"),
        ('[tls]\nenabled = true\ncertificate = "a"\nkey = "b"', "tls.authorities: callers are asked for certificates"),
        ('[[peers]]\nname = "a"\nae_title = "A"\nhost = "h"\nport = 1\ntls = true', "name in tls.authorities who may vouch for peer a"),
        ('[[peers]]\nname = "a"\nae_title = "A"\ncertificate = "a.example"', "without TLS no certificate is shown"),
        ('[[peers]]\nname = "a"\nae_title = "A"\nhost = "10.0.0.300"', "host: use an IP address"),
        ("[dimse]\nprocesses = 2\n[identities]\ntoken_once = true", "identities.token_once: each receiving process"),
        ("[dimse\n", "not valid TOML"),
    ],
)
def test_incoherent_configuration_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """Secure by default: what would listen to strangers, or promise what it cannot hold, does not start."""
    assert expected in "\n".join(faults_of(tmp_path, text))


def test_listening_beyond_loopback_without_configured_peers(tmp_path: Path) -> None:
    """It can be asked for: peers are then added while the node runs. Routes may name them before they are."""
    path = tmp_path / "node.toml"
    path.write_text('[dimse]\nhost = "0.0.0.0"\nwithout_peers = "listen"\n[[routes]]\nfrom = "camera"\nto = ["later"]')
    assert config.load(path, {}).routes[0].to == ("later",)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A configuration file or secret file that is not there is a sentence."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        config.load(tmp_path / "absent.toml", {})
    assert "the file cannot be read" in faults_of(tmp_path, "", {"DICOM_NODE_ARCHIVE__BUCKET_FILE": str(tmp_path / "no")})[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[dimse]\nprot = 1", "dimse.prot: there is no such key; did you mean port?"),
        ("[dimse]\nbucket = 1", "dimse.bucket: there is no such key; it belongs to [archive]; known: enabled, ae_title"),
        ("port = 1", "port: stands before the first table; put it under [dimse] or [dicomweb] or [admin] or [[peers]]"),
        ("[dismse]\nport = 1", "dismse: there is no such table; did you mean dimse?; known: [node], [dimse]"),
        ("[[dimse]]\nport = 1", "dimse: must be one table; write [dimse], with single brackets, once"),
        ("dimse = 1", "dimse: must be a table; write [dimse] on a line of its own"),
        ('[peers]\nname = "a"', "peers: must be a table of which there may be several; write [[peers]], with two brackets"),
        (
            '[[peers]]\nname = "a"\nae_title = "A"\n[[peers]]\nname = "pacs"',
            'the 2nd [[peers]] ("pacs"), ae_title: is missing; it is required',
        ),
        ('[[peers]]\nae_title = "A"', 'the 1st [[peers]] ("A"), name: is missing'),
        ('[[peers]]\nname = "a"\nae_title = "A"\nprot = 1', 'the 1st [[peers]] ("a"), prot: there is no such key; did you mean port?'),
        (
            '[[peers]]\nname = "a"\nae_title = "A"\ndeliver = ["sr", "sgh"]',
            "the 1st [[peers]] (\"a\"), deliver, its 2nd item: must be 'sr' or 'seg' (given: 'sgh')",
        ),
        ('[dimse]\nport = "many"', "dimse.port: must be a whole number, without quotes (given: 'many')"),
        ("[dimse]\nport = 1.5", "dimse.port: must be a whole number (given: 1.5)"),
        ("[dimse]\nport = 99999", "dimse.port: must be at most 65535 (given: 99999)"),
        ("[delivery]\ntimeout_s = 0", "delivery.timeout_s: must be more than 0.0 (given: 0)"),
        ('[dimse]\nenabled = "maybe"', "dimse.enabled: must be true or false, without quotes"),
        ("[dimse]\nhost = true", 'dimse.host: must be a text in quotes, for example "text" (given: true)'),
        ("[node]\ndata_dir = 1", "node.data_dir: must be a path in quotes"),
        ('[dicomweb]\ncors_origins = "x"', "dicomweb.cors_origins: must be a list in brackets"),
        ('[archive]\nstore = "tape"', "archive.store: must be 'directory' or 's3' (given: 'tape')"),
        ('[dimse]\nae_title = "MUCH_TOO_LONG_FOR_AN_AE"', "dimse.ae_title: use 1 to 16 printable ASCII characters"),
        ('[database]\nurl = "mysql://u:hush@h/d"', "database.url: use postgresql://user@host/name"),
        ("[database]\npassword = 5", "database.password: must be a text in quotes"),
        ("[dimse]\nport = 1\n[admin\n", "node.toml, line 3, column 7: not valid TOML: Expected ']'"),
        ("[dimse]\nhost = localhost", "node.toml, line 2, column 8: not valid TOML: Invalid value; texts stand in double quotes"),
        ("[dimse]\nport = 1\nport = 2\n", "line 3, column 9: not valid TOML: Cannot overwrite a value; the key stands twice"),
        ("[dimse]\n[dimse]", "the table stands twice"),
        ('[dimse]\nhost = "a', "the text lacks its closing quote"),
    ],
)
def test_faults_speak_of_the_file(tmp_path: Path, text: str, expected: str) -> None:
    """Table, key, entries counted as people count, what stands there and what may; nothing of the libraries' words."""
    said = "\n".join(faults_of(tmp_path, text))
    assert expected in said
    for word in ("Input", "valid dictionary", "tuple", "instance of", "regex", "pattern", "hush"):
        assert word not in said


def test_a_wrong_value_of_the_environment_names_its_variable(tmp_path: Path) -> None:
    """Who has no such line in the file is told where the value came from."""
    (said,) = faults_of(tmp_path, "", {"DICOM_NODE_DIMSE__PORT": "many"})
    assert said.startswith("DICOM_NODE_DIMSE__PORT (dimse.port): must be a whole number")
    (said,) = faults_of(tmp_path, "", {"DICOM_NODE_DIMSE__PROT": "1"})
    assert "has no key 'prot'; did you mean port?; known:" in said


def test_a_file_of_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    """An umlaut in Latin-1: which line it stands on."""
    path = tmp_path / "node.toml"
    path.write_bytes("[dimse]\n# für\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match="line 2: not valid TOML: a byte that is no UTF-8"):
        config.load(path, {})


def test_entries_are_counted_as_people_count() -> None:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    assert [config_faults.ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 112)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th",
    ]  # fmt: skip
