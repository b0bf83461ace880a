//! The batch of a shape: keys, messages, what the oracle seals them to, and what is shown to `open_many`.

use std::ops::{Deref, DerefMut};

use crate::{
    oracle::{self, OracleKey},
    shape::{AadLens, Forged, Ivs, Origin, Owners, Shape},
};

pub const TAG_LEN: usize = 16;

pub struct Batch {
    /// The root key and salts of derived keys.
    pub derivation: Option<([u8; 32], Vec<[u8; 12]>)>,
    /// The keys that are set up.
    pub materials: Vec<Vec<u8>>,
    /// The key that all messages share, if they do.
    pub one_key: Option<usize>,
    /// All plaintexts, in order.
    pub plaintexts: Slice,
    pub messages: Vec<Message>,
}

pub struct Message {
    /// Its key, an index of `materials`.
    pub key: usize,
    pub iv: [u8; 12],
    pub aad: Slice,
    /// Ciphertext and tag, by the oracle.
    pub sealed: Vec<u8>,
    /// What is shown to `open_many`.
    pub shown: Shown,
}

pub struct Shown {
    pub iv: [u8; 12],
    pub aad: Slice,
    pub sealed: Slice,
    /// Whether it is the message unchanged, and so must open.
    pub valid: bool,
}

impl Batch {
    pub fn new(shape: &Shape) -> Self {
        let mut source = Source(shape.seed);
        let &Shape { count, len, lead, owners, .. } = shape;
        let key_count = match owners {
            Owners::One(keys) | Owners::Shared(keys) => keys,
            Owners::Each => count,
        };
        let one_key = matches!(owners, Owners::One(_)).then(|| source.below(key_count));
        let (derivation, materials) = make_keys(shape.origin, key_count, &mut source);
        let oracle: Vec<_> = materials.iter().map(|key| OracleKey::new(key)).collect();
        let plaintexts = Slice::new(lead, &source.bytes(count * len));
        let ivs = make_ivs(shape.ivs, count, &mut source);
        let aad_lens = make_aad_lens(&shape.aads, count, &mut source);
        let messages = (ivs.into_iter().zip(aad_lens).enumerate())
            .map(|(i, (iv, aad_len))| {
                let key = match owners {
                    Owners::One(_) => one_key.expect("drawn above"),
                    Owners::Each => i,
                    Owners::Shared(keys) => source.below(keys),
                };
                let aad = Slice::new(lead, &source.bytes(aad_len));
                let sealed = oracle[key].seal(iv, &aad, &plaintexts[i * len..][..len]);
                let shown = Shown {
                    iv,
                    aad: Slice::new(lead, &aad),
                    sealed: Slice::new(lead, &sealed),
                    valid: true,
                };
                Message { key, iv, aad, sealed, shown }
            })
            .collect();
        let mut batch = Self { derivation, materials, one_key, plaintexts, messages };
        batch.forge(shape.forged, &mut source);
        batch
    }

    fn forge(&mut self, forged: Forged, source: &mut Source) {
        let count = self.messages.len();
        let the_one = source.below(count.max(1));
        for i in 0..count {
            let chosen = match forged {
                Forged::Nobody => false,
                Forged::One => i == the_one,
                Forged::OneOf(so_many) => source.below(so_many) == 0,
                Forged::Everybody => true,
            };
            if chosen {
                self.forge_message(i, source);
            }
        }
    }

    fn forge_message(&mut self, i: usize, source: &mut Source) {
        let neighbour = (i + 1) % self.messages.len();
        let tag_start = self.messages[i].sealed.len() - TAG_LEN;
        let tag_of_neighbour = self.messages[neighbour].sealed[tag_start..].to_vec();
        let Message { aad, sealed, shown, .. } = &mut self.messages[i];
        shown.valid = false;
        match source.below(6) {
            0 => source.flip_bit(&mut shown.sealed),
            1 => source.flip_bit(&mut shown.iv),
            2 if !aad.is_empty() => source.flip_bit(&mut shown.aad),
            // As long as before to whoever pads with zeros and forgets the lengths.
            3 => shown.aad = Slice::new(aad.lead, &[aad, &[0][..]].concat()),
            4 => {
                shown.sealed[tag_start..].copy_from_slice(&tag_of_neighbour);
                // Two messages that are equal have one tag.
                shown.valid = shown.sealed[..] == sealed[..];
            }
            _ => source.flip_bit(&mut shown.sealed[tag_start..]),
        }
    }
}

type Keys = (Option<([u8; 32], Vec<[u8; 12]>)>, Vec<Vec<u8>>);

fn make_keys(origin: Origin, count: usize, source: &mut Source) -> Keys {
    let mut derivation = None;
    let materials = match origin {
        Origin::Drawn(len) => (0..count).map(|_| source.bytes(len)).collect(),
        Origin::Mixed => (0..count)
            .map(|_| {
                let len = [16, 24, 32][source.below(3)];
                source.bytes(len)
            })
            .collect(),
        Origin::Derived => {
            let (root, salts) =
                (source.array(), Vec::from_iter((0..count).map(|_| source.array())));
            let materials = oracle::derive(&root, &salts);
            derivation = Some((root, salts));
            materials.iter().map(|key| key.to_vec()).collect()
        }
    };
    (derivation, materials)
}

fn make_ivs(ivs: Ivs, count: usize, source: &mut Source) -> Vec<[u8; 12]> {
    match ivs {
        Ivs::Drawn => (0..count).map(|_| source.array()).collect(),
        Ivs::Ones => vec![[0xff; 12]; count],
        Ivs::Counter { bytes, before } => {
            let mut start = [0; 16];
            start[4..].copy_from_slice(&source.array::<12>());
            let carry = 1_u128 << (8 * u32::from(bytes));
            let start = (u128::from_be_bytes(start) | (carry - 1)) - u128::from(before);
            (0..count as u128)
                .map(|i| (start + i).to_be_bytes()[4..].try_into().expect("12 bytes"))
                .collect()
        }
    }
}

fn make_aad_lens(lens: &AadLens, count: usize, source: &mut Source) -> Vec<usize> {
    let odd = source.below(count.max(1));
    (0..count)
        .map(|i| match *lens {
            AadLens::Equal(len) => len,
            AadLens::OneOff(len, other) => [len, other][usize::from(i == odd)],
            AadLens::EitherOf(len, other) => [len, other][source.below(2)],
            AadLens::UpTo(most) => source.below(most + 1),
        })
        .collect()
}

/// Bytes that start `lead` bytes after an aligned address and end where their allocation ends, so that
/// AddressSanitizer sees every access beyond them.
pub struct Slice {
    memory: Box<[u8]>,
    lead: usize,
}

impl Slice {
    pub fn new(lead: usize, bytes: &[u8]) -> Self {
        let mut slice = Self::filled(lead, bytes.len(), 0);
        slice.copy_from_slice(bytes);
        slice
    }

    pub fn filled(lead: usize, len: usize, filler: u8) -> Self {
        Self { memory: vec![filler; lead + len].into_boxed_slice(), lead }
    }
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.lead..]
    }
}

impl DerefMut for Slice {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.lead..]
    }
}

/// Bytes that follow from a seed: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
struct Source(u64);

impl Source {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }

    fn flip_bit(&mut self, bytes: &mut [u8]) {
        let bit = self.below(8 * bytes.len());
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}
