//! Nothing is read or written outside of what was given, not even by one byte: every buffer ends where an unmapped page
//! begins, and in another run begins where one ends. A breach ends the process by SIGSEGV.
//!
//! A build without optimisation may touch less than one with it, so both are run: `cargo test --release --lib guard`.
#![expect(unsafe_code, reason = "maps pages that must not be touched")]

use std::{ptr, slice};

use super::{
    FILLER, Message, SetUp, Source, ahead,
    oracle::{encrypt_pair, seal_by_oracle},
    tiers,
};
use crate::{
    kernel::{
        BlockKey, BlockPair, GcmKeys, Iv, Open, Seal, ahead::AHEAD_LEN_MAX, chacha_fill,
        encrypt_pairs, open_many, seal_many,
    },
    limits::TAG_LEN,
};

/// Room for the longest buffer here, in whole pages.
const ROOM: usize = 96 << 10;
const PAGE: usize = 4096;

/// Which end of a buffer lies at the edge.
#[derive(Clone, Copy, Debug)]
enum Flush {
    Start,
    End,
}

const BOTH: [Flush; 2] = [Flush::Start, Flush::End];

/// Writable memory between two pages that nobody may touch.
struct Fenced(*mut u8);

impl Fenced {
    fn new() -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping touches no existing memory; the middle of it is ours to open.
        unsafe {
            let base = libc::mmap(ptr::null_mut(), ROOM + 2 * PAGE, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(base, libc::MAP_FAILED);
            let room = base.cast::<u8>().add(PAGE);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(room.cast(), ROOM, access), 0);
            Self(room)
        }
    }

    /// `count` elements, any bits of which are a value, at an edge of the room. All bytes are `FILLER`.
    fn slice<T: Plain>(&mut self, count: usize, flush: Flush) -> &mut [T] {
        let len = count * size_of::<T>();
        assert!(len <= ROOM && align_of::<T>() == 1);
        // SAFETY: `len` bytes within the room, borrowed through `self`; a `T` is plain bytes without alignment.
        unsafe {
            let start = match flush {
                Flush::Start => self.0,
                Flush::End => self.0.add(ROOM - len),
            };
            start.write_bytes(FILLER & T::MASK, len);
            slice::from_raw_parts_mut(start.cast(), count)
        }
    }

    fn copy<T: Plain + Copy>(&mut self, of: &[T], flush: Flush) -> &mut [T] {
        let place = self.slice(of.len(), flush);
        place.copy_from_slice(of);
        place
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, to which no reference is left.
        unsafe { libc::munmap(self.0.sub(PAGE).cast(), ROOM + 2 * PAGE) };
    }
}

/// Types of which every byte below `MASK` makes a value.
trait Plain {
    const MASK: u8 = 0xff;
}

impl Plain for u8 {}
impl Plain for Iv {}
impl Plain for [u8; 32] {}
impl Plain for BlockPair {}
impl Plain for bool {
    const MASK: u8 = 1;
}

/// The fenced memory of every column of a job.
struct Columns {
    ivs: Fenced,
    plaintexts: Fenced,
    out: Fenced,
    verdicts: Fenced,
    /// For each message.
    aads: Vec<Fenced>,
    sealed: Vec<Fenced>,
}

impl Columns {
    fn new(count: usize) -> Self {
        let many = || (0..count).map(|_| Fenced::new()).collect();
        let [ivs, plaintexts, out, verdicts] = std::array::from_fn(|_| Fenced::new());
        Self { ivs, plaintexts, out, verdicts, aads: many(), sealed: many() }
    }

    /// Seals and opens `messages` on every tier, with every buffer at an edge.
    fn check(&mut self, messages: &[Message], flush: Flush, offset: usize) {
        let (count, len) = (messages.len(), messages[0].plaintext.len());
        let bytes: Vec<u8> = messages.iter().flat_map(|m| m.plaintext.clone()).collect();
        let ivs: Vec<Iv> = messages.iter().map(|m| m.iv).collect();
        let ivs = &*self.ivs.copy(&ivs, flush);
        let plaintexts = &*self.plaintexts.copy(&bytes, flush);
        let aads: Vec<&[u8]> = self
            .aads
            .iter_mut()
            .zip(messages)
            .map(|(room, m)| &*room.copy(&m.aad, flush))
            .collect();
        let sealed: Vec<&[u8]> = (self.sealed.iter_mut().zip(messages))
            .map(|(room, m)| &*room.copy(&m.sealed, flush))
            .collect();
        let stride = offset + len + TAG_LEN;
        for set_up in SetUp::all(messages) {
            set_up.each_way(count, |keys, how| {
                let out = self.out.slice(count * stride, flush);
                let (aads, sealed) = (&aads[..], &sealed[..]);
                seal_many(Seal { keys, ivs, aads, len, plaintexts, out, stride, offset });
                for (place, message) in out.chunks_exact(stride).zip(messages) {
                    assert!(place[offset..] == message.sealed, "{how} {flush:?}: {count} of {len}");
                }
                let out = self.out.slice(count * len, flush);
                let verdicts = self.verdicts.slice(count, flush);
                verdicts.fill(false);
                open_many(Open { keys, ivs, aads, sealed, len, out, verdicts });
                assert!(verdicts.iter().all(|good| *good), "{how} {flush:?}: {count} of {len}");
                assert!(out == plaintexts, "{how} {flush:?}: {count} of {len}");
            });
        }
    }
}

