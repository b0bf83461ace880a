"""What the server refuses, by the status and the code that the SDK raises, and by the message where the KMS has one.

Method: one client may do everything, others some of it; each refusal is the answer to one call of the SDK. Refusals
that the SDK's own requests cannot meet (a skewed clock, another's signature) are had by giving the SDK a wrong clock or
a key file put together of two.
"""

import json
import unittest
import unittest.mock
import uuid
from email.utils import formatdate
from time import time

from OpenSSL import crypto

from harness import VERSION_HEADER, SdkTest, send
from sdk import models

NO_KEY = "key-aaaaaaaaaaaaaaaaaaaaa"


def no_permission(operation):
    return f'This operation for "{operation}" is forbidden by permission system.'


class Refusals(SdkTest):
    """One server, many clients."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        home = cls.home
        cls.app = home.key("--alias", "alias/app")
        cls.photos = home.key("--alias", "alias/photos/raw")
        cls.key = home.client("all")
        cls.other_key = home.client("photos", allow="generate,decrypt,encrypt", keys="alias/photos/*")
        maker = home.client("maker", allow="generate", keys="alias/app")
        opener = home.client("opener", allow="decrypt")
        cls.server = cls.serve_class()
        cls.all, cls.of_photos = cls.server.client(cls.key), cls.server.client(cls.other_key)
        cls.maker, cls.opener = cls.server.client(maker), cls.server.client(opener)

    def generate(self, client, key_id="alias/app", **request):
        return client.generate_data_key(
            models.GenerateDataKeyRequest(key_id=key_id, **{"number_of_bytes": 32, "aad": b"aad", **request})
        )

    def advance_generate(self, client, key_id="alias/app", **request):
        return client.advance_generate_data_key(
            models.AdvanceGenerateDataKeyRequest(key_id=key_id, **{"number_of_bytes": 32, "aad": b"aad", **request})
        )

    def decrypt(self, client, made, **request):
        raw = dict(ciphertext_blob=made.ciphertext_blob, key_id=made.key_id, iv=made.iv, aad=b"aad")
        return client.decrypt(models.DecryptRequest(**{**raw, **request}))

    def advance_decrypt(self, client, made, **request):
        blob = dict(ciphertext_blob=made.ciphertext_blob, aad=b"aad")
        return client.advance_decrypt(models.AdvanceDecryptRequest(**{**blob, **request}))

    def assertInternalFailure(self):
        return self.assertRefused(500, "InternalFailure", "Internal Failure.")

    def test_a_wrong_aad_opens_nothing(self):
        """Neither kind of blob opens with another AAD than its own, and the answer does not say why."""
        made, advanced = self.generate(self.all), self.advance_generate(self.all)
        for aad in b"AAD", b"aad ", b"":
            with self.subTest(aad=aad):
                with self.assertInternalFailure():
                    self.decrypt(self.all, made, aad=aad)
                with self.assertInternalFailure():
                    self.advance_decrypt(self.all, made, key_id=made.key_id, iv=made.iv, aad=aad)
                with self.assertInternalFailure():
                    self.advance_decrypt(self.all, advanced, aad=aad)

    def test_a_changed_blob_opens_nothing(self):
        """Nor does a blob with a bit turned over, a wrong Iv, another key, or an end that is missing."""
        made, advanced = self.generate(self.all), self.advance_generate(self.all)
        turned = lambda blob: blob[:-1] + bytes([blob[-1] ^ 1])
        for change in (
            {"ciphertext_blob": turned(made.ciphertext_blob)},
            {"ciphertext_blob": made.ciphertext_blob[:-1]},
            {"ciphertext_blob": b"short"},
            {"iv": turned(made.iv)},
            {"key_id": "alias/photos/raw"},
        ):
            with self.subTest(**change), self.assertInternalFailure():
                self.decrypt(self.all, made, **change)
        for blob in turned(advanced.ciphertext_blob), advanced.ciphertext_blob[:-1]:
            with self.subTest(blob=blob), self.assertInternalFailure():
                self.advance_decrypt(self.all, advanced, ciphertext_blob=blob)

    def test_an_unknown_key_is_not_found(self):
        """Every operation says so of an id and of an alias, also when the blob is good."""
        made = self.generate(self.all)
        for key_id in NO_KEY, "alias/none":
            for call in (
                lambda: self.generate(self.all, key_id),
                lambda: self.advance_generate(self.all, key_id),
                lambda: self.all.encrypt(models.EncryptRequest(key_id=key_id, plaintext=b"x")),
                lambda: self.all.advance_encrypt(models.AdvanceEncryptRequest(key_id=key_id, plaintext=b"x")),
                lambda: self.decrypt(self.all, made, key_id=key_id),
                lambda: self.advance_decrypt(self.all, made, key_id=key_id, iv=made.iv),
            ):
                with self.subTest(key_id=key_id), self.assertRefused(404, "Forbidden.KeyNotFound"):
                    call()

    def test_an_operation_needs_its_permission(self):
        """A client that only makes keys opens none, and one that only opens makes none; neither has random bytes."""
        made, advanced = self.generate(self.maker), self.advance_generate(self.maker)
        self.assertEqual(self.decrypt(self.opener, made).plaintext, made.plaintext)
        self.assertEqual(self.advance_decrypt(self.opener, advanced).plaintext, advanced.plaintext)
        random = models.GenerateRandomRequest(length=8)
        encrypt = dict(key_id="alias/app", plaintext=b"x")
        for operation, call in (
            ("Decrypt", lambda: self.decrypt(self.maker, made)),
            ("AdvanceDecrypt", lambda: self.advance_decrypt(self.maker, advanced)),
            ("GenerateRandom", lambda: self.maker.generate_random(random)),
            ("Encrypt", lambda: self.maker.encrypt(models.EncryptRequest(**encrypt))),
            ("AdvanceEncrypt", lambda: self.opener.advance_encrypt(models.AdvanceEncryptRequest(**encrypt))),
            ("GenerateDataKey", lambda: self.generate(self.opener)),
            ("AdvanceGenerateDataKey", lambda: self.advance_generate(self.opener)),
            ("GenerateRandom", lambda: self.opener.generate_random(random)),
        ):
            with self.subTest(operation):
                with self.assertRefused(403, "Forbidden.NoPermission", no_permission(operation)):
                    call()

    def test_a_client_uses_the_keys_of_its_patterns_alone(self):
        """A pattern lets a client use its keys, by id and by alias, and no others, also where a blob names the key."""
        alias, key_id = "alias/photos/raw", self.photos["KeyId"]
        made = self.advance_generate(self.of_photos, alias)
        self.assertEqual(self.advance_decrypt(self.of_photos, made).plaintext, made.plaintext)
        made = self.generate(self.of_photos, key_id)
        self.assertEqual(self.decrypt(self.of_photos, made).plaintext, made.plaintext)

        raw, advanced = self.generate(self.all), self.advance_generate(self.all)
        version = {VERSION_HEADER: advanced.key_version_id}
        encrypt = dict(key_id="alias/app", plaintext=b"x")
        client = self.of_photos
        for name, call in {
            "by alias": lambda: self.generate(client),
            "by id": lambda: self.generate(client, self.app["KeyId"]),
            "the newest version": lambda: self.advance_generate(client),
            "data": lambda: client.encrypt(models.EncryptRequest(**encrypt)),
            "data, the newest version": lambda: client.advance_encrypt(models.AdvanceEncryptRequest(**encrypt)),
            "a raw blob": lambda: self.decrypt(client, raw),
            "a raw blob, by the version": lambda: self.decrypt(client, raw, key_id=None, request_headers=version),
            "a raw blob, advance": lambda: self.advance_decrypt(client, raw, key_id=raw.key_id, iv=raw.iv),
            "a blob that names its key": lambda: self.advance_decrypt(client, advanced),
        }.items():
            with self.subTest(name), self.assertRefused(403, "Forbidden.NoPermission"):
                call()

    def test_parameters_have_their_limits(self):
        """What is missing, too small, too large or unknown is an invalid parameter."""
        made = self.generate(self.all)
        for name, call in {
            "no length": lambda: self.generate(self.all, number_of_bytes=0),
            "a length above the most": lambda: self.generate(self.all, number_of_bytes=1025),
            "a negative length": lambda: self.generate(self.all, number_of_bytes=-1),
            "no length, advance": lambda: self.advance_generate(self.all, number_of_bytes=0),
            "a length above the most, advance": lambda: self.advance_generate(self.all, number_of_bytes=1025),
            "no key": lambda: self.generate(self.all, ""),
            "no key, decrypting": lambda: self.decrypt(self.all, made, key_id=""),
            "an AAD above the most": lambda: self.generate(self.all, aad=bytes(8193)),
            "another algorithm": lambda: self.generate(self.all, algorithm="AES_CBC"),
            "an Iv of another length": lambda: self.decrypt(self.all, made, iv=made.iv[:11]),
            "no Iv": lambda: self.decrypt(self.all, made, iv=b""),
            "no blob": lambda: self.decrypt(self.all, made, ciphertext_blob=b""),
            "no plaintext": lambda: self.all.encrypt(models.EncryptRequest(key_id="alias/app")),
            "no random length": lambda: self.all.generate_random(models.GenerateRandomRequest()),
            "a random length above the most": lambda: self.all.generate_random(models.GenerateRandomRequest(65)),
        }.items():
            with self.subTest(name), self.assertRefused(400, "InvalidParameter"):
                call()

    def test_operations_that_are_not_served_have_no_name(self):
        """The SDK has operations that keymill does not; the answer is one that the SDK can read."""
        with self.assertRefused(400, "InvalidApiName", 'The ApiName "GetPublicKey" is invalid.'):
            self.all.get_public_key(models.GetPublicKeyRequest(key_id="alias/app"))

    def test_bytes_that_are_no_message_are_refused(self):
        """A body that is signed and makes no sense is an invalid parameter."""
        with self.assertRefused(400, "InvalidParameter"):
            send(self.all, "GenerateDataKey", b"\xff\xff\xff")

    def test_a_body_above_the_most_is_too_large(self):
        """More than 3 MB are answered 413, with a body that the SDK can read."""
        with self.assertRefused(413, "RequestEntityTooLarge"):
            send(self.all, "Encrypt", bytes((3 << 20) + 1))

    def file_of(self, client_id, key=None):
        """A key file with this client's id and the private key of `key`."""
        key = key or self.key
        content = json.dumps({"KeyId": client_id, "PrivateKeyData": key.private_key_data})
        return dict(client_key_content=content, password=key.password)

    def test_an_unknown_client_is_unauthorized(self):
        """An id of no client is not in the records, whatever it has signed."""
        for client_id in f"KAAP.{uuid.uuid4()}", "nobody":
            client = self.server.client(self.key, **self.file_of(client_id))
            message = f'The AccessKey ID "{client_id}" does not exist in our records.'
            with self.subTest(client_id), self.assertRefused(404, "Unauthorized", message):
                self.generate(client)

    def test_another_clients_key_does_not_sign(self):
        """Whoever signs with a key that is not the client's is refused, though the key is good."""
        client = self.server.client(self.key, **self.file_of(self.key.client_id, self.other_key))
        with self.assertRefused(401, "SignatureNotMatch", "Signature is not matched."):
            self.generate(client)

    def test_a_wrong_password_opens_no_key_file(self):
        """The key in the file is of no use without its password; the SDK finds out before it asks the server."""
        with self.assertRaises(crypto.Error):
            self.server.client(self.key, password="wrong-0-password")

    def test_a_clock_may_be_wrong_by_a_quarter_of_an_hour(self):
        """A request is good for 15 minutes before and after its date, and no longer."""
        dated = lambda seconds: unittest.mock.patch(
            "openapi.client.UtilClient.get_date_utcstring", lambda: formatdate(time() + seconds, usegmt=True)
        )
        for minutes in -14, 14:
            with self.subTest(minutes), dated(minutes * 60):
                self.generate(self.all)
        for minutes in -16, 16, -10_000_000:
            message = "Request time exceeds server time more than 15 minutes."
            with self.subTest(minutes), dated(minutes * 60):
                with self.assertRefused(400, "RequestTimeTooSkewed", message):
                    self.generate(self.all)

    def test_refusals_do_not_end_the_connection_of_others(self):
        """After every kind of refusal the same client's next call is answered."""
        for _ in range(3):
            with self.assertRefused(404, "Forbidden.KeyNotFound"):
                self.generate(self.all, "alias/none")
            self.generate(self.all)


if __name__ == "__main__":
    unittest.main()
