//! Broken facts of the caller, which panic in release too, and the ways to set up keys.

use super::{Source, TIGHT, hex, oracle::encrypt_pair, tiers};
use crate::{
    cpu::Tier,
    kernel::{
        BlockKey, GcmKey, GcmKeys, KeyRef, Keys, Open, Seal, encrypt_pairs, open_many, seal_many,
    },
};

fn set_up(tier: Tier, material: &[u8]) -> GcmKey {
    GcmKey::new(tier, material).expect("memory")
}

/// A seal job of two messages of 32 bytes, to be broken.
struct SealFacts {
    keys: usize,
    ivs: usize,
    aads: usize,
    plaintexts: usize,
    out: usize,
    stride: usize,
    offset: usize,
}

const SEAL: SealFacts =
    SealFacts { keys: 2, ivs: 2, aads: 2, plaintexts: 64, out: 96, stride: 48, offset: 0 };

fn seal_panics(tier: Tier, facts: &SealFacts) -> bool {
    let key = set_up(tier, &[7; 32]);
    let mut out = vec![0; facts.out];
    let seal = std::panic::AssertUnwindSafe(|| {
        seal_many(Seal {
            keys: Keys::Each(&vec![key.key(); facts.keys]),
            ivs: &vec![[0; 12]; facts.ivs],
            aads: &vec![b"aad".as_slice(); facts.aads],
            len: 32,
            plaintexts: &vec![0; facts.plaintexts],
            out: &mut out,
            stride: facts.stride,
            offset: facts.offset,
        });
    });
    std::panic::catch_unwind(seal).is_err()
}

#[test]
fn seal_lengths_that_do_not_fit_panic() {
    for &tier in tiers() {
        assert!(!seal_panics(tier, &SEAL));
        let wrong = [
            SealFacts { keys: 1, ..SEAL },
            SealFacts { keys: 3, ..SEAL },
            SealFacts { ivs: 1, ..SEAL },
            SealFacts { ivs: 3, ..SEAL },
            SealFacts { aads: 1, ..SEAL },
            SealFacts { aads: 3, ..SEAL },
            SealFacts { plaintexts: 63, ..SEAL },
            SealFacts { plaintexts: 96, ..SEAL },
            SealFacts { out: 95, ..SEAL },
            SealFacts { out: 97, ..SEAL },
            SealFacts { stride: 47, out: 94, ..SEAL },
            SealFacts { stride: 0, out: 0, ..SEAL },
            SealFacts { offset: 1, ..SEAL },
            SealFacts { offset: usize::MAX - 40, ..SEAL },
        ];
        for (i, facts) in wrong.iter().enumerate() {
            assert!(seal_panics(tier, facts), "{tier}: {i}");
        }
    }
}

/// An open job of two messages of 32 bytes, to be broken.
struct OpenFacts {
    keys: usize,
    ivs: usize,
    aads: usize,
    sealed: [usize; 2],
    sealed_count: usize,
    out: usize,
    verdicts: usize,
}

const OPEN: OpenFacts =
    OpenFacts { keys: 2, ivs: 2, aads: 2, sealed: [48, 48], sealed_count: 2, out: 64, verdicts: 2 };

fn open_panics(tier: Tier, facts: &OpenFacts) -> bool {
    let key = set_up(tier, &[7; 32]);
    let mut out = vec![0; facts.out];
    let mut verdicts = vec![false; facts.verdicts];
    let sealed: Vec<_> = facts.sealed.iter().map(|len| vec![0; *len]).collect();
    let sealed: Vec<&[u8]> =
        sealed.iter().cycle().take(facts.sealed_count).map(Vec::as_slice).collect();
    let open = std::panic::AssertUnwindSafe(|| {
        open_many(Open {
            keys: Keys::Each(&vec![key.key(); facts.keys]),
            ivs: &vec![[0; 12]; facts.ivs],
            aads: &vec![b"aad".as_slice(); facts.aads],
            sealed: &sealed,
            len: 32,
            out: &mut out,
            verdicts: &mut verdicts,
        });
    });
    std::panic::catch_unwind(open).is_err()
}

#[test]
fn open_lengths_that_do_not_fit_panic() {
    for &tier in tiers() {
        assert!(!open_panics(tier, &OPEN));
        let mut wrong = vec![
            OpenFacts { keys: 1, ..OPEN },
            OpenFacts { ivs: 1, ..OPEN },
            OpenFacts { ivs: 3, ..OPEN },
            OpenFacts { aads: 3, ..OPEN },
            OpenFacts { sealed_count: 1, ..OPEN },
            OpenFacts { sealed_count: 3, ..OPEN },
            OpenFacts { out: 63, ..OPEN },
            OpenFacts { out: 96, ..OPEN },
            OpenFacts { verdicts: 1, ..OPEN },
            OpenFacts { verdicts: 3, ..OPEN },
        ];
        // Every truncation, and one byte too many, of either message.
        for len in (0..48).chain([49]) {
            wrong.push(OpenFacts { sealed: [len, 48], ..OPEN });
            wrong.push(OpenFacts { sealed: [48, len], ..OPEN });
        }
        for (i, facts) in wrong.iter().enumerate() {
            assert!(open_panics(tier, facts), "{tier}: {i}");
        }
    }
}

