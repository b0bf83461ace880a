#!/usr/bin/env python3
"""Packs NIST's AES-GCM vectors with 96-bit IVs and 128-bit tags into cavp_aes_gcm.bin.

usage: cavp_aes_gcm.py [--check]

Writes the file beside this script and prints how many cases of each kind it holds, and its SHA-256. With --check,
writes nothing, and fails unless the file that is there is the one that would be written.

Input: the six `.rsp` files of NIST's CAVP, "GCM Test Vectors (SP 800-38D)", as the Python package
`cryptography_vectors` carries them (made with version 50.0.2; nothing else is needed):

    python3 -m venv /tmp/vectors
    /tmp/vectors/bin/pip install cryptography_vectors==50.0.2
    /tmp/vectors/bin/python tests/data/cavp_aes_gcm.py

Output: the line "CAVP AES-GCM 1\\n", then records up to the end of the file, in the order of FILES and of the cases
within each. A record:

    u8      flags: bit 0, the case is of a decrypt file; bit 1, it must not open
    u8      bytes of the key
    u8      bytes of the plaintext, and so of the ciphertext
    u8      bytes of the AAD
    ...     key
    12      IV
    ...     AAD
    ...     plaintext; absent if bit 1 is set, since NIST gives none
    ...     ciphertext
    16      tag
"""

import collections
import hashlib
import importlib.metadata
import importlib.resources
import pathlib
import sys

PACKAGE = "cryptography_vectors"
# Name, bytes of its keys, and whether it is a decrypt file.
FILES = [
    ("gcmEncryptExtIV128.rsp", 16, False),
    ("gcmEncryptExtIV192.rsp", 24, False),
    ("gcmEncryptExtIV256.rsp", 32, False),
    ("gcmDecrypt128.rsp", 16, True),
    ("gcmDecrypt192.rsp", 24, True),
    ("gcmDecrypt256.rsp", 32, True),
]
# Of each file: 5 lengths of plaintext by 5 of AAD, with 15 cases each.
CASES_PER_FILE = 375

MAGIC = b"CAVP AES-GCM 1\n"
DECRYPT, FAIL = 1, 2
IV_LEN, TAG_LEN = 12, 16

GROUP_FIELDS = {"Keylen", "IVlen", "PTlen", "AADlen", "Taglen"}
CASE_FIELDS = {"Count", "Key", "IV", "PT", "AAD", "CT", "Tag"}


def cases(text):
    """Yields each case as (its group's lengths in bits, its fields, whether it is marked FAIL)."""
    group, case, fails = {}, {}, False
    # The empty line ends the last case.
    for line in [*text.splitlines(), ""]:
        line = line.strip()
        if line.startswith("#"):
            continue
        if not line:
            if case:
                yield dict(group), case, fails
            case, fails = {}, False
        elif line == "FAIL":
            fails = True
        elif line.startswith("["):
            name, value = line.strip("[]").split(" = ")
            if name not in GROUP_FIELDS:
                raise ValueError(f"unknown length: {line}")
            group[name] = int(value)
        else:
            name, value = (part.strip() for part in line.split("=", 1))
            if name not in CASE_FIELDS or name in case:
                raise ValueError(f"unknown or repeated field: {line}")
            case[name] = value


def record(group, case, fails, is_decrypt, key_len):
    """One record. Every length is compared with what the case's group states."""

    def field(name, bits):
        value = bytes.fromhex(case[name])
        if len(value) * 8 != bits:
            raise ValueError(f"{name} of {len(value)} bytes instead of {bits} bits: {case}")
        return value

    if group["Keylen"] != key_len * 8 or (fails and not is_decrypt) or fails == ("PT" in case):
        raise ValueError(f"not what such a file holds: {group}, {case}")
    flags = (DECRYPT if is_decrypt else 0) | (FAIL if fails else 0)
    key = field("Key", group["Keylen"])
    iv = field("IV", IV_LEN * 8)
    aad = field("AAD", group["AADlen"])
    plaintext = b"" if fails else field("PT", group["PTlen"])
    ciphertext = field("CT", group["PTlen"])
    tag = field("Tag", TAG_LEN * 8)
    # `bytes` refuses what is over 255.
    head = bytes([flags, len(key), len(ciphertext), len(aad)])
    return head + key + iv + aad + plaintext + ciphertext + tag


def pack(folder):
    """The whole file, and how many cases it has of each kind and of each length."""
    packed, counts = bytearray(MAGIC), collections.Counter()
    for name, key_len, is_decrypt in FILES:
        taken = 0
        for group, case, fails in cases((folder / name).read_text(encoding="ascii")):
            if (group["IVlen"], group["Taglen"]) != (IV_LEN * 8, TAG_LEN * 8):
                continue
            packed += record(group, case, fails, is_decrypt, key_len)
            taken += 1
            kind = "must fail" if fails else "decrypt" if is_decrypt else "encrypt"
            counts[f"{key_len * 8}-bit key", kind] += 1
            verdict = "must fail" if fails else "valid"
            counts[f"{verdict}, plaintext bytes", group["PTlen"] // 8] += 1
            counts["AAD bytes", group["AADlen"] // 8] += 1
        if taken != CASES_PER_FILE:
            raise ValueError(f"{name}: {taken} cases instead of {CASES_PER_FILE}")
    return bytes(packed), counts


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    place = pathlib.Path(__file__).with_name("cavp_aes_gcm.bin")
    try:
        folder = importlib.resources.files(PACKAGE) / "ciphers" / "AES" / "GCM"
        version = importlib.metadata.version(PACKAGE)
    except ModuleNotFoundError:
        print(f"the package {PACKAGE} is missing; see --help", file=sys.stderr)
        return 1
    packed, counts = pack(folder)
    if not arguments:
        place.write_bytes(packed)
    print(f"from {PACKAGE} {version}: {len(FILES) * CASES_PER_FILE} cases, {len(packed)} bytes")
    for (what, value), count in sorted(counts.items()):
        print(f"{count:5}  {what}: {value}")
    print(f"SHA-256 {hashlib.sha256(packed).hexdigest()}")
    if arguments and (not place.exists() or place.read_bytes() != packed):
        print(f"{place.name} is not what this input gives", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
