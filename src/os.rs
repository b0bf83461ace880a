//! The few calls to the operating system: process generation (fork mark), locked pages, fork gate, coarse clock.
//!
//! # Forks
//! A page with `MADV_WIPEONFORK` holds the process generation. The kernel hands a forked child that page zeroed; the
//! child's first look at it stores the next number. So whatever carries a number other than the current one was
//! inherited, and is abandoned: never locked (the thread that held the lock does not exist here), never used, never
//! dropped. [`PerProcess`] holds state of that kind.
//!
//! Where the kernel lacks the mark, [`can_keep_state`] is false: callers then keep no generator or wrapping state at
//! all, and the process id stands in for the generation.
//!
//! A library that cannot survive a fork in the middle of its work (SQLite) is kept still by [`fork_gate`]: users hold
//! it shared, the `pthread_atfork` handlers hold it alone while `fork` runs, after asking every [`Quiesce`] to rest.
//!
//! # Locked pages
//! [`LockedBox`] keeps long-lived secrets (KEKs, generator state) in pages that are locked in memory and left out of
//! core dumps, both as far as the system allows. A dropped box is overwritten, padding included.
#![expect(unsafe_code, reason = "memory mapping, fork handlers and clocks are system calls")]

use std::{
    cell::RefCell,
    collections::HashMap,
    mem::{self, MaybeUninit},
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use zeroize::Zeroize;

#[cfg(not(unix))]
compile_error!("keymill needs a Unix system");

/// The number of the process in the line of forks that led to it. Equal numbers within one process mean that no fork
/// lies between; numbers of siblings may be equal, which does no harm, since siblings share nothing but their parent's
/// state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Generation(u64);

impl Generation {
    /// The low bits, for packing beside a counter. Generations of one line of forks differ in them for 2^24 forks.
    pub(crate) fn low_24(self) -> u64 {
        self.0 & 0xff_ffff
    }
}

/// The wiped page, or `None` where the system has none.
static MARK: OnceLock<Option<&'static AtomicU64>> = OnceLock::new();
/// The last generation handed out; a child inherits it and goes on counting.
static LAST: AtomicU64 = AtomicU64::new(0);

/// The current process generation. Cost: one load where the mark exists, one system call elsewhere.
pub(crate) fn generation() -> Generation {
    match *MARK.get_or_init(map_mark) {
        Some(mark) => match mark.load(Ordering::Acquire) {
            0 => first_look(mark),
            number => Generation(number),
        },
        None => Generation(u64::from(std::process::id())),
    }
}

/// Whether a fork lies between the first call of this in this line of processes and now.
pub(crate) fn is_forked() -> bool {
    static FIRST: AtomicU64 = AtomicU64::new(0);
    let now = generation().0;
    match FIRST.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => false,
        Err(first) => first != now,
    }
}

/// Whether generator and wrapping states may outlive a call: true where a fork is detected.
pub(crate) fn can_keep_state() -> bool {
    MARK.get_or_init(map_mark).is_some()
}

/// The first look of a child at its wiped page. Threads of the child may race here; the first one wins.
#[cold]
fn first_look(mark: &AtomicU64) -> Generation {
    let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    match mark.compare_exchange(0, next, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Generation(next),
        Err(number) => Generation(number),
    }
}

#[cfg(target_os = "linux")]
fn map_mark() -> Option<&'static AtomicU64> {
    let page = map_pages(page_len())?;
    // Some emulators (qemu-user) answer success to every advice, even an impossible one: believe none of theirs.
    // SAFETY: `page` is a mapping of one page that nothing else knows yet; an invalid advice changes nothing.
    let (honest, wiped) = unsafe {
        let honest = libc::madvise(page.as_ptr().cast(), page_len(), -1) != 0;
        let wiped = libc::madvise(page.as_ptr().cast(), page_len(), libc::MADV_WIPEONFORK) == 0;
        (honest, wiped)
    };
    if !(honest && wiped) {
        // SAFETY: the mapping is ours, of this length, and no reference to it exists.
        unsafe { libc::munmap(page.as_ptr().cast(), page_len()) };
        return None;
    }
    // SAFETY: the page is zeroed, aligned, never unmapped from here on, and only ever accessed as this atomic.
    let mark: &'static AtomicU64 = unsafe { page.cast().as_ref() };
    first_look(mark);
    Some(mark)
}

