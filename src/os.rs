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

#[cfg(feature = "server")]
pub(crate) mod descriptors;
pub(crate) mod files;
#[cfg(feature = "cli")]
pub mod standard;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    mem::{self, MaybeUninit},
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
    sync::{
        Arc, LazyLock, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use zeroize::{Zeroize, zeroize_stack};

use crate::error::{Error, ErrorKind, Result};
#[cfg(target_os = "linux")]
use crate::limits::HUGE_PAGES_MIN;

#[cfg(not(unix))]
compile_error!("keymill needs a Unix system");

/// The number of the process in the line of forks that led to it. Equal numbers within one process mean that no fork
/// lies between; numbers of siblings may be equal, which does no harm, since siblings share nothing but their parent's
/// state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Generation(u64);

impl Generation {
    /// The number itself, for atomics.
    pub(crate) fn number(self) -> u64 {
        self.0
    }

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
        None => {
            // Process ids alone repeat in nested PID namespaces; forks are counted by their handler.
            let forks = LAST.load(Ordering::Relaxed);
            Generation(forks << 32 | u64::from(std::process::id()))
        }
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
    #[cfg(test)]
    if tests::NO_MARK.get() {
        return false;
    }
    MARK.get_or_init(map_mark).is_some()
}

/// The first look of a child at its wiped page. Threads of the child may race here; the first one wins.
#[cold]
fn first_look(mark: &AtomicU64) -> Generation {
    let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    match mark.compare_exchange(0, next, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            lock_inherited_pages();
            Generation(next)
        }
        Err(number) => Generation(number),
    }
}

#[cfg(target_os = "linux")]
fn map_mark() -> Option<&'static AtomicU64> {
    let Some(page) = map_pages(page_len()) else {
        count_forks();
        return None;
    };
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
        count_forks();
        return None;
    }
    // SAFETY: the page is zeroed, aligned, never unmapped from here on, and only ever accessed as this atomic.
    let mark: &'static AtomicU64 = unsafe { page.cast().as_ref() };
    first_look(mark);
    Some(mark)
}

#[cfg(not(target_os = "linux"))]
fn map_mark() -> Option<&'static AtomicU64> {
    count_forks();
    None
}

fn page_len() -> usize {
    // SAFETY: `sysconf` only reads its argument.
    let len = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(len).unwrap_or(4096)
}

