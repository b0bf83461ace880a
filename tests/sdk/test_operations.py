"""Every operation as the SDK does it, over HTTP and over HTTPS: what was asked for comes back, and opens again.

Method: the same tests run twice, on a server of their own each. Keys are of every spec and scheme; one is imported, so
that its blobs can be opened here by plain AES-GCM, without keymill.
"""

import asyncio
import os
import unittest
import unittest.mock
import uuid

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from harness import VERSION_HEADER, Certificates, SdkTest
from openapi_util.models import RuntimeOptions
from sdk import models

AAD = b"/photos/1.jpg"
MATERIAL = bytes(range(32))
# Iv of 12 bytes, tag of 16, salt of 12; `$`, version and algorithm, a key version's id and the Iv in front.
IV_LEN, TAG_LEN, SALT_LEN, ID_LEN = 12, 16, 12, 36
MAGIC = b"\x24\x00\x02"


class Operations:
    """What holds with TLS and without."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.app = cls.home.key("--alias", "alias/app")
        cls.direct_128 = cls.home.key("--spec", "AES_128")
        cls.direct_256 = cls.home.key("--scheme", "direct", "--alias", "alias/direct")
        cls.imported = cls.home.key("--scheme", "direct", "--material", "-", command="import", stdin=MATERIAL)
        cls.keys = [cls.app, cls.direct_128, cls.direct_256, cls.imported]
        client_key = cls.home.client("all")
        cls.server = cls.serve_class(tls=cls.tls())
        cls.client = cls.server.client(client_key)

    @classmethod
    def tls(cls):
        return None

    def check_answer(self, answer, key):
        """Checks the fields that every operation on a key has."""
        self.assertEqual((answer.key_id, answer.algorithm), (key["KeyId"], "AES_GCM"))
        self.assertEqual(str(uuid.UUID(answer.request_id)), answer.request_id)

    def check_self_describing(self, answer, key, length):
        """Checks a blob of an Advance operation, byte for byte as far as it is no ciphertext."""
        version, salt_len = key["PrimaryKeyVersion"], SALT_LEN if key["Scheme"] == "derived" else 0
        self.assertEqual(answer.key_version_id, version)
        self.assertEqual(answer.ciphertext_blob[: 3 + ID_LEN + IV_LEN], MAGIC + version.encode() + answer.iv)
        self.assertEqual(len(answer.ciphertext_blob), 3 + ID_LEN + IV_LEN + salt_len + length + TAG_LEN)

    def test_a_generated_key_comes_back_from_both_kinds_of_decryption(self):
        """GenerateDataKey makes a key of the length asked for. Decrypt and AdvanceDecrypt give it back."""
        for key in self.keys:
            for length in 1, 1024:
                with self.subTest(key=key["KeySpec"], scheme=key["Scheme"], length=length):
                    made = self.client.generate_data_key(
                        models.GenerateDataKeyRequest(key_id=key["KeyId"], number_of_bytes=length, aad=AAD)
                    )
                    self.check_answer(made, key)
                    self.assertEqual((len(made.plaintext), len(made.iv)), (length, IV_LEN))
                    raw = dict(
                        ciphertext_blob=made.ciphertext_blob, key_id=key["KeyId"], iv=made.iv, aad=AAD,
                        algorithm=made.algorithm,
                    )
                    opened = self.client.decrypt(models.DecryptRequest(**raw))
                    self.check_answer(opened, key)
                    self.assertEqual(opened.plaintext, made.plaintext)
                    opened = self.client.advance_decrypt(models.AdvanceDecryptRequest(**raw))
                    self.check_answer(opened, key)
                    self.assertEqual(opened.plaintext, made.plaintext)
                    self.assertEqual(opened.key_version_id, key["KeyVersions"][0]["KeyVersionId"])

    def test_an_advance_key_comes_back_from_its_blob_alone(self):
        """AdvanceGenerateDataKey's blob has the KMS's layout and needs nothing beside the AAD, whatever the Iv says."""
        for key in self.keys:
            for length in 1, 32:
                with self.subTest(key=key["KeySpec"], scheme=key["Scheme"], length=length):
                    made = self.client.advance_generate_data_key(
                        models.AdvanceGenerateDataKeyRequest(key_id=key["KeyId"], number_of_bytes=length, aad=AAD)
                    )
                    self.check_answer(made, key)
                    self.assertEqual(len(made.plaintext), length)
                    self.check_self_describing(made, key, length)
                    for iv in None, bytes(IV_LEN):
                        opened = self.client.advance_decrypt(
                            models.AdvanceDecryptRequest(ciphertext_blob=made.ciphertext_blob, iv=iv, aad=AAD)
                        )
                        self.check_answer(opened, key)
                        self.assertEqual(opened.plaintext, made.plaintext)
                        self.assertEqual(opened.key_version_id, made.key_version_id)

    def test_encrypted_data_come_back(self):
        """Encrypt and Decrypt, and AdvanceEncrypt and AdvanceDecrypt, are each other's inverse."""
        for key in self.keys:
            for plaintext in b"x", os.urandom(100_000):
                with self.subTest(key=key["KeySpec"], scheme=key["Scheme"], length=len(plaintext)):
                    asked = dict(key_id=key["KeyId"], plaintext=plaintext, aad=AAD)
                    made = self.client.encrypt(models.EncryptRequest(**asked))
                    self.check_answer(made, key)
                    opened = self.client.decrypt(
                        models.DecryptRequest(
                            ciphertext_blob=made.ciphertext_blob, key_id=key["KeyId"], iv=made.iv, aad=AAD
                        )
                    )
                    self.check_answer(opened, key)
                    self.assertEqual(opened.plaintext, plaintext)

                    made = self.client.advance_encrypt(models.AdvanceEncryptRequest(**asked))
                    self.check_answer(made, key)
                    self.check_self_describing(made, key, len(plaintext))
                    opened = self.client.advance_decrypt(
                        models.AdvanceDecryptRequest(ciphertext_blob=made.ciphertext_blob, aad=AAD)
                    )
                    self.check_answer(opened, key)
                    self.assertEqual((opened.plaintext, opened.key_version_id), (plaintext, made.key_version_id))

    def test_blobs_of_a_direct_key_are_plain_aes_gcm(self):
        """Whoever has the material of a direct key opens its blobs without keymill."""
        key_id, aes = self.imported["KeyId"], AESGCM(MATERIAL)
        made = self.client.generate_data_key(
            models.GenerateDataKeyRequest(key_id=key_id, number_of_bytes=32, aad=AAD, algorithm="AES_GCM")
        )
        self.assertEqual(aes.decrypt(made.iv, made.ciphertext_blob, AAD), made.plaintext)
        made = self.client.advance_generate_data_key(
            models.AdvanceGenerateDataKeyRequest(key_id=key_id, number_of_bytes=32)
        )
        wrapped = made.ciphertext_blob[3 + ID_LEN + IV_LEN :]
        self.assertEqual(aes.decrypt(made.iv, wrapped, None), made.plaintext)
        made = self.client.encrypt(models.EncryptRequest(key_id=key_id, plaintext=b"text", aad=AAD))
        self.assertEqual(aes.decrypt(made.iv, made.ciphertext_blob, AAD), b"text")

    def test_the_caller_may_choose_the_iv_of_a_derived_key(self):
        """A derived key takes the caller's Iv, even twice. A direct one draws its own: there, twice would be fatal."""
        asked = dict(plaintext=b"text", aad=AAD, iv=b"caller's own")
        one, other = (self.client.encrypt(models.EncryptRequest(key_id="alias/app", **asked)) for _ in range(2))
        self.assertEqual((one.iv, other.iv), (b"caller's own",) * 2)
        self.assertNotEqual(one.ciphertext_blob, other.ciphertext_blob)
        opened = self.client.decrypt(
            models.DecryptRequest(ciphertext_blob=one.ciphertext_blob, key_id="alias/app", iv=one.iv, aad=AAD)
        )
        self.assertEqual(opened.plaintext, b"text")
        with self.assertRefused(400, "InvalidParameter"):
            self.client.encrypt(models.EncryptRequest(key_id="alias/direct", **asked))

    def test_an_alias_stands_for_its_key(self):
        """Every operation that takes a key takes its alias, and answers with the key's id."""
        made = self.client.generate_data_key(models.GenerateDataKeyRequest(key_id="alias/app", number_of_bytes=16))
        self.check_answer(made, self.app)
        opened = self.client.decrypt(
            models.DecryptRequest(ciphertext_blob=made.ciphertext_blob, key_id="alias/app", iv=made.iv)
        )
        self.check_answer(opened, self.app)
        self.assertEqual(opened.plaintext, made.plaintext)
        made = self.client.advance_generate_data_key(
            models.AdvanceGenerateDataKeyRequest(key_id="alias/app", number_of_bytes=16)
        )
        self.check_answer(made, self.app)

    def test_the_initial_version_is_named_in_a_header(self):
        """GenerateDataKey, Encrypt and Decrypt name the key version, which serves Decrypt in the place of a key id.

        This is how the vendor's transfer clients decrypt: they keep the header's value, the Iv and the blob.
        """
        options = RuntimeOptions(response_headers=[VERSION_HEADER])
        version = self.app["KeyVersions"][0]["KeyVersionId"]
        made = self.client.generate_data_key_with_options(
            models.GenerateDataKeyRequest(key_id="alias/app", number_of_bytes=32, aad=AAD), options
        )
        self.assertEqual(made.response_headers, {VERSION_HEADER: version})
        encrypted = self.client.encrypt_with_options(
            models.EncryptRequest(key_id="alias/app", plaintext=made.plaintext, aad=AAD), options
        )
        self.assertEqual(encrypted.response_headers, {VERSION_HEADER: version})
        for blob in made, encrypted:
            opened = self.client.decrypt_with_options(
                models.DecryptRequest(
                    ciphertext_blob=blob.ciphertext_blob, iv=blob.iv, aad=AAD,
                    request_headers={VERSION_HEADER: blob.response_headers[VERSION_HEADER]},
                ),
                options,
            )
            self.check_answer(opened, self.app)
            self.assertEqual(opened.response_headers, {VERSION_HEADER: version})
            self.assertEqual(opened.plaintext, made.plaintext)

    def test_random_bytes_have_the_length_asked_for(self):
        """GenerateRandom gives 1 to 64 bytes, other ones each time."""
        for length in 1, 64:
            self.assertEqual(len(self.random(length)), length)
        self.assertNotEqual(self.random(64), self.random(64))

    def random(self, length):
        return self.client.generate_random(models.GenerateRandomRequest(length=length)).random

    def test_nothing_comes_twice(self):
        """Equal requests get keys, Ivs, blobs and request ids of their own."""
        request = models.AdvanceGenerateDataKeyRequest(key_id="alias/app", number_of_bytes=32, aad=AAD)
        one, other = (self.client.advance_generate_data_key(request) for _ in range(2))
        for name in "plaintext", "iv", "ciphertext_blob", "request_id":
            self.assertNotEqual(getattr(one, name), getattr(other, name), name)

    def test_the_asynchronous_calls_do_the_same(self):
        """The SDK's coroutines, several at once, get what its plain calls get."""

        async def one(number):
            aad = str(number).encode()
            made = await self.client.generate_data_key_async(
                models.GenerateDataKeyRequest(key_id="alias/app", number_of_bytes=32, aad=aad)
            )
            raw = dict(ciphertext_blob=made.ciphertext_blob, key_id="alias/app", iv=made.iv, aad=aad)
            opened = await self.client.decrypt_async(models.DecryptRequest(**raw))
            self.assertEqual(opened.plaintext, made.plaintext)
            made = await self.client.advance_generate_data_key_async(
                models.AdvanceGenerateDataKeyRequest(key_id="alias/app", number_of_bytes=32, aad=aad)
            )
            opened = await self.client.advance_decrypt_async(
                models.AdvanceDecryptRequest(ciphertext_blob=made.ciphertext_blob, aad=aad)
            )
            self.assertEqual(opened.plaintext, made.plaintext)

        async def several():
            await asyncio.gather(*(one(number) for number in range(4)))

        # The coroutines know no CA file of their configuration.
        tls = self.tls()
        with unittest.mock.patch.dict(os.environ, {"SSL_CERT_FILE": str(tls.ca)} if tls else {}):
            asyncio.run(several())


class OverHttp(Operations, SdkTest):
    """Without TLS."""


class OverHttps(Operations, SdkTest):
    """With TLS, and a CA made on the spot."""

    _certificates = None

    @classmethod
    def tls(cls):
        if cls._certificates is None:
            cls._certificates = Certificates(cls.home.path)
        return cls._certificates


if __name__ == "__main__":
    unittest.main()