#[cfg(not(target_os = "linux"))]
fn map_mark() -> Option<&'static AtomicU64> {
    None
}

fn page_len() -> usize {
    // SAFETY: `sysconf` only reads its argument.
    let len = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(len).unwrap_or(4096)
}

/// Maps `len` bytes of zeroed private memory, a multiple of the page length.
fn map_pages(len: usize) -> Option<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh anonymous mapping touches no existing memory.
    let address = unsafe {
        libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    if address == libc::MAP_FAILED { None } else { NonNull::new(address.cast()) }
}

/// Milliseconds of a monotonic clock with a resolution of a few milliseconds, cheap enough for every call.
pub(crate) fn coarse_ms() -> u64 {
    #[cfg(target_os = "linux")]
    const CLOCK: libc::clockid_t = libc::CLOCK_MONOTONIC_COARSE;
    #[cfg(not(target_os = "linux"))]
    const CLOCK: libc::clockid_t = libc::CLOCK_MONOTONIC;
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: `time` is a writable timespec; all-zero is one of its values, should the call fail.
    let time = unsafe {
        libc::clock_gettime(CLOCK, time.as_mut_ptr());
        time.assume_init()
    };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1000
        + u64::try_from(time.tv_nsec).unwrap_or(0) / 1_000_000
}

/// A value that belongs to one process: a child makes its own on first use and abandons the inherited one.
pub(crate) struct PerProcess<T>(ArcSwapOption<(Generation, T)>);

/// A borrowed value of a [`PerProcess`].
pub(crate) struct Current<T>(Arc<(Generation, T)>);

impl<T> Deref for Current<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.1
    }
}

impl<T> PerProcess<T> {
    pub(crate) const fn empty() -> Self {
        Self(ArcSwapOption::const_empty())
    }

    /// This process's value, made by `make` on first use. `make` is told of the inherited value, which it may read but
    /// must not lock. Two threads may both run `make`; one result is used, the other dropped.
    pub(crate) fn get_or(&self, make: impl FnOnce(Option<&T>) -> T) -> Current<T> {
        let now = generation();
        let found = self.0.load_full();
        if let Some(entry) = &found
            && entry.0 == now
        {
            return Current(Arc::clone(entry));
        }
        let made = Arc::new((now, make(found.as_ref().map(|entry| &entry.1))));
        let before = self.0.compare_and_swap(&found, Some(Arc::clone(&made)));
        let winner = match &*before {
            Some(entry) if entry.0 == now => Arc::clone(entry),
            _ => made,
        };
        // The inherited value is never dropped: its locks may be held by threads that do not exist here.
        if let Some(inherited) = found {
            mem::forget(inherited);
        }
        Current(winner)
    }

    /// This process's value, if it has made one.
    pub(crate) fn get(&self) -> Option<Current<T>> {
        self.0.load_full().filter(|entry| entry.0 == generation()).map(Current)
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        if let Some(entry) = self.0.swap(None)
            && entry.0 != generation()
        {
            mem::forget(entry);
        }
    }
}

/// Bytes of a region of locked pages; a larger box gets a region of its own.
const REGION_LEN: usize = 64 << 10;
/// Boxes are aligned to a cache line, and their sizes rounded up to it.
const SLOT_ALIGN: usize = 64;

/// Free slots by size. Addresses, since a region belongs to the slab for ever.
#[derive(Default)]
struct Slab(Mutex<HashMap<usize, Vec<usize>>>);