/// Marks forks where no page does it for us. A clone without handlers is then told by its process id alone.
fn count_forks() {
    extern "C" fn count() {
        LAST.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler is a function of the signature that the call wants, and lives for ever.
    let refused = unsafe { libc::pthread_atfork(None, None, Some(count)) };
    if refused != 0 {
        log::warn!("the system refused a fork handler (error {refused})");
    }
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

/// Asks for huge pages under large memory that is about to be written for the first time. Advice: nothing depends on
/// it.
pub(crate) fn want_huge_pages(memory: &mut [MaybeUninit<u8>]) {
    #[cfg(target_os = "linux")]
    if memory.len() >= HUGE_PAGES_MIN {
        // Whole pages within the memory.
        let skipped = memory.as_ptr().align_offset(page_len());
        let len = memory.len().saturating_sub(skipped) / page_len() * page_len();
        if let Some(pages) = memory.get_mut(skipped..skipped + len) {
            // SAFETY: the range is whole pages of memory that `memory` borrows; the advice changes no contents.
            unsafe { libc::madvise(pages.as_mut_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// The same unit for a time that is compared with [`coarse_ms`].
#[cfg(feature = "server")]
pub(crate) fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
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

/// A small number of this thread, for spreading threads over slots. Threads that have ended had theirs alone.
pub(crate) fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<Option<usize>> = const { Cell::new(None) };
    }
    NUMBER.get().unwrap_or_else(|| {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        NUMBER.set(Some(number));
        number
    })
}

/// The process, the time and the thread of a call: what the states that outlive a call are looked for with.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) generation: Generation,
    /// As [`coarse_ms`].
    pub(crate) ms: u64,
    /// As [`thread_number`].
    pub(crate) thread: usize,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { generation: generation(), ms: coarse_ms(), thread: thread_number() }
    }

    /// Always the same in one process.
    pub(crate) fn fixed() -> Self {
        Self { generation: generation(), ms: 0, thread: 0 }
    }
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

/// Every region of every slab of this line of forks, as (address, length). A child inherits the mappings but not their
/// locks.
static REGIONS: LazyLock<ArcSwap<Vec<(usize, usize)>>> = LazyLock::new(ArcSwap::default);

fn lock_inherited_pages() {
    for (address, len) in REGIONS.load().iter() {
        lock_pages(ptr::with_exposed_provenance(*address), *len);
    }
}

/// Keeps pages out of swap. Tight limits (RLIMIT_MEMLOCK) refuse it; the pages then work unlocked.
fn lock_pages(start: *const u8, len: usize) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    // SAFETY: locking changes no memory; the range is a mapping of ours that is never unmapped.
    let refused = unsafe { libc::mlock(start.cast(), len) } != 0;
    if refused && !WARNED.swap(true, Ordering::Relaxed) {
        log::warn!("the system refused to lock memory; KEKs may be swapped out (RLIMIT_MEMLOCK)");
    }
}

/// Maps a region of locked pages and cuts it into slots.
///
/// # Errors
/// `Machine` if there is no memory.
fn new_region(size: usize) -> Result<Vec<usize>> {
    let len = size.max(REGION_LEN).next_multiple_of(page_len());
    let region = map_pages(len).ok_or_else(|| {
        Error::new(ErrorKind::Machine, "The system gave no memory for locked pages.")
    })?;
    lock_pages(region.as_ptr(), len);
    #[cfg(target_os = "linux")]
    // SAFETY: the range is the mapping just made; the advice changes no memory.
    unsafe {
        libc::madvise(region.as_ptr().cast(), len, libc::MADV_DONTDUMP);
    }
    let start = region.as_ptr().expose_provenance();
    REGIONS.rcu(|known| known.iter().copied().chain([(start, len)]).collect::<Vec<_>>());
    Ok((0..len / size).map(|slot| start + slot * size).collect())
}

impl Slab {
    /// # Errors
    /// `Machine` if there is no memory.
    fn take(&self, size: usize) -> Result<NonNull<u8>> {
        let free = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slot = free().entry(size).or_default().pop();
        if slot.is_none() {
            // Without the lock: a logger may be called, and it may be anybody's code.
            let mut slots = new_region(size)?;
            slot = slots.pop();
            free().entry(size).or_default().append(&mut slots);
        }
        let address = slot.expect("a region holds at least one slot");
        Ok(NonNull::new(ptr::with_exposed_provenance_mut(address)).expect("not at null"))
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

    /// Makes a value and moves it into a locked slot, then overwrites the part of the stack where it was made.
    ///
    /// # Errors
    /// `Machine` if there is no memory.
    pub(crate) fn new_with(make: impl FnOnce() -> T) -> Result<Self> {
        const { assert!(size_of::<T>() > 0) };
        let home = generation();
        let place = SLAB.get_or(|_| Slab::default()).take(Self::SIZE)?.cast::<T>();
        build(place, make);
        zeroize_stack::<STACK_LEN>();
        Ok(Self { place, home })
    }
}

/// More stack than the set-up of any key uses.
const STACK_LEN: usize = 8192;

/// A frame of its own below that of `new_with`, so that the whole of it is overwritten afterwards.
#[inline(never)]
fn build<T>(place: NonNull<T>, make: impl FnOnce() -> T) {
    // SAFETY: the slot is writable, long enough, aligned, and ours alone.
    unsafe { place.write(make()) };
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

/// Something that must rest while the process forks.
pub(crate) trait Quiesce: Send + Sync {
    /// Called in the parent, before the fork, with the fork gate held alone: bring everything into a state that a
    /// child may abandon.
    fn before_fork(&self);
}

static GATE: RwLock<()> = RwLock::new(());
static QUIESCED: Mutex<Vec<Weak<dyn Quiesce>>> = Mutex::new(Vec::new());

thread_local! {
    /// What this thread holds while it is inside `fork`. Dropped in this order: the gate opens first.
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

type Held = (RwLockWriteGuard<'static, ()>, Vec<Arc<dyn Quiesce>>);

/// Holds off every `fork` of this process while the guard lives. A thread must not take it twice.
pub(crate) fn fork_gate() -> RwLockReadGuard<'static, ()> {
    GATE.read().unwrap_or_else(PoisonError::into_inner)
}

/// Registers something to be asked to rest before every fork from now on.
///
/// # Errors
/// `Machine` if the system refuses fork handlers.
pub(crate) fn quiesce_before_fork(what: Weak<dyn Quiesce>) -> Result<()> {
    static REFUSED: OnceLock<libc::c_int> = OnceLock::new();
    let refused = *REFUSED.get_or_init(|| {
        // SAFETY: the three handlers are functions of the signature that the call wants, and live for ever.
        unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(after_fork)) }
    });
    if refused != 0 {
        return Err(Error::new(
            ErrorKind::Machine,
            format!("The system refused fork handlers (error {refused})."),
        ));
    }
    let _gate = fork_gate();
    let mut list = QUIESCED.lock().unwrap_or_else(PoisonError::into_inner);
    list.retain(|entry| entry.strong_count() > 0);
    list.push(what);
    Ok(())
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
    for what in &list {
        what.before_fork();
    }
    // A thread that forks while it is torn down has no such place any more: the gate opens too early then, and what
    // rests may wake before the fork. Nothing better is left to do there.
    let _ = HELD.try_with(|held| held.replace(Some((gate, list))));
}

extern "C" fn after_fork() {
    // Opened here, dropped outside: what drops last may want the gate for itself.
    if let Ok(Some((gate, list))) = HELD.try_with(RefCell::take) {
        drop(gate);
        drop(list);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    thread_local! {
        /// Whether this thread plays a system without the mark.
        pub(crate) static NO_MARK: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs `work` as on a system that cannot tell a fork.
    pub(crate) fn without_mark(work: impl FnOnce()) {
        NO_MARK.set(true);
        work();
        NO_MARK.set(false);
    }

    struct Secret([u8; 100], #[expect(dead_code, reason = "makes padding")] u8);

    #[test]
    fn a_dropped_box_leaves_only_zeros() {
        let boxed = LockedBox::new_with(|| Secret([0xa5; 100], 0xa5)).unwrap();
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
        let boxes: Vec<_> =
            (0..3000u64).map(|i| LockedBox::new_with(|| [i; 24]).unwrap()).collect();
        assert!(boxes.iter().zip(0..).all(|(boxed, i)| **boxed == [i; 24]));
        let first = boxes[0].place;
        drop(boxes);
        let again: Vec<_> =
            (0..3000u64).map(|i| LockedBox::new_with(|| [i; 24]).unwrap()).collect();
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
