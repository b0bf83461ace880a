"""The server around its operations: throttling, the end, TLS that is not trusted, mutual TLS, the audit log.

Method: each test has a server of its own. Requests that the SDK has no call for are signed by its functions; the number
of requests that came is the server's own count.
"""

import http.client
import json
import os
import ssl
import stat
import time
import unittest

from harness import PATIENCE, Certificates, SdkTest, code_of, field, send, signed_request
from openapi_util.models import RuntimeOptions
from sdk import models
from Tea.exceptions import TeaException, UnretryableException

ONCE = RuntimeOptions(autoretry=False)


class Serving(SdkTest):
    """One home, and a server for each test."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.key_id = cls.home.key("--alias", "alias/app")["KeyId"]
        cls.client_key = cls.home.client("all")

    def generate(self, client, options=None):
        return client.generate_data_key_with_options(
            models.GenerateDataKeyRequest(key_id="alias/app", number_of_bytes=32), options or RuntimeOptions()
        )

    def overdrawn(self, count):
        """A server of one key a second that has just made `count` of them, and a client of it."""
        server = self.serve("--keys-per-second", "1")
        client = server.client(self.client_key)
        # A batch is let in whole while there is anything left; what follows waits until its debt is paid, which may
        # take a minute at most.
        item = field(1, field(1, field(1, "alias/app") + field(3, 32)))
        send(client, "BatchGenerateDataKey", item * count)
        return server, client

    def test_a_throttled_call_is_tried_four_times(self):
        """The SDK tries a throttled call again three times, a second between them, and then says why it failed."""
        server, client = self.overdrawn(60)
        start = time.monotonic()
        with self.assertRefused(429, "Rejected.Throttling", "QPS Limit Exceeded"):
            self.generate(client)
        self.assertGreater(time.monotonic() - start, 3)
        self.assertEqual(server.requests("GenerateDataKey", "Rejected.Throttling"), 4)
        self.assertEqual(server.requests("GenerateDataKey"), 0)

    def test_a_throttled_call_is_done_once_there_is_room(self):
        """A call that comes a little too early is done by the SDK's next try, and its caller sees nothing of that."""
        server, client = self.overdrawn(3)
        self.assertEqual(len(self.generate(client).plaintext), 32)
        self.assertEqual(server.requests("GenerateDataKey"), 1)
        self.assertGreater(server.requests("GenerateDataKey", "Rejected.Throttling"), 0)

    def test_a_call_that_is_refused_otherwise_is_made_once(self):
        """Nothing but throttling is tried again: a wrong AAD costs one request."""
        server = self.serve()
        client = server.client(self.client_key)
        made = self.generate(client)
        request = models.DecryptRequest(
            ciphertext_blob=made.ciphertext_blob, key_id=made.key_id, iv=made.iv, aad=b"another"
        )
        self.assertEqual(code_of(lambda: client.decrypt(request)), "InternalFailure")
        self.assertEqual(server.requests("Decrypt", "InternalFailure"), 1)

    def test_sigterm_ends_a_server_that_has_open_connections(self):
        """SIGTERM ends the server with 0 within seconds, though the SDK keeps its connection; then nobody listens."""
        for tls in None, Certificates(self.home.path):
            with self.subTest(tls=bool(tls)):
                server = self.serve(tls=tls)
                client = server.client(self.client_key)
                self.generate(client)
                start = time.monotonic()
                self.assertEqual(server.stop(), 0)
                self.assertLess(time.monotonic() - start, 5)
                with self.assertRaises(UnretryableException) as raised:
                    self.generate(client, ONCE)
                self.assertIsNone(raised.exception.code, raised.exception)

    def test_the_audit_log_has_a_line_for_each_answer(self):
        """Request ids, codes, clients and keys of the log are those that the SDK has seen, and no byte of a key."""
        path = self.home.path / "audit.jsonl"
        server = self.serve("--audit", str(path))
        client = server.client(self.client_key)
        answers = [self.generate(client) for _ in range(3)]
        expected = [(made.request_id, 200, {"OK": 1}, {self.key_id: 1}) for made in answers]
        with self.assertRaises(TeaException) as raised:
            client.generate_data_key(models.GenerateDataKeyRequest(key_id="alias/none", number_of_bytes=32))
        request_id = raised.exception.data["requestId"]
        expected.append((request_id, 404, {"Forbidden.KeyNotFound": 1}, {}))
        self.assertEqual(server.stop(), 0)

        text = path.read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        # The server's own start and end are told, too.
        self.assertEqual([line["operation"] for line in lines if "by" in line], ["Start", "End"])
        records = [line for line in lines if "by" not in line]
        seen = [tuple(record[name] for name in ("request_id", "status", "codes", "keys")) for record in records]
        self.assertEqual(seen, expected)
        for record in records:
            self.assertEqual(record["client_id"], self.client_key.client_id)
            self.assertEqual((record["authenticated"], record["operation"]), (True, "GenerateDataKey"))
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        for made in answers:
            self.assertNotIn(made.plaintext.hex(), text)

    def test_the_sdk_does_not_trust_an_unknown_ca(self):
        """Without the CA's file no request is sent; the server lives on."""
        server = self.serve(tls=Certificates(self.home.path))
        stranger = server.client(self.client_key, ca_file_path=None)
        with self.assertRaises(UnretryableException) as raised:
            self.generate(stranger, ONCE)
        self.assertIn("CERTIFICATE_VERIFY_FAILED", str(raised.exception.inner_exception.message))
        self.assertEqual(server.requests("GenerateDataKey"), 0)

    def test_a_refusal_reaches_a_client_that_still_sends_its_body(self):
        """A body above the most is answered 413 over TLS, too, though the server refuses it by its head alone."""
        server = self.serve(tls=Certificates(self.home.path))
        client = server.client(self.client_key)
        # The SDK keeps connections by port, and this port may have been another server's: its retries find a live one.
        client.generate_random(models.GenerateRandomRequest(length=8))
        for _ in range(5):
            with self.assertRefused(413, "RequestEntityTooLarge"):
                send(client, "Encrypt", bytes((3 << 20) + 1))

    def test_mutual_tls_wants_a_certificate(self):
        """With --client-ca a client needs a certificate besides its signature. The SDK has none to show."""
        tls = Certificates(self.home.path)
        server = self.serve("--client-ca", str(tls.ca), tls=tls)
        with self.assertRaises(UnretryableException) as raised:
            self.generate(server.client(self.client_key), ONCE)
        self.assertIsNone(raised.exception.code, raised.exception)
        self.assertEqual(server.requests("GenerateDataKey"), 0)

        certificate, key = (self.home.path / f"client.{name}" for name in ("pem", "key"))
        tls.issue(certificate, key)
        context = ssl.create_default_context(cafile=tls.ca)
        context.load_cert_chain(certificate, key)
        host, port = server.endpoint.split(":")
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=PATIENCE)
        self.addCleanup(connection.close)
        self.assertEqual(self.post(connection), 200)
        self.assertEqual(server.requests("GenerateDataKey"), 1)

    def test_both_names_of_the_signature_are_known(self):
        """The SDK writes `Bearer` before a signature, the KMS's pages `TOKEN`: both are good, and no third."""
        server = self.serve()
        connection = http.client.HTTPConnection(server.endpoint, timeout=PATIENCE)
        self.addCleanup(connection.close)
        for scheme, status in ("Bearer", 200), ("TOKEN", 200), ("Basic", 400):
            with self.subTest(scheme):
                self.assertEqual(self.post(connection, scheme=scheme), status)

    def post(self, connection, **signing):
        """Sends a signed request on a connection. Returns the status."""
        body = field(1, "alias/app") + field(3, 32)
        connection.request("POST", "/", body, signed_request(self.client_key, "GenerateDataKey", body, **signing))
        response = connection.getresponse()
        response.read()
        return response.status


if __name__ == "__main__":
    unittest.main()
