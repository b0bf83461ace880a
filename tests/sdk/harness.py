"""A home, its server and the SDK's clients for the tests beside this file.

Goal: a test says what it does with the SDK and what has to come of it, and nothing of processes, files and ports.
Method: `Home` is a temporary directory with a key store, made and changed by the command line as an administrator does
it. `Server` is a `keymill serve` of its own on free ports. Everything goes when the test ends. The SDK is imported as
it is installed; nothing of it is replaced.

Each `Server` has a port that no other has: the SDK keeps one session for each scheme, host and port, with the TLS
settings of its first use.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import pathlib
import re
import ssl
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.request
import uuid

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# Before the SDK is imported: it takes proxies and its debug output from the environment.
for _name in list(os.environ):
    if _name.lower().endswith("_proxy") or _name == "DEBUG" or _name.startswith("SSL_CERT_"):
        del os.environ[_name]

from openapi.models import Config
from openapi_credential.client import Client as Credential
from openapi_credential.models import Config as CredentialConfig
from openapi_util.client import Client as Wire
from openapi_util.models import RuntimeOptions
from sdk.client import Client
from Tea.exceptions import TeaException

KEYMILL = os.environ["KEYMILL_UNDER_TEST"]
API_VERSION = "dkms-gcs-0.2"
SIGNATURE_METHOD = "RSA_PKCS1_SHA_256"
VERSION_HEADER = "x-kms-migrationkeyversionid"
# What the server may take to see a change of the store, and this machine to ask it. It looks at least once a second.
SEEN_WITHIN = 5
# A process that has not done its work by then never will.
PATIENCE = 30

# The settings of whoever runs the tests are not those of the server under test.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("KEYMILL_")}


class Home:
    """A key store in a temporary directory, and the clients that may use it."""

    def __init__(self):
        self._directory = tempfile.TemporaryDirectory(prefix="keymill-sdk-")
        self.path = pathlib.Path(self._directory.name)
        self.environment = {**_ENVIRONMENT, "KEYMILL_HOME": str(self.path / "home")}
        self.cli("init")

    def close(self):
        self._directory.cleanup()

    def cli(self, *arguments, stdin=None):
        """Runs keymill and returns its standard output. A run that fails fails the test."""
        done = subprocess.run(
            [KEYMILL, *arguments], env=self.environment, input=stdin, capture_output=True, timeout=PATIENCE
        )
        if done.returncode != 0:
            raise AssertionError(f"keymill {' '.join(arguments)}: {done.returncode}, {done.stderr.decode()}")
        return done.stdout

    def key(self, *arguments, command="create", stdin=None):
        """Makes a key. Returns its description."""
        return json.loads(self.cli("key", command, "--json", *arguments, stdin=stdin))

    def client(self, name, *, allow="all", keys="*"):
        """Makes a client. Returns its key file and password."""
        key_file, password_file = self.path / f"{name}.json", self.path / f"{name}.password"
        self.cli(
            *("client", "create", "--name", name, "--allow", allow, "--keys", keys),
            *("--out", str(key_file), "--password-file", str(password_file)),
        )
        return ClientKey(key_file, password_file.read_text().strip())


class ClientKey:
    """The two files of a client."""

    def __init__(self, path, password):
        self.path, self.password = path, password
        document = json.loads(path.read_text())
        self.client_id, self.private_key_data = document["KeyId"], document["PrivateKeyData"]


class Server:
    """A `keymill serve` on a home. Ended, and waited for, by `stop` or `close`."""

    def __init__(self, home, *arguments, tls=None):
        self.scheme = "https" if tls else "http"
        self._tls = tls
        if tls:
            arguments = (*arguments, "--tls-cert", str(tls.certificate), "--tls-key", str(tls.key))
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [KEYMILL, "serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *arguments],
            env=home.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log,
        )
        # A server that says nothing would be waited for without end.
        watchdog = threading.Timer(PATIENCE, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline().decode()
        watchdog.cancel()
        ready = re.fullmatch(r"keymill: ready on (https?)://([0-9.:]+), metrics on http://([0-9.:]+)\n", line)
        if not ready or ready[1] != self.scheme:
            self.close()
            raise AssertionError(f"the server is not ready: {line!r}")
        self.endpoint, self._observer = ready[2], ready[3]

    def client(self, key, **config):
        """The SDK's client with a client's key file."""
        if self._tls:
            config.setdefault("ca_file_path", str(self._tls.ca))
        config = {"client_key_file": str(key.path), "password": key.password, **config}
        return Client(Config(endpoint=self.endpoint, protocol=self.scheme, **config))

    def requests(self, operation, code="OK"):
        """How many requests the server has answered so, by its metrics."""
        with urllib.request.urlopen(f"http://{self._observer}/metrics", timeout=PATIENCE) as response:
            text = response.read().decode()
        labels = re.escape(f'{{code="{code}",operation="{operation}"}}')
        found = re.search(rf"^keymill_requests_total{labels} (\d+)$", text, re.MULTILINE)
        return int(found[1]) if found else 0

    def stop(self):
        """Asks the server to end. Returns its exit code."""
        self._process.terminate()
        return self._process.wait(PATIENCE)

    def close(self):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


class Certificates:
    """A CA made on the spot, with a certificate of it for 127.0.0.1."""

    def __init__(self, directory):
        self.ca, self.certificate, self.key = (directory / name for name in ("ca.pem", "cert.pem", "key.pem"))
        self._ca_key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA of the SDK tests")])
        self._ca_certificate = (
            self._builder(name, name, self._ca_key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._ca_key, hashes.SHA256())
        )
        self.ca.write_bytes(self._ca_certificate.public_bytes(serialization.Encoding.PEM))
        addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        self.issue(self.certificate, self.key, addresses)

    def issue(self, certificate, key, *extensions):
        """Writes a certificate and its key."""
        pair = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, certificate.stem)])
        builder = self._builder(name, self._ca_certificate.subject, pair)
        for extension in (x509.BasicConstraints(ca=False, path_length=None), *extensions):
            builder = builder.add_extension(extension, critical=False)
        signed = builder.sign(self._ca_key, hashes.SHA256())
        certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key.touch(mode=0o600)
        key.write_bytes(
            pair.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    @staticmethod
    def _builder(subject, issuer, pair):
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(pair.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )


class SdkTest(unittest.TestCase):
    """A test with a home of its own for the whole class."""

    @classmethod
    def setUpClass(cls):
        cls.home = Home()
        cls.addClassCleanup(cls.home.close)

    @classmethod
    def serve_class(cls, *arguments, tls=None):
        """A server until the class ends."""
        server = Server(cls.home, *arguments, tls=tls)
        cls.addClassCleanup(server.close)
        return server

    def serve(self, *arguments, tls=None):
        """A server until the test ends."""
        server = Server(self.home, *arguments, tls=tls)
        self.addCleanup(server.close)
        return server

    @contextlib.contextmanager
    def assertRefused(self, status, code, message=""):
        """Expects the SDK to raise this status and code, a message that begins so, and a request id."""
        with self.assertRaises(TeaException) as raised:
            yield
        error = raised.exception
        self.assertEqual((error.data and error.data.get("httpCode"), error.code), (status, code), error.message)
        self.assertEqual(str(uuid.UUID(error.data["requestId"])), error.data["requestId"])
        self.assertEqual(error.message[: len(message)], message)

    def eventually(self, what, condition):
        """Waits until `condition` is true, which it has to be once the server has looked at the store."""
        deadline = time.monotonic() + SEEN_WITHIN
        while not condition():
            self.assertLess(time.monotonic(), deadline, f"the server does not see that {what}")
            time.sleep(0.05)


def code_of(call):
    """The code that a call is refused with, or "OK"."""
    try:
        call()
    except TeaException as error:
        return error.code
    return "OK"


def send(client, operation, body):
    """Sends a body under any operation's name through the SDK, which signs and sends it as its own. Returns bytes."""
    options = RuntimeOptions(autoretry=False)
    answer = client.do_request(
        operation, API_VERSION, client._protocol, "POST", SIGNATURE_METHOD, body, options, {}
    )
    return answer["bodyBytes"]


def field(number, value):
    """A field of a protobuf message: bytes, text or a non-negative integer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def signed_request(key, operation, body, *, scheme="Bearer"):
    """The headers that the SDK would send, signed by its own functions, for other ways to send them."""
    credential = Credential(
        CredentialConfig(type="rsa_key_pair", client_key_file=str(key.path), password=key.password)
    )
    headers = {
        "accept": "application/x-protobuf",
        "content-type": "application/x-protobuf",
        "content-sha256": _sha256(body),
        "date": _now(),
        "x-kms-apiversion": API_VERSION,
        "x-kms-apiname": operation,
        "x-kms-signaturemethod": SIGNATURE_METHOD,
        "x-kms-acccesskeyid": key.client_id,
    }
    signature = credential.get_signature(Wire.get_string_to_sign("POST", "/", headers, {}))
    headers["authorization"] = signature.replace("Bearer", scheme)
    return headers


def _sha256(body):
    digest = hashes.Hash(hashes.SHA256())
    digest.update(body)
    return digest.finalize().hex().upper()


def _now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