static SLAB: PerProcess<Slab> = PerProcess::empty();

impl Slab {
    fn take(&self, size: usize) -> NonNull<u8> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slots = free.entry(size).or_default();
        if slots.is_empty() {
            let len = size.max(REGION_LEN).next_multiple_of(page_len());
            let region = map_pages(len).expect("out of address space for locked pages");
            // Both are refused under tight limits (RLIMIT_MEMLOCK); the pages then work unlocked.
            // SAFETY: the range is the mapping just made.
            unsafe {
                libc::mlock(region.as_ptr().cast(), len);
                #[cfg(target_os = "linux")]
                libc::madvise(region.as_ptr().cast(), len, libc::MADV_DONTDUMP);
            }
            slots.extend((0..len / size).map(|slot| region.as_ptr() as usize + slot * size));
        }
        let address = slots.pop().expect("a region holds at least one slot");
        NonNull::new(ptr::with_exposed_provenance_mut(address)).expect("mappings are not at null")
    }

    fn give_back(&self, slot: NonNull<u8>, size: usize) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.entry(size).or_default().push(slot.as_ptr().expose_provenance());
    }
}

/// A long-lived secret in locked pages, overwritten on drop, padding included.
pub(crate) struct LockedBox<T> {
    place: NonNull<T>,
    home: Generation,
}

// SAFETY: a `LockedBox` owns its `T` alone, as `Box` does.
unsafe impl<T: Send> Send for LockedBox<T> {}
// SAFETY: a shared `LockedBox` gives out `&T` alone, as `Box` does.
unsafe impl<T: Sync> Sync for LockedBox<T> {}

impl<T> LockedBox<T> {
    const SIZE: usize = {
        assert!(align_of::<T>() <= SLOT_ALIGN);
        size_of::<T>().next_multiple_of(SLOT_ALIGN)
    };

    /// Moves `value` into a locked slot and overwrites the part of the stack where it may have lain.
    pub(crate) fn new(value: T) -> Self {
        const { assert!(size_of::<T>() > 0) };
        let home = generation();
        let place = SLAB.get_or(|_| Slab::default()).take(Self::SIZE).cast::<T>();
        // SAFETY: the slot is writable, `SIZE` bytes long, aligned, and ours alone.
        unsafe { place.write(value) };
        scrub_stack();
        Self { place, home }
    }
}

impl<T> Deref for LockedBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `place` holds a `T` from `new` until drop.
        unsafe { self.place.as_ref() }
    }
}

