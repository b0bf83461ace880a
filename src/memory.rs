//! The memory of batch results: three columns that every view of a batch shares, and their way back to the engine.
//!
//! Mapping new pages costs more than the cryptography that fills them. So columns go back to the engine's [`Recycler`]
//! when the last view of a batch is gone, data keys zeroed, and serve the next batch. Large ones ask for huge pages
//! when they are made. The recycler is bounded in number and bytes; what does not fit is freed.
//!
//! A recycler belongs to one process. A child that drops an inherited batch wipes and frees its copy of the memory, and
//! abandons the recycler, into which another thread of the parent may have been in the middle of writing.

use std::{
    mem,
    ops::{Deref, DerefMut},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use crossbeam::queue::ArrayQueue;
use zeroize::Zeroize;

use crate::{
    error::{Error, ErrorKind, Result},
    limits::RECYCLED_BATCHES_MAX,
    os::{self, Generation},
};

/// The columns of one batch: data keys, IVs, blobs.
#[derive(Default)]
pub(crate) struct Columns {
    /// Empty for operations without plaintext. Behind its length there are only zeros.
    pub(crate) deks: Column,
    pub(crate) ivs: Column,
    pub(crate) blobs: Column,
}

/// Bytes that were written before, of which a batch uses the first.
#[derive(Default)]
pub(crate) struct Column {
    bytes: Vec<u8>,
    len: usize,
}

/// Bytes of each column.
#[derive(Clone, Copy, Default)]
pub(crate) struct ColumnLens {
    pub(crate) deks: usize,
    pub(crate) ivs: usize,
    pub(crate) blobs: usize,
}

/// Columns that a batch and its views share. When the last of them is gone the data keys are zeroed, and the columns go
/// back to where they came from.
pub(crate) struct Memory {
    columns: Columns,
    home: Option<Arc<Recycler>>,
}

/// Columns that wait for the next batch.
pub(crate) struct Recycler {
    waiting: ArrayQueue<Columns>,
    /// Bytes of everything that waits.
    bytes: AtomicUsize,
    bytes_max: usize,
    home: Generation,
}

impl Column {
    /// # Errors
    /// `Machine` if the allocator refuses, so that an over-large batch is an error and not an abort. The column is then
    /// empty.
    fn resize(&mut self, len: usize) -> Result<()> {
        self.len = 0;
        if len > self.bytes.capacity() {
            // Not grown in place, which would copy what nobody wants.
            self.bytes = Vec::new();
            self.bytes.try_reserve_exact(len).map_err(|_| {
                Error::new(ErrorKind::Machine, format!("The allocator refused {len} bytes."))
            })?;
            os::want_huge_pages(self.bytes.spare_capacity_mut());
        }
        if len > self.bytes.len() {
            self.bytes.resize(len, 0);
        }
        self.len = len;
        Ok(())
    }

    /// Zeroes the bytes from `from` on.
    fn wipe(&mut self, from: usize) {
        if from < self.len {
            self.bytes[from..self.len].zeroize();
        }
    }
}

impl Deref for Column {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Column {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Columns {
    /// Gives every column its length. What was in them is overwritten by the caller, or stays from an earlier batch;
    /// data keys beyond the new length are zeroed.
    ///
    /// # Errors
    /// `Machine` if the allocator refuses. Data keys are zeroed then.
    fn resize(&mut self, lens: ColumnLens) -> Result<()> {
        // All of them if they are about to be freed, to make room for a larger column.
        let kept = if lens.deks > self.deks.bytes.capacity() { 0 } else { lens.deks };
        self.deks.wipe(kept);
        self.deks.resize(lens.deks)?;
        let others = self.ivs.resize(lens.ivs).and_then(|()| self.blobs.resize(lens.blobs));
        if others.is_err() {
            self.deks.wipe(0);
        }
        others
    }

    fn capacity(&self) -> usize {
        [&self.deks, &self.ivs, &self.blobs].map(|column| column.bytes.capacity()).iter().sum()
    }
}

impl Memory {
    /// No memory yet.
    pub(crate) fn empty() -> Self {
        Self { columns: Columns::default(), home: None }
    }

    /// Columns of these lengths, from `home` if some wait there. Their contents are those of earlier batches or zeros;
    /// data keys of earlier batches are never among them.
    ///
    /// # Errors
    /// `Machine` if the allocator refuses.
    pub(crate) fn take(home: &Arc<Recycler>, lens: ColumnLens) -> Result<Self> {
        let columns = home.take().unwrap_or_default();
        let mut memory = Self { columns, home: Some(Arc::clone(home)) };
        memory.columns.resize(lens)?;
        Ok(memory)
    }

    /// Gives the columns of a batch that is made anew in place their lengths. Data keys within the new length stay,
    /// for the caller to overwrite.
    ///
    /// # Errors
    /// `Machine` if the allocator refuses.
    pub(crate) fn resize(&mut self, lens: ColumnLens) -> Result<()> {
        self.columns.resize(lens)
    }

    /// Whether the columns go back to `home`.
    pub(crate) fn is_of(&self, home: &Arc<Recycler>) -> bool {
        self.home.as_ref().is_some_and(|own| Arc::ptr_eq(own, home))
    }

    pub(crate) fn columns(&self) -> &Columns {
        &self.columns
    }

    pub(crate) fn columns_mut(&mut self) -> &mut Columns {
        &mut self.columns
    }

    /// The blobs, as memory that can be shared without naming keymill.
    pub(crate) fn blobs(self: &Arc<Self>) -> Bytes {
        struct Blobs(Arc<Memory>);
        impl AsRef<[u8]> for Blobs {
            fn as_ref(&self) -> &[u8] {
                &self.0.columns.blobs
            }
        }
        Bytes::from_owner(Blobs(Arc::clone(self)))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.columns.deks.wipe(0);
        match self.home.take() {
            Some(home) if home.home == os::generation() => home.give(mem::take(&mut self.columns)),
            // Never dropped: see above.
            Some(inherited) => mem::forget(inherited),
            None => {}
        }
    }
}

impl Recycler {
    /// Keeps at most `bytes_max` bytes.
    pub(crate) fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            waiting: ArrayQueue::new(RECYCLED_BATCHES_MAX),
            bytes: AtomicUsize::new(0),
            bytes_max,
            home: os::generation(),
        })
    }

    fn take(&self) -> Option<Columns> {
        let columns = self.waiting.pop()?;
        self.bytes.fetch_sub(columns.capacity(), Ordering::Relaxed);
        Some(columns)
    }

    /// Keeps `columns`, whose data keys are zeros, or frees them where there is no room.
    fn give(&self, columns: Columns) {
        let bytes = columns.capacity();
        // Where forks cannot be told, a child could meet what a thread of its parent was writing.
        if bytes == 0 || !os::can_keep_state() {
            return;
        }
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > self.bytes_max || self.waiting.push(columns).is_err() {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes that wait for the next batch.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENS: ColumnLens = ColumnLens { deks: 320, ivs: 120, blobs: 600 };

    #[test]
    fn columns_come_back_with_their_keys_zeroed() {
        let home = Recycler::new(1 << 20);
        let mut memory = Memory::take(&home, LENS).unwrap();
        memory.columns_mut().deks.fill(0xa5);
        let place = memory.columns().deks.as_ptr();
        let view = Arc::new(memory);
        let blobs = view.blobs();
        drop(view);
        assert_eq!(home.waiting_bytes(), 0, "a view is left");
        drop(blobs);
        assert!(home.waiting_bytes() >= 1040);
        let again = Memory::take(&home, LENS).unwrap();
        assert_eq!(again.columns().deks.as_ptr(), place);
        assert_eq!(again.columns().deks[..], [0; 320]);
        assert_eq!(home.waiting_bytes(), 0);
    }

    #[test]
    fn a_shorter_batch_leaves_no_keys_behind_its_end() {
        let home = Recycler::new(1 << 20);
        let mut memory = Memory::take(&home, LENS).unwrap();
        memory.columns_mut().deks.fill(0xa5);
        memory.resize(ColumnLens { deks: 32, ..LENS }).unwrap();
        memory.resize(LENS).unwrap();
        assert_eq!(memory.columns().deks[..32], [0xa5; 32], "for the caller to overwrite");
        assert_eq!(memory.columns().deks[32..], [0; 288]);
    }

    #[test]
    fn what_waits_is_bounded_in_bytes_and_number() {
        let home = Recycler::new(4 * 1040);
        let make = |count: usize| -> Vec<_> {
            (0..count).map(|_| Memory::take(&home, LENS).unwrap()).collect()
        };
        drop(make(3 * RECYCLED_BATCHES_MAX));
        assert!((1040..=4 * 1040).contains(&home.waiting_bytes()));
        let roomy = Recycler::new(usize::MAX / 2);
        let all: Vec<_> =
            (0..3 * RECYCLED_BATCHES_MAX).map(|_| Memory::take(&roomy, LENS).unwrap()).collect();
        drop(all);
        assert_eq!(roomy.waiting.len(), RECYCLED_BATCHES_MAX);
        let large = ColumnLens { deks: 1 << 16, ..LENS };
        let none = Recycler::new(1000);
        drop(Memory::take(&none, large).unwrap());
        assert_eq!(none.waiting_bytes(), 0);
    }
}
