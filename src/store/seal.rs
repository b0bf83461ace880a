//! Sealing of the store's records: what is encrypted, what is authenticated, and over which bytes.
//!
//! Pure: bytes in, bytes out. Which rows exist, and where, is `rows.rs` and `schema.rs`.
//!
//! # Subkeys
//! Each is HKDF-Expand (RFC 5869, HMAC-SHA256; the root key is uniform, so there is no Extract) of the root key, with
//! info = `"keymill store"` ‖ format (u32) ‖ store id (16 bytes) ‖ purpose. A record of one store means nothing in
//! another.
//!
//! | purpose | use |
//! |---|---|
//! | `seal` | XAES-256-GCM key of material and of the check value |
//! | `mac` | HMAC-SHA256 key of rows without material |
//! | `fingerprint` | HMAC-SHA256 key of the fingerprints of imported material |
//!
//! # Layouts
//! A sealed record is stored as nonce (24 random bytes) ‖ ciphertext ‖ tag (16), under the AAD of its [`Fields`]. A
//! row MAC is HMAC-SHA256 over its [`Fields`], 32 bytes. `Fields` are prefix-free, so that no two lists of fields have
//! the same bytes; all integers are big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `keymill` and a zero byte |
//! | 4 | format |
//! | 16 | store id |
//! | field | table name |
//! | fields | the row's columns in the order of the table, MAC and sealed columns left out |
//!
//! and a field is `00` (null), `01` ‖ 8 bytes (integer), or `02` ‖ 8 bytes of length ‖ bytes (text, bytes).

use std::fmt;

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use zeroize::{Zeroizing, zeroize_stack};

use super::root_key::RootKey;
use crate::{
    cpu::Tier,
    error::Result,
    limits::{IV_LEN, SALT_LEN, TAG_LEN},
    os::LockedBox,
    rng::Rng,
    secret::Material,
    wrap::derived::XaesKey,
};

/// The format of records and tables. A store of another format is refused.
pub(super) const FORMAT: u32 = 2;
/// Bytes of a row MAC and of a fingerprint.
pub(super) const MAC_LEN: usize = 32;
/// Bytes that sealing adds: nonce and tag.
pub(super) const SEAL_OVERHEAD: usize = NONCE_LEN + TAG_LEN;
/// What the check value holds. Its content says nothing; that it opens says that the root key is right.
const CHECK: &[u8; 16] = b"keymill check v1";
const NONCE_LEN: usize = SALT_LEN + IV_LEN;

/// The random name of a store, public.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct StoreId(pub(super) [u8; 16]);

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// The unambiguous bytes of a row, which a MAC or a seal authenticates.
pub(super) struct Fields(Vec<u8>);

impl Fields {
    pub(super) fn new(store: &StoreId, table: &str) -> Self {
        let mut fields = Self(Vec::with_capacity(256));
        fields.0.extend_from_slice(b"keymill\0");
        fields.0.extend_from_slice(&FORMAT.to_be_bytes());
        fields.0.extend_from_slice(&store.0);
        fields.bytes(table.as_bytes())
    }

    #[must_use]
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.push(2);
        self.0.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
        self.0.extend_from_slice(bytes);
        self
    }

    #[must_use]
    pub(super) fn text(self, text: &str) -> Self {
        self.bytes(text.as_bytes())
    }

    /// An integer as SQLite holds it.
    #[must_use]
    pub(super) fn int(mut self, number: i64) -> Self {
        self.0.push(1);
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    #[must_use]
    pub(super) fn optional_int(mut self, number: Option<i64>) -> Self {
        match number {
            Some(number) => self.int(number),
            None => {
                self.0.push(0);
                self
            }
        }
    }
}

/// The subkeys of one store, in locked pages.
pub(super) struct StoreKeys {
    pub(super) id: StoreId,
    seal: XaesKey,
    mac: LockedBox<[u8; 32]>,
    fingerprint: LockedBox<[u8; 32]>,
}

