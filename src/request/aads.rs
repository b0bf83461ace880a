//! Where a batch of one key and one length finds its AADs.

use std::ops::Range;

/// The additional authenticated data of many data keys: none, one for all, or one for each.
///
/// Slices, arrays and vectors of anything that is bytes give item *i* their element *i*; [`NoAad`] and [`SameAad`] give
/// every item the same. To be implemented for whatever else can be indexed: a column of a table, say.
///
/// ```
/// use keymill::AadSource;
///
/// struct PageNumbers(Vec<[u8; 8]>);
///
/// impl AadSource for PageNumbers {
///     fn count(&self) -> Option<usize> {
///         Some(self.0.len())
///     }
///
///     fn aad(&self, index: usize) -> &[u8] {
///         &self.0[index]
///     }
/// }
/// ```
pub trait AadSource: Sync {
    /// How many items have an AAD here; `None` if any number has.
    fn count(&self) -> Option<usize>;

    /// The AAD of item `index`. The same each time it is asked for.
    fn aad(&self, index: usize) -> &[u8];

    /// The AADs of items `first`, `first + 1`, ...: a whole block for one call through a `dyn`.
    #[doc(hidden)]
    fn copy_to<'a>(&'a self, first: usize, out: &mut [&'a [u8]]) {
        for (index, out) in (first..).zip(out) {
            *out = self.aad(index);
        }
    }

    /// The longest AAD of `items`, and the bytes of all of them.
    #[doc(hidden)]
    fn measure(&self, items: Range<usize>) -> (usize, usize) {
        let (mut longest, mut total) = (0, 0);
        for index in items {
            let len = self.aad(index).len();
            longest = longest.max(len);
            total += len;
        }
        (longest, total)
    }
}

/// No AAD.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoAad;

/// One AAD for all.
#[derive(Clone, Copy, Debug)]
pub struct SameAad<A>(pub A);

impl AadSource for NoAad {
    fn count(&self) -> Option<usize> {
        None
    }

    fn aad(&self, _index: usize) -> &[u8] {
        &[]
    }
}

impl<A: AsRef<[u8]> + Sync> AadSource for SameAad<A> {
    fn count(&self) -> Option<usize> {
        None
    }

    fn aad(&self, _index: usize) -> &[u8] {
        self.0.as_ref()
    }
}

impl<A: AsRef<[u8]> + Sync> AadSource for [A] {
    fn count(&self) -> Option<usize> {
        Some(self.len())
    }

    fn aad(&self, index: usize) -> &[u8] {
        self[index].as_ref()
    }
}

impl<A: AsRef<[u8]> + Sync, const N: usize> AadSource for [A; N] {
    fn count(&self) -> Option<usize> {
        Some(N)
    }

    fn aad(&self, index: usize) -> &[u8] {
        self[index].as_ref()
    }
}

impl<A: AsRef<[u8]> + Sync> AadSource for Vec<A> {
    fn count(&self) -> Option<usize> {
        Some(self.len())
    }

    fn aad(&self, index: usize) -> &[u8] {
        self[index].as_ref()
    }
}

impl<S: AadSource + ?Sized> AadSource for &S {
    fn count(&self) -> Option<usize> {
        (**self).count()
    }

    fn aad(&self, index: usize) -> &[u8] {
        (**self).aad(index)
    }

    fn copy_to<'a>(&'a self, first: usize, out: &mut [&'a [u8]]) {
        (**self).copy_to(first, out);
    }

    fn measure(&self, items: Range<usize>) -> (usize, usize) {
        (**self).measure(items)
    }
}
