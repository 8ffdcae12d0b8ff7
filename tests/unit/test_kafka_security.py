"""Security settings of Kafka: valid combinations, and the options of every client."""

import ssl
from pathlib import Path

import pytest
from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512
from pydantic import ValidationError

from shared.runtime.settings import DatabaseSettings, KafkaSettings
from tests.support.certificate import Authority

PASSWORD = "v3ry-s3cret"
SASL = {"protocol": "SASL_PLAINTEXT", "mechanism": "SCRAM-SHA-512", "username": "sprout", "password": PASSWORD}
MECHANISMS = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}
NAMES = {
    "protocol": "SECURITY_PROTOCOL",
    "mechanism": "SASL_MECHANISM",
    "username": "SASL_USERNAME",
    "password": "SASL_PASSWORD",
    "password_file": "SASL_PASSWORD_FILE",
    "ca": "SSL_CA_FILE",
    "certificate": "SSL_CERTIFICATE_FILE",
    "key": "SSL_KEY_FILE",
    "key_password": "SSL_KEY_PASSWORD",
    "hostname": "SSL_CHECK_HOSTNAME",
}


def faststream_options(security: BaseSecurity | None) -> dict[str, object]:
    """What a FastStream broker is configured with."""
    return {name: getattr(security, name, None) for name in ("ssl_context", "use_ssl", "username", "password")}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch):
    """Settings from an environment."""

    def settings(**variables: str | Path) -> KafkaSettings:
        for short, name in NAMES.items():
            monkeypatch.delenv(f"SPROUT_KAFKA_{name}", raising=False)
            if short in variables:
                monkeypatch.setenv(f"SPROUT_KAFKA_{name}", str(variables[short]))
        return KafkaSettings()

    return settings


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def test_the_default_is_plaintext(read):
    kafka = read()
    assert kafka.security_options() == {"security_protocol": "PLAINTEXT", "ssl_context": None}
    assert kafka.broker_security() is None


@pytest.mark.parametrize("in_a_file", [False, True])
def test_another_process_reads_the_same_settings(read, monkeypatch, tmp_path, authority, in_a_file):
    (tmp_path / "password").write_text(PASSWORD)
    password = {"password_file": tmp_path / "password"} if in_a_file else {"password": PASSWORD}
    login = {name: value for name, value in SASL.items() if name != "password"} | {"protocol": "SASL_SSL"}
    given = read(**login, **password, ca=authority.certificate, hostname="false")
    for name, value in given.environment().items():
        monkeypatch.setenv(name, value)
    assert KafkaSettings().model_dump() == given.model_dump()


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_aiokafka_and_faststream_get_the_same_options(read, protocol, mechanism):
    kafka = read(**SASL | {"protocol": protocol, "mechanism": mechanism})
    options = kafka.security_options()
    assert options == {
        "security_protocol": protocol,
        "ssl_context": options["ssl_context"],
        "sasl_mechanism": mechanism,
        "sasl_plain_username": "sprout",
        "sasl_plain_password": PASSWORD,
    }
    assert isinstance(options["ssl_context"], ssl.SSLContext) == (protocol == "SASL_SSL")
    assert faststream_options(kafka.broker_security()) == {
        "ssl_context": options["ssl_context"],
        "use_ssl": protocol == "SASL_SSL",
        "username": "sprout",
        "password": PASSWORD,
    }
    assert type(kafka.broker_security()) is MECHANISMS[mechanism]
    assert kafka.client_options() == {"bootstrap_servers": kafka.bootstrap_servers, **options}
    assert PASSWORD not in repr(kafka)


def test_tls_checks_the_broker_and_sends_a_client_certificate(read, authority):
    client = authority.issue("client", password="key-secret")
    kafka = read(
        protocol="SSL",
        ca=authority.certificate,
        certificate=client.certificate,
        key=client.key,
        key_password="key-secret",
    )
    context = kafka.security_options()["ssl_context"]
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert [one["subject"] for one in context.get_ca_certs()] == [((("commonName", "authority"),),)]
    assert faststream_options(kafka.broker_security()) == {
        "ssl_context": context,
        "use_ssl": True,
        "username": None,
        "password": None,
    }
    lenient = read(protocol="SSL", ca=authority.certificate, hostname="false").security_options()["ssl_context"]
    assert (lenient.check_hostname, lenient.verify_mode) == (False, ssl.CERT_REQUIRED)


def test_the_password_may_be_a_mounted_secret(read, tmp_path):
    secret = tmp_path / "password"
    secret.write_text(f"{PASSWORD}\n")
    kafka = read(**{name: value for name, value in SASL.items() if name != "password"}, password_file=secret)
    assert kafka.security_options()["sasl_plain_password"] == PASSWORD


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"username": "sprout", "password": PASSWORD}, "SASL_PASSWORD would not be used.*is PLAINTEXT; set it to SASL"),
        ({"protocol": "SSL", "mechanism": "PLAIN"}, "SASL_MECHANISM would not be used"),
        ({"protocol": "SASL_SSL", "username": "sprout", "password": PASSWORD}, "SASL_SSL needs SPROUT_KAFKA_SASL_MECH"),
        ({"protocol": "SASL_SSL", "mechanism": "PLAIN"}, "needs SPROUT_KAFKA_SASL_USERNAME and SPROUT_KAFKA_SASL_PASS"),
        ({**SASL, "password_file": "/x"}, "give either SPROUT_KAFKA_SASL_PASSWORD or"),
        ({**SASL, "ca": "/x"}, "SSL_CA_FILE would not be used.*set it to SSL or SASL_SSL"),
        ({**SASL, "hostname": "false"}, "SSL_CHECK_HOSTNAME would not be used"),
        ({"protocol": "SSL", "key": "/x"}, "needs its certificate: SPROUT_KAFKA_SSL_CERTIFICATE_FILE"),
        ({"protocol": "SSL", "ca": "/absent"}, "SPROUT_KAFKA_SSL_CA_FILE /absent cannot be used: .*No such file"),
        ({"protocol": "SSL", "certificate": "/absent"}, "SPROUT_KAFKA_SSL_CERTIFICATE_FILE /absent with its key"),
        ({"protocol": "TLS"}, "Input should be 'PLAINTEXT', 'SSL'"),
        ({**SASL, "mechanism": "GSSAPI"}, "Input should be 'PLAIN', 'SCRAM-SHA-256', 'SCRAM-SHA-512' or"),
    ],
)
def test_contradictory_settings_are_rejected_without_quoting_a_secret(read, variables, message):
    with pytest.raises(ValidationError, match=message) as caught:
        read(**variables)
    assert PASSWORD not in str(caught.value)


def test_an_encrypted_key_without_its_password_is_rejected_without_a_prompt(read, authority):
    client = authority.issue("locked", password="key-secret")
    with pytest.raises(ValidationError, match="an encrypted key needs SPROUT_KAFKA_SSL_KEY_PASSWORD"):
        read(protocol="SSL", certificate=client.certificate, key=client.key)


def test_an_invalid_database_url_is_not_quoted(monkeypatch):
    monkeypatch.setenv("SPROUT_DATABASE_URL", f"postgresql://sprout:{PASSWORD}@db/sprout")
    monkeypatch.setenv("SPROUT_DATABASE_PASSWORD_FILE", "/absent")
    with pytest.raises(ValidationError) as caught:
        DatabaseSettings()
    assert PASSWORD not in str(caught.value)