impl StoreKeys {
    /// # Errors
    /// `Machine` if there is no memory.
    pub(super) fn derive(root: &RootKey, id: StoreId, tier: Tier) -> Result<Self> {
        let subkey = |purpose: &[u8]| {
            let root = Hkdf::<Sha256>::from_prk(root.expose()).expect("a root key has 32 bytes");
            let mut key = Zeroizing::new([0; 32]);
            let info = [b"keymill store", &FORMAT.to_be_bytes()[..], &id.0, purpose];
            root.expand_multi_info(&info, &mut *key).expect("32 bytes are one block");
            key
        };
        Ok(Self {
            id,
            seal: XaesKey::new(tier, &subkey(b"seal"))?,
            mac: LockedBox::new_with(|| *subkey(b"mac"))?,
            fingerprint: LockedBox::new_with(|| *subkey(b"fingerprint"))?,
        })
    }

    /// Seals key material.
    ///
    /// # Errors
    /// `Machine` if there are no random bytes.
    pub(super) fn seal(&self, aad: &Fields, material: &Material, rng: &Rng) -> Result<Vec<u8>> {
        self.seal_bytes(aad, material.expose(), rng)
    }

    /// Opens key material of `len` bytes. `None` if the record is not what was sealed with this AAD.
    pub(super) fn open(&self, aad: &Fields, sealed: &[u8], len: usize) -> Option<Material> {
        let mut plaintext = Zeroizing::new([0; 32]);
        let plaintext = plaintext.get_mut(..len)?;
        self.open_bytes(aad, sealed, plaintext).then(|| Material::new(plaintext).ok())?
    }

    /// A value that opens under the right root key alone.
    ///
    /// # Errors
    /// `Machine` if there are no random bytes.
    pub(super) fn check_value(&self, rng: &Rng) -> Result<Vec<u8>> {
        self.seal_bytes(&Fields::new(&self.id, "check"), CHECK, rng)
    }

    /// Whether `sealed` is a check value of this root key and store.
    pub(super) fn opens(&self, sealed: &[u8]) -> bool {
        let mut plaintext = [0; CHECK.len()];
        self.open_bytes(&Fields::new(&self.id, "check"), sealed, &mut plaintext)
            && plaintext == *CHECK
    }

    /// The MAC of a row.
    pub(super) fn mac(&self, row: &Fields) -> [u8; MAC_LEN] {
        hmac(&self.mac, &row.0).finalize().into_bytes().into()
    }

    /// Whether `mac` is the row's, in constant time.
    pub(super) fn verifies(&self, row: &Fields, mac: &[u8]) -> bool {
        hmac(&self.mac, &row.0).verify_slice(mac).is_ok()
    }

    /// The fingerprint of imported material: equal for equal material, and useless without the root key.
    pub(super) fn fingerprint(&self, material: &Material) -> [u8; MAC_LEN] {
        let fingerprint = hmac(&self.fingerprint, material.expose()).finalize().into_bytes().into();
        zeroize_stack::<4096>();
        fingerprint
    }

    fn seal_bytes(&self, aad: &Fields, plaintext: &[u8], rng: &Rng) -> Result<Vec<u8>> {
        let mut nonce = [0; NONCE_LEN];
        rng.fill_from_os(&mut nonce)?;
        let mut out = vec![0; plaintext.len() + SEAL_OVERHEAD];
        out[..NONCE_LEN].copy_from_slice(&nonce);
        self.seal.seal(&nonce, &aad.0, plaintext, &mut out[NONCE_LEN..]);
        Ok(out)
    }

    fn open_bytes(&self, aad: &Fields, sealed: &[u8], plaintext: &mut [u8]) -> bool {
        match sealed.split_first_chunk::<NONCE_LEN>() {
            Some((nonce, sealed)) => self.seal.open(nonce, &aad.0, sealed, plaintext),
            None => false,
        }
    }
}