impl<T> DerefMut for LockedBox<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` makes the access unique.
        unsafe { self.place.as_mut() }
    }
}

impl<T> Drop for LockedBox<T> {
    fn drop(&mut self) {
        // SAFETY: `place` holds a `T`, dropped here once; the slot's `SIZE` bytes stay mapped and writable.
        let bytes = unsafe {
            ptr::drop_in_place(self.place.as_ptr());
            std::slice::from_raw_parts_mut(
                self.place.as_ptr().cast::<MaybeUninit<u8>>(),
                Self::SIZE,
            )
        };
        bytes.zeroize();
        // A slot of an abandoned slab is wiped and left alone.
        if self.home == generation()
            && let Some(slab) = SLAB.get()
        {
            slab.give_back(self.place.cast(), Self::SIZE);
        }
    }
}

/// Overwrites the stack below the caller's frame, where a secret that was built and moved may have left copies.
#[inline(never)]
pub(crate) fn scrub_stack() {
    let mut below = [0u8; 4096];
    below.zeroize();
    std::hint::black_box(&mut below);
}

/// Something that must rest while the process forks.
pub(crate) trait Quiesce: Send + Sync {
    /// Called in the parent, before the fork, with the fork gate held alone: bring everything into a state that a
    /// child may abandon.
    fn before_fork(&self);
}

static GATE: RwLock<()> = RwLock::new(());
static QUIESCED: Mutex<Vec<Weak<dyn Quiesce>>> = Mutex::new(Vec::new());

thread_local! {
    /// The gate, while this thread is inside `fork`.
    static HELD: RefCell<Option<RwLockWriteGuard<'static, ()>>> = const { RefCell::new(None) };
}

/// Holds off every `fork` of this process while the guard lives.
pub(crate) fn fork_gate() -> RwLockReadGuard<'static, ()> {
    GATE.read().unwrap_or_else(PoisonError::into_inner)
}

/// Registers something to be asked to rest before every fork from now on.
pub(crate) fn quiesce_before_fork(what: Weak<dyn Quiesce>) {
    static HANDLERS: OnceLock<()> = OnceLock::new();
    HANDLERS.get_or_init(|| {
        // SAFETY: the three handlers are functions of the signature that the call wants, and live for ever.
        unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(after_fork)) };
    });
    let _gate = fork_gate();
    let mut list = QUIESCED.lock().unwrap_or_else(PoisonError::into_inner);
    list.retain(|entry| entry.strong_count() > 0);
    list.push(what);
}

extern "C" fn before_fork() {
    let gate = GATE.write().unwrap_or_else(PoisonError::into_inner);
    // The list is locked only by holders of the gate, so it is free here and in the child.
    let list: Vec<_> = QUIESCED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
        .filter_map(Weak::upgrade)
        .collect();
    for what in list {
        what.before_fork();
    }
    HELD.with_borrow_mut(|held| *held = Some(gate));
}

extern "C" fn after_fork() {
    HELD.with_borrow_mut(|held| *held = None);
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Secret([u8; 100], #[expect(dead_code, reason = "makes padding")] u8);

    #[test]
    fn a_dropped_box_leaves_only_zeros() {
        let boxed = LockedBox::new(Secret([0xa5; 100], 0xa5));
        let place = boxed.place.cast::<[u8; 128]>();
        assert_eq!(boxed.0, [0xa5; 100]);
        assert_eq!(LockedBox::<Secret>::SIZE, 128);
        // SAFETY: slots are never unmapped; the size class of 128 bytes is used by this test alone.
        assert_ne!(unsafe { place.read_volatile() }, [0; 128]);
        drop(boxed);
        // SAFETY: as above.
        assert_eq!(unsafe { place.read_volatile() }, [0; 128]);
    }

    #[test]
    fn slots_are_distinct_and_reused() {
        let boxes: Vec<_> = (0..3000u64).map(|i| LockedBox::new([i; 24])).collect();
        assert!(boxes.iter().zip(0..).all(|(boxed, i)| **boxed == [i; 24]));
        let first = boxes[0].place;
        drop(boxes);
        let again: Vec<_> = (0..3000u64).map(|i| LockedBox::new([i; 24])).collect();
        assert!(again.iter().any(|boxed| boxed.place == first));
    }

    #[test]
    fn a_child_sees_another_generation_and_makes_its_own_value() {
        static VALUE: PerProcess<u64> = PerProcess::empty();
        let parent = generation();
        assert_eq!(*VALUE.get_or(|_| 1), 1);
        assert_eq!(*VALUE.get_or(|_| 2), 1);
        assert!(can_keep_state(), "this test wants a kernel with MADV_WIPEONFORK");
        // SAFETY: the child calls only functions that take no lock of another thread, then leaves by `_exit`.
        unsafe {
            match libc::fork() {
                0 => {
                    let own = VALUE.get_or(|inherited| inherited.copied().unwrap_or(0) + 40);
                    let good = generation() != parent && generation() == generation() && *own == 41;
                    libc::_exit(if good { 0 } else { 1 });
                }
                child => {
                    let mut status = 0;
                    libc::waitpid(child, &mut status, 0);
                    assert_eq!(status, 0);
                }
            }
        }
        assert_eq!(generation(), parent);
    }
}