#[test]
fn messages_at_the_edge_of_memory() {
    let mut source = Source::new(400);
    let mut columns = Columns::new(19);
    let materials = [source.bytes(32), source.bytes(16)];
    for len in (0..=130).chain([255, 256, 257, 1023, 1024]) {
        for (k, count) in [1, 2, 3, 5, 9, 19].into_iter().enumerate() {
            // One key with AADs alike, and with unlike ones; a key for each with AADs of every tail.
            let aad_len = [0, 16, 32, 13, 48, 1][(len + k) % 6];
            let material = &materials[(len + k) % 2];
            let one: Vec<_> =
                (0..count).map(|_| source.message_under(material, len, aad_len)).collect();
            let unlike: Vec<_> = (0..count)
                .map(|i| source.message_under(material, len, (len * 5 + i * 11) % 131))
                .collect();
            let each: Vec<_> =
                (0..count).map(|i| source.message(32, len, (len * 3 + i * 7) % 67)).collect();
            for flush in BOTH {
                columns.check(&unlike, flush, [7, 12, 0][k % 3]);
                columns.check(&one, flush, [0, 12, 7][k % 3]);
                columns.check(&each, flush, [12, 0, 1][k % 3]);
            }
        }
    }
}

#[test]
fn key_streams_at_the_edge_of_memory() {
    let mut room = Fenced::new();
    let seed = [3; 32];
    for len in (0..=1100).chain([2047, 2048, 2049, 4100]) {
        let mut expected = vec![0; len];
        chacha_fill(tiers()[tiers().len() - 1], &seed, 1, 2, &mut expected);
        for flush in BOTH {
            for &tier in tiers() {
                let out = room.slice(len, flush);
                chacha_fill(tier, &seed, 1, 2, out);
                assert!(out == expected, "{tier} {flush:?}: {len}");
            }
        }
    }
}

#[test]
fn messages_with_streams_made_ahead_at_the_edge_of_memory() {
    let mut source = Source::new(402);
    let [mut aads, mut plaintexts, mut outs] = std::array::from_fn(|_| Fenced::new());
    for len in 0..=AHEAD_LEN_MAX {
        for aad_len in (0..50).chain([111, 112, 113]) {
            let messages = ahead::messages(&mut source, 32, len, aad_len);
            for (flush, &tier) in
                BOTH.into_iter().flat_map(|flush| tiers().iter().map(move |t| (flush, t)))
            {
                let Some((key, mut streams)) = ahead::set_up(tier, &messages) else { continue };
                for message in &messages {
                    let aad = aads.copy(&message.aad, flush);
                    let plaintext = plaintexts.copy(&message.plaintext, flush);
                    let out = outs.slice(len + TAG_LEN, flush);
                    streams.seal(key.key(), aad, plaintext, out);
                    assert!(out == message.sealed, "{tier} {flush:?}: {len}, AAD {aad_len}");
                }
            }
        }
    }
}

#[test]
fn key_set_up_at_the_edge_of_memory() {
    let mut source = Source::new(401);
    let mut room = Fenced::new();
    for count in 1..=20 {
        let materials: Vec<[u8; 32]> =
            (0..count).map(|_| source.bytes(32).try_into().expect("32")).collect();
        let pair: BlockPair = [[1; 16], [2; 16]];
        for flush in BOTH {
            for &tier in tiers() {
                let mut keys = GcmKeys::new();
                keys.set_up_many(tier, room.copy(&materials, flush));
                let sealed = seal_by_oracle(&materials[count - 1], &[5; 12], b"aad", &[6; 32]);
                let mut out = [0; 48];
                seal_many(Seal {
                    keys: super::Keys::One(keys.key(count - 1)),
                    ivs: &[[5; 12]],
                    aads: &[b"aad"],
                    len: 32,
                    plaintexts: &[6; 32],
                    out: &mut out,
                    stride: 48,
                    offset: 0,
                });
                assert!(out == *sealed, "{tier} {flush:?}: {count}");

                let roots: Vec<_> = (materials.iter())
                    .map(|material| BlockKey::new(tier, material).expect("memory"))
                    .collect();
                let pairs = room.copy(&vec![pair; count], flush);
                encrypt_pairs(&roots.iter().collect::<Vec<_>>(), pairs);
                for (done, material) in pairs.iter().zip(&materials) {
                    assert_eq!(*done, encrypt_pair(material, pair), "{tier} {flush:?}: {count}");
                }
            }
        }
    }
}
