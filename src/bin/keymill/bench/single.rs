//! The job `single`: one data key a call, by alias, returned in memory of its own and dropped within the time.
//!
//! With several threads each calls in a loop of its own, and the time is that from when the first begins to when the
//! last ends, for all keys together.

use std::{
    hint::black_box,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use keymill::{DataKey, Engine, GenerateDataKeyRequest, limits::IV_LEN};

use super::{
    cases::{Case, Contender},
    engine::{self, AAD_LEN, DEK_LEN, NUMBER_OF_BYTES, alias, of_idiomatic_loop},
    loops::{IdiomaticLoop, RingLoop, Sealed, all_open},
    must_be_right,
    peers::Xaes,
    timing::{self, Times, Turn, Work},
};
use crate::failure::Result;

/// Checks the contenders of a case, then times them.
pub(super) fn measure(
    case: &Case,
    contenders: &[Contender],
    deadline: Instant,
) -> Result<Vec<Times>> {
    let kek = engine::keks(1)[0];
    let engine = engine::engine(1, &[kek])?;
    let name = alias(0);
    let aads = engine::different_aads(AADS);
    let aads = aads.as_chunks::<AAD_LEN>().0;
    for contender in contenders {
        must_be_right(is_right(*contender, &engine, &kek, aads)?, case, *contender)?;
    }
    if case.threads > 1 {
        let turn = || in_threads(case.threads, || calls(aads, |aad| one(&engine, &name, aad)));
        let mut turns: Vec<_> = contenders.iter().map(|_| -> Turn<'_> { Box::new(turn) }).collect();
        return Ok(timing::measure_turns(&mut turns, deadline));
    }
    let work = |contender: &Contender| -> Result<Work<'_, ()>> {
        Ok(match contender {
            Contender::Engine => Box::new(|()| calls(aads, |aad| one(&engine, &name, aad))),
            Contender::IdiomaticLoop => {
                let mut each = IdiomaticLoop::new(&kek)?;
                Box::new(move |()| calls(aads, |aad| each.make_one(DEK_LEN, aad)))
            }
            _ => {
                let mut each = RingLoop::new(&[kek])?;
                Box::new(move |()| calls(aads, |aad| each.make_one(DEK_LEN, aad)))
            }
        })
    };
    let mut works = contenders.iter().map(work).collect::<Result<Vec<_>>>()?;
    Ok(timing::measure(&mut works, &mut (), AADS, deadline))
}

/// A call of the engine.
pub(super) fn one(engine: &Engine, name: &str, aad: &[u8]) -> DataKey {
    let request = GenerateDataKeyRequest::new(name, NUMBER_OF_BYTES).aad(aad);
    engine.generate_data_key(&request).expect("it can be made")
}

/// A call for each AAD, whose result is dropped before the next.
fn calls<K>(aads: &[[u8; AAD_LEN]], mut call: impl FnMut(&[u8]) -> K) {
    for aad in aads {
        black_box(call(aad));
    }
}

/// What a contender makes of `aads` opens as it should.
fn is_right(
    contender: Contender,
    engine: &Engine,
    kek: &[u8; 32],
    aads: &[[u8; AAD_LEN]],
) -> Result<bool> {
    let all = || aads.iter().map(|aad| &aad[..]);
    Ok(match contender {
        Contender::Engine => {
            let made: Vec<_> = all().map(|aad| one(engine, &alias(0), aad)).collect();
            all_open(made.iter().zip(all()).map(|(made, aad)| of_engine(made, kek, aad)))
        }
        Contender::IdiomaticLoop => {
            let made = IdiomaticLoop::new(kek)?.make(DEK_LEN, aads);
            all_open(made.iter().zip(all()).map(|(made, aad)| of_idiomatic_loop(made, kek, aad)))
        }
        _ => {
            let mut each = RingLoop::new(&[*kek])?;
            let made: Vec<_> = all().map(|aad| each.make_one(DEK_LEN, aad)).collect();
            all_open(made.iter().zip(all()).map(|(made, aad)| of_ring_loop(made, kek, aad)))
        }
    })
}

pub(super) fn of_engine<'a>(made: &'a DataKey, kek: &[u8; 32], aad: &'a [u8]) -> Sealed<'a> {
    let (salt, sealed) = made.ciphertext_blob().split_first_chunk().expect("a blob has a salt");
    let dek = made.plaintext().expect("asked for").expose();
    Sealed { key: Xaes::new(kek).derive(salt), iv: *made.iv(), aad, sealed, dek }
}

pub(super) fn of_ring_loop<'a>(
    (dek, blob): &'a (Vec<u8>, Vec<u8>),
    kek: &[u8; 32],
    aad: &'a [u8],
) -> Sealed<'a> {
    let (iv, sealed) = blob.split_first_chunk::<IV_LEN>().expect("a blob begins with its IV");
    Sealed { key: *kek, iv: *iv, aad, sealed, dek }
}

/// Does `calls`, which makes [`AADS`] keys, several times in each of so many threads. Returns the time and the keys.
fn in_threads(threads: usize, calls: impl Fn() + Sync) -> (Duration, usize) {
    let ready = AtomicUsize::new(0);
    let thread = || {
        // Untimed: a new thread has neither random bytes nor a wrapping state.
        calls();
        ready.fetch_add(1, Ordering::SeqCst);
        // Not a barrier that sleeps: waking up would take as long as a part of the calls.
        while ready.load(Ordering::SeqCst) < threads {
            thread::yield_now();
        }
        let start = Instant::now();
        (0..CALLS_A_TURN).for_each(|_| calls());
        (start, Instant::now())
    };
    let times: Vec<_> = thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(thread)).collect();
        all.into_iter().map(|one| one.join().expect("no call panics")).collect()
    });
    let start = times.iter().map(|(start, _)| *start).min().expect("threads");
    let end = times.iter().map(|(_, end)| *end).max().expect("threads");
    (end - start, threads * CALLS_A_TURN * AADS)
}

/// AADs that calls go through, one after the other.
const AADS: usize = 1024;
/// So often a thread goes through them in a turn, which then is a few times as long as threads need to begin together.
const CALLS_A_TURN: usize = 16;