#[test]
fn keys_of_other_lengths_panic() {
    for &tier in tiers() {
        for len in (0..=40).filter(|len| ![16, 24, 32].contains(len)) {
            let refused = || drop(set_up(tier, &vec![0; len]));
            assert!(std::panic::catch_unwind(refused).is_err(), "{tier}: {len}");
        }
    }
}

/// In locked pages, of every length.
#[test]
fn keys_set_up_alone() {
    let mut source = Source::new(7);
    for key_len in [16, 24, 32] {
        let messages: Vec<_> = (0..21).map(|_| source.message(key_len, 32, 16)).collect();
        for &tier in tiers() {
            let keys: Vec<_> = messages.iter().map(|m| set_up(tier, &m.material)).collect();
            let keys: Vec<_> = keys.iter().map(GcmKey::key).collect();
            let columns = super::Columns::of(&messages);
            columns.check_seal(columns.all(), Keys::Each(&keys), TIGHT, tier.as_str());
        }
    }
}

/// In memory that serves again, for more keys and for fewer, and for another tier.
#[test]
fn keys_set_up_together() {
    let mut source = Source::new(8);
    let messages: Vec<_> = (0..70).map(|_| source.message(32, 32, 16)).collect();
    let materials: Vec<[u8; 32]> =
        messages.iter().map(|m| m.material.as_slice().try_into().expect("32")).collect();
    let mut keys = GcmKeys::new();
    for count in (0..=33).chain([63, 64, 65, 70, 5, 17, 1, 0, 16, 3]) {
        for &tier in tiers() {
            keys.set_up_many(tier, &materials[..count]);
            let refs: Vec<KeyRef<'_>> = (0..count).map(|i| keys.key(i)).collect();
            let columns = super::Columns::of(&messages[..count]);
            let how = format!("{tier}: {count} keys");
            columns.check_seal(columns.all(), Keys::Each(&refs), TIGHT, &how);
            for (i, key) in refs.iter().enumerate() {
                columns.check_seal(i..i + 1, Keys::One(*key), TIGHT, &how);
            }
        }
    }
}

#[test]
fn pairs_of_blocks() {
    let mut source = Source::new(9);
    for &tier in tiers() {
        for count in (0..=33).chain([63, 64, 65]) {
            let materials: Vec<[u8; 32]> =
                (0..count).map(|_| source.bytes(32).try_into().expect("32")).collect();
            let keys: Vec<_> =
                materials.iter().map(|m| BlockKey::new(tier, m).expect("memory")).collect();
            let before: Vec<[[u8; 16]; 2]> = (0..count)
                .map(|_| [0, 1].map(|_| source.bytes(16).try_into().expect("16")))
                .collect();
            let mut pairs = before.clone();
            encrypt_pairs(&keys.iter().collect::<Vec<_>>(), &mut pairs);
            for i in 0..count {
                let expected = encrypt_pair(&materials[i], before[i]);
                assert_eq!(
                    hex(pairs[i].as_flattened()),
                    hex(expected.as_flattened()),
                    "{tier}: {i} of {count}"
                );
            }
        }
        let one = BlockKey::new(tier, &[1; 32]).expect("memory");
        let too_many = || encrypt_pairs(&[&one], &mut [[[0; 16]; 2]; 2]);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(too_many)).is_err());
    }
}

/// Round keys and powers of H, which are as good as the key.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "reads memory after what was in it is dropped")]
#[test]
fn a_dropped_context_leaves_zeros() {
    use std::{mem::MaybeUninit, ptr};

    use crate::{cpu::Level, kernel::x86_64::Context};

    let read = |place: &MaybeUninit<Context>| {
        let start = place.as_ptr().cast::<u8>();
        // SAFETY: a context is written below, with its round keys first; dropped, it is still memory of `place`.
        let round_keys = unsafe { ptr::read_volatile(start.cast::<[u8; 240]>()) };
        // SAFETY: likewise, with the powers behind 256 bytes.
        let powers = unsafe { ptr::read_volatile(start.add(256).cast::<[u8; 128]>()) };
        [&round_keys[..], &powers].concat()
    };
    for &tier in tiers() {
        let Level::Wide(wide) = tier.level() else { continue };
        let mut place = MaybeUninit::uninit();
        place.write(Context::new(wide, &[0x77; 32]));
        assert!(read(&place).iter().filter(|byte| **byte != 0).count() > 300, "{tier}");
        // SAFETY: a context was written, and is not used as one again.
        unsafe { place.assume_init_drop() };
        assert!(read(&place).iter().all(|byte| *byte == 0), "{tier}");
    }
}
