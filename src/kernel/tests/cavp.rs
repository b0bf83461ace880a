//! NIST's AES-GCM vectors (CAVP) with 96-bit IVs and 128-bit tags.
//!
//! They put each of five plaintext lengths beside each of five AAD lengths, for every key length alike, and come from
//! other hands than Wycheproof's. `tests/data/README.md` says where the file is from and how to make it again. It is
//! read here, not trusted: a record that does not fit stops the test.

/// One case.
pub(super) struct Vector {
    pub(super) material: Vec<u8>,
    pub(super) iv: [u8; 12],
    pub(super) aad: Vec<u8>,
    /// `None` for a forgery: NIST gives no plaintext for what must not open.
    pub(super) plaintext: Option<Vec<u8>>,
    /// Ciphertext and tag.
    pub(super) sealed: Vec<u8>,
}

const FILE: &[u8] = include_bytes!("../../../tests/data/cavp_aes_gcm.bin");
const MAGIC: &[u8] = b"CAVP AES-GCM 1\n";

/// Every case, in the order of the file: those of the encrypt files come first.
pub(super) fn vectors() -> Vec<Vector> {
    let mut rest = FILE.strip_prefix(MAGIC).expect("a file of this version");
    let mut vectors = Vec::new();
    while !rest.is_empty() {
        vectors.push(vector(&mut rest));
    }
    vectors
}

/// Takes one record off `rest`.
fn vector(rest: &mut &[u8]) -> Vector {
    let [flags, key_len, len, aad_len] = array(rest);
    let [key_len, len, aad_len] = [key_len, len, aad_len].map(usize::from);
    // Bit 0 tells a decrypt file's case, bit 1 a forgery, which only those have.
    let is_forgery = match flags {
        0 | 1 => false,
        3 => true,
        _ => panic!("unknown flags {flags:#x}"),
    };
    Vector {
        material: bytes(rest, key_len),
        iv: array(rest),
        aad: bytes(rest, aad_len),
        plaintext: (!is_forgery).then(|| bytes(rest, len)),
        sealed: bytes(rest, len + 16),
    }
}

fn array<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (taken, after) = rest.split_first_chunk().expect("a whole record");
    *rest = after;
    *taken
}

fn bytes(rest: &mut &[u8], len: usize) -> Vec<u8> {
    let (taken, after) = rest.split_at_checked(len).expect("a whole record");
    *rest = after;
    taken.to_vec()
}

#[test]
fn cavp_has_the_cases_that_we_count_on() {
    let vectors = vectors();
    let count = |is_counted: &dyn Fn(&Vector) -> bool| {
        let (valid, forged): (Vec<_>, Vec<_>) = vectors
            .iter()
            .filter(|vector| is_counted(vector))
            .partition(|vector| vector.plaintext.is_some());
        [valid.len(), forged.len()]
    };
    assert_eq!(count(&|_| true), [1673, 577]);
    let by_key = [16, 24, 32].map(|len| count(&|v| v.material.len() == len));
    assert_eq!(by_key, [[554, 196], [560, 190], [559, 191]]);
    let by_plaintext = [0, 13, 16, 32, 51].map(|len| count(&|v| v.sealed.len() == len + 16));
    assert_eq!(by_plaintext, [[329, 121], [328, 122], [342, 108], [335, 115], [339, 111]]);
    let by_aad = [0, 16, 20, 48, 90].map(|len| count(&|v| v.aad.len() == len));
    assert_eq!(by_aad, [[341, 109], [335, 115], [330, 120], [327, 123], [340, 110]]);
    for vector in &vectors {
        let len = vector.sealed.len() - 16;
        assert!(vector.plaintext.as_ref().is_none_or(|plaintext| plaintext.len() == len));
    }
}

/// A battery may mix them at will: no two can be taken for one another.
#[test]
fn cavp_has_no_key_and_no_iv_twice() {
    let vectors = vectors();
    let (mut materials, mut ivs): (Vec<_>, Vec<_>) =
        vectors.iter().map(|vector| (vector.material.as_slice(), vector.iv)).unzip();
    materials.sort_unstable();
    materials.dedup();
    ivs.sort_unstable();
    ivs.dedup();
    assert_eq!([materials.len(), ivs.len()], [2250, 2250]);
}
