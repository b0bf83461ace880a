"""What an administrator changes while the server runs: keys that rotate or are disabled, clients that come and go.

Method: the server and the SDK's clients stay as they are, the command line changes the store, and the server follows
within seconds. Blobs from before a change are kept and tried after it.
"""

import unittest

from harness import SdkTest, code_of
from sdk import models

AAD = b"aad"


class Changes(SdkTest):
    """A home, a server and a client for all tests; each has keys of its own."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        client_key = cls.home.client("all")
        cls.server = cls.serve_class()
        cls.client = cls.server.client(client_key)

    def key(self, *arguments):
        """A key that the server knows."""
        key_id = self.home.key(*arguments)["KeyId"]
        self.eventually("a key was made", lambda: code_of(lambda: self.generate(key_id)) == "OK")
        return key_id

    def generate(self, key_id, client=None):
        request = models.GenerateDataKeyRequest(key_id=key_id, number_of_bytes=32, aad=AAD)
        return (client or self.client).generate_data_key(request)

    def advance_generate(self, key_id):
        return self.client.advance_generate_data_key(
            models.AdvanceGenerateDataKeyRequest(key_id=key_id, number_of_bytes=32, aad=AAD)
        )

    def decrypt(self, made):
        return self.client.decrypt(
            models.DecryptRequest(ciphertext_blob=made.ciphertext_blob, key_id=made.key_id, iv=made.iv, aad=AAD)
        )

    def advance_decrypt(self, made):
        return self.client.advance_decrypt(
            models.AdvanceDecryptRequest(ciphertext_blob=made.ciphertext_blob, aad=AAD)
        )

    def test_rotation_reaches_the_advance_operations_alone(self):
        """After a rotation the Advance operations use the new version, the others the first one; old blobs open."""
        for arguments in ("--alias", "alias/rotating"), ("--scheme", "direct"):
            with self.subTest(arguments):
                key_id = self.key(*arguments)
                raw, blobs = self.generate(key_id), [self.advance_generate(key_id)]
                initial = blobs[0].key_version_id
                for _ in range(2):
                    version = self.home.key(key_id, command="rotate")["PrimaryKeyVersion"]
                    follows = lambda: self.advance_generate(key_id).key_version_id == version
                    self.eventually("a key was rotated", follows)
                    blobs.append(self.advance_generate(key_id))
                    encrypted = self.client.advance_encrypt(
                        models.AdvanceEncryptRequest(key_id=key_id, plaintext=b"x", aad=AAD)
                    )
                    self.assertEqual(encrypted.key_version_id, version)
                self.assertEqual(len({blob.key_version_id for blob in blobs}), 3)
                for blob in blobs:
                    opened = self.advance_decrypt(blob)
                    self.assertEqual(opened.plaintext, blob.plaintext)
                    self.assertEqual(opened.key_version_id, blob.key_version_id)
                for made in raw, self.generate(key_id):
                    self.assertEqual(self.decrypt(made).plaintext, made.plaintext)
                    opened = self.client.advance_decrypt(
                        models.AdvanceDecryptRequest(
                            ciphertext_blob=made.ciphertext_blob, key_id=key_id, iv=made.iv, aad=AAD
                        )
                    )
                    self.assertEqual((opened.plaintext, opened.key_version_id), (made.plaintext, initial))

    def test_a_disabled_key_rests(self):
        """No operation works with a disabled key, and all of them do again once it is enabled."""
        key_id = self.key()
        raw, advanced = self.generate(key_id), self.advance_generate(key_id)
        asked = dict(key_id=key_id, plaintext=b"x")
        calls = (
            lambda: self.generate(key_id),
            lambda: self.advance_generate(key_id),
            lambda: self.client.encrypt(models.EncryptRequest(**asked)),
            lambda: self.client.advance_encrypt(models.AdvanceEncryptRequest(**asked)),
            lambda: self.decrypt(raw),
            lambda: self.advance_decrypt(advanced),
        )
        self.home.cli("key", "disable", key_id)
        self.eventually("a key was disabled", lambda: code_of(calls[0]) == "Rejected.Disabled")
        for call in calls:
            message = "The request was rejected because the key state is Disabled."
            with self.assertRefused(409, "Rejected.Disabled", message):
                call()
        self.home.cli("key", "enable", key_id)
        self.eventually("a key was enabled", lambda: code_of(calls[0]) == "OK")
        self.assertEqual([code_of(call) for call in calls], ["OK"] * len(calls))

    def test_a_key_that_will_be_deleted_rests(self):
        """A key whose deletion is pending has a code of its own."""
        key_id = self.key()
        advanced = self.advance_generate(key_id)
        self.home.cli("key", "schedule-deletion", key_id, "--days", "7")
        pending = lambda: code_of(lambda: self.generate(key_id)) == "Rejected.PendingDeletion"
        self.eventually("a key's deletion is pending", pending)
        message = "The request was rejected because the key state is PendingDeletion."
        with self.assertRefused(409, "Rejected.PendingDeletion", message):
            self.advance_decrypt(advanced)

    def test_an_alias_can_move(self):
        """An alias leads to its new key once it was moved, and nowhere once it is gone."""
        one, other = self.key("--alias", "alias/moving"), self.key()
        self.assertEqual(self.generate("alias/moving").key_id, one)
        self.home.cli("alias", "update", "alias/moving", other)
        self.eventually("an alias was moved", lambda: self.generate("alias/moving").key_id == other)
        self.home.cli("alias", "delete", "alias/moving")
        gone = lambda: code_of(lambda: self.generate("alias/moving")) == "Forbidden.KeyNotFound"
        self.eventually("an alias is gone", gone)

    def test_clients_come_and_go(self):
        """A client works once it is made, not while it is disabled, as it may from then on, and never when deleted."""
        key_id = self.key()
        client_key = self.home.client("guest", allow="generate")
        client_id, client = client_key.client_id, self.server.client(client_key)
        call = lambda: self.generate(key_id, client)
        self.eventually("a client was made", lambda: code_of(call) == "OK")
        message = f'The AccessKey ID "{client_id}" does not exist in our records.'

        self.home.cli("client", "disable", client_id)
        self.eventually("a client was disabled", lambda: code_of(call) != "OK")
        with self.assertRefused(404, "Unauthorized", message):
            call()
        self.home.cli("client", "enable", client_id)
        self.eventually("a client was enabled", lambda: code_of(call) == "OK")

        self.home.cli("client", "set", client_id, "--allow", "decrypt")
        self.eventually("a client may do other things", lambda: code_of(call) != "OK")
        with self.assertRefused(403, "Forbidden.NoPermission"):
            call()
        self.home.cli("client", "set", client_id, "--allow", "generate", "--keys", "alias/none")
        self.eventually("a client may do it again", lambda: "GenerateDataKey" not in self.message_of(call))
        with self.assertRefused(403, "Forbidden.NoPermission"):
            call()

        self.home.cli("client", "delete", client_id)
        self.eventually("a client was deleted", lambda: code_of(call) == "Unauthorized")
        with self.assertRefused(404, "Unauthorized", message):
            call()

    def message_of(self, call):
        """What a call is refused with, in words."""
        try:
            call()
        except Exception as error:
            return error.message
        return ""


if __name__ == "__main__":
    unittest.main()