fn hmac(key: &[u8; 32], message: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(message);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(root: u8, store: u8) -> StoreKeys {
        let root = RootKey::from_bytes(&[root; 32]).unwrap();
        StoreKeys::derive(&root, StoreId([store; 16]), Tier::PORTABLE).unwrap()
    }

    fn row(keys: &StoreKeys) -> Fields {
        Fields::new(&keys.id, "table").text("a").int(7)
    }

    #[test]
    fn a_sealed_record_opens_under_its_own_key_store_and_fields_alone() {
        let rng = Rng::Os(Tier::PORTABLE);
        let ours = keys(1, 1);
        for len in [16, 24, 32] {
            let material = Material::new(&vec![0xab; len]).unwrap();
            let sealed = ours.seal(&row(&ours), &material, &rng).unwrap();
            assert_eq!(sealed.len(), len + SEAL_OVERHEAD);
            let opened = ours.open(&row(&ours), &sealed, len).unwrap();
            assert_eq!(opened.expose(), material.expose());
            assert_ne!(sealed, ours.seal(&row(&ours), &material, &rng).unwrap(), "fresh nonce");

            let other_row = Fields::new(&ours.id, "table").text("a").int(8);
            assert!(ours.open(&other_row, &sealed, len).is_none());
            for other in [keys(2, 1), keys(1, 2)] {
                assert!(other.open(&row(&ours), &sealed, len).is_none());
                assert!(other.open(&row(&other), &sealed, len).is_none());
            }
            for at in 0..sealed.len() {
                let mut bad = sealed.clone();
                bad[at] ^= 1;
                assert!(ours.open(&row(&ours), &bad, len).is_none(), "byte {at}");
                assert!(ours.open(&row(&ours), &sealed[..at], len).is_none(), "cut at {at}");
            }
            assert!(ours.open(&row(&ours), &sealed, 48 - len).is_none() || len == 24);
            assert!(ours.open(&row(&ours), &sealed, 33).is_none());
        }
    }

    #[test]
    fn macs_and_fingerprints_depend_on_key_store_and_every_byte() {
        let ours = keys(1, 1);
        let mac = ours.mac(&row(&ours));
        assert!(ours.verifies(&row(&ours), &mac));
        assert!(!ours.verifies(&row(&ours), &mac[..31]) && !ours.verifies(&row(&ours), b""));
        assert!(!keys(2, 1).verifies(&row(&ours), &mac));
        assert!(!keys(1, 2).verifies(&row(&keys(1, 2)), &mac));
        let material = Material::new(&[5; 32]).unwrap();
        let fingerprint = ours.fingerprint(&material);
        assert_eq!(fingerprint, keys(1, 1).fingerprint(&material));
        assert_ne!(fingerprint, keys(2, 1).fingerprint(&material));
        assert_ne!(fingerprint, keys(1, 2).fingerprint(&material));
        assert_ne!(fingerprint, ours.fingerprint(&Material::new(&[5; 16]).unwrap()));
    }

    #[test]
    fn different_lists_of_fields_never_have_the_same_bytes() {
        let new = || Fields::new(&StoreId([0; 16]), "t");
        let lists = [
            new(),
            new().optional_int(None),
            new().int(0),
            new().text(""),
            new().text("ab"),
            new().text("a").text("b"),
            new().text("b").text("a"),
            new().text("\0"),
            new().optional_int(None).optional_int(None),
            new().int(0).optional_int(None),
            Fields::new(&StoreId([0; 16]), "tt"),
            Fields::new(&StoreId([1; 16]), "t"),
        ];
        for (i, one) in lists.iter().enumerate() {
            for other in &lists[i + 1..] {
                assert!(!one.0.starts_with(&other.0) || one.0.len() > other.0.len());
                assert_ne!(one.0, other.0);
            }
        }
    }

    #[test]
    fn a_check_value_tells_root_keys_and_stores_apart() {
        let check = keys(1, 1).check_value(&Rng::Os(Tier::PORTABLE)).unwrap();
        assert!(keys(1, 1).opens(&check));
        assert!(!keys(2, 1).opens(&check) && !keys(1, 2).opens(&check) && !keys(1, 1).opens(b""));
    }
}
