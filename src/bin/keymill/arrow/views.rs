//! Views of a record batch's columns in the bytes of its message.
//!
//! Read here, and not by Arrow's own reader, because lengths and positions come from whoever wrote the file: Arrow's
//! slices panic on some of them, and its copies of a data key are not wiped. Every position is checked before it is
//! used; nothing is copied.

use std::rc::Rc;

use arrow_ipc::{FieldNode, RecordBatch};

use super::Field;

/// A refusal: what is wrong, as the end of a sentence.
pub(super) type Checked<T> = Result<T, String>;

/// How the values of a column lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// All null, and no bytes at all.
    Null,
    /// With offsets of 4 bytes: Binary, Utf8.
    Small,
    /// With offsets of 8 bytes: LargeBinary, LargeUtf8.
    Large,
    /// So many bytes each: FixedSizeBinary.
    Fixed(usize),
    /// With views of 16 bytes, each of which holds a short value or says where a long one lies: BinaryView, Utf8View.
    Views,
}

/// Bytes of a view: the length, and either up to 12 bytes of the value, or its first 4, the number of a buffer, and the
/// offset there.
const VIEW_LEN: usize = 16;
/// Most bytes of a value that lies in its view.
const INLINE_LEN_MAX: usize = 12;

/// The values of a column.
#[derive(Clone)]
pub(super) struct View<'a> {
    /// A bit for each row; `None` if none is null.
    valid: Option<&'a [u8]>,
    layout: Layout,
    offsets: &'a [u8],
    values: &'a [u8],
    /// Where the long values of `Layout::Views` lie.
    more: Rc<[&'a [u8]]>,
}

impl<'a> View<'a> {
    /// The value of a row of the batch.
    pub(super) fn get(&self, row: usize) -> Option<&'a [u8]> {
        if !is_valid(self.valid, row) {
            return None;
        }
        // Within bounds, which `Parts` has checked.
        let range = match self.layout {
            Layout::Null => return None,
            Layout::Fixed(width) => row * width..(row + 1) * width,
            Layout::Small => small(self.offsets, row)..small(self.offsets, row + 1),
            Layout::Large => large(self.offsets, row)..large(self.offsets, row + 1),
            Layout::Views => return self.viewed(row),
        };
        Some(&self.values[range])
    }

    /// The value of a view; `None` if it lies nowhere.
    fn viewed(&self, row: usize) -> Option<&'a [u8]> {
        let view = self.values.get(row * VIEW_LEN..)?.get(..VIEW_LEN)?;
        let number = |at: usize| small(&view[at..at + 4], 0);
        let len = number(0);
        if len <= INLINE_LEN_MAX {
            return Some(&view[4..4 + len]);
        }
        let offset = number(12);
        self.more.get(number(8))?.get(offset..offset.checked_add(len)?)
    }
}

/// Which rows of a struct are not null.
#[derive(Clone, Copy)]
pub(super) struct Validity<'a> {
    valid: Option<&'a [u8]>,
}

impl Validity<'_> {
    pub(super) fn get(&self, row: usize) -> bool {
        is_valid(self.valid, row)
    }
}

/// The parts of a record batch, taken in the order of its schema.
pub(super) struct Parts<'a> {
    body: &'a [u8],
    rows: usize,
    nodes: std::vec::IntoIter<FieldNode>,
    buffers: std::vec::IntoIter<&'a [u8]>,
    /// How many buffers the long values of each column of views have.
    more: std::vec::IntoIter<i64>,
}

impl<'a> Parts<'a> {
    /// # Errors
    /// For a batch without columns, with compressed buffers, or with any outside of `body`.
    pub(super) fn new(batch: RecordBatch<'_>, body: &'a [u8]) -> Checked<Self> {
        if batch.compression().is_some() {
            return Err("its buffers are compressed; write it without compression".into());
        }
        let rows = usize::try_from(batch.length());
        let rows = rows.map_err(|_| format!("a record batch has {} rows", batch.length()))?;
        let (Some(nodes), Some(buffers)) = (batch.nodes(), batch.buffers()) else {
            return Err("a record batch has no columns".into());
        };
        let part = |(at, len): (i64, i64)| {
            let (at, len) = (usize::try_from(at).ok()?, usize::try_from(len).ok()?);
            body.get(at..at.checked_add(len)?)
        };
        let buffers: Option<Vec<_>> =
            buffers.iter().map(|buffer| part((buffer.offset(), buffer.length()))).collect();
        let outside = || "a buffer lies outside of its message".to_owned();
        let nodes = nodes.iter().copied().collect::<Vec<_>>().into_iter();
        let more: Vec<_> = batch.variadicBufferCounts().into_iter().flatten().collect();
        let buffers = buffers.ok_or_else(outside)?.into_iter();
        Ok(Self { body, rows, nodes, buffers, more: more.into_iter() })
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// The next column.
    pub(super) fn column(&mut self, field: Field, layout: Layout) -> Checked<View<'a>> {
        let name = field.name();
        let (offsets, values): (&[u8], &[u8]) = (&[], &[]);
        if layout == Layout::Null {
            self.nothing(name)?;
            return Ok(View { valid: None, layout, offsets, values, more: Rc::default() });
        }
        let valid = self.validity(name)?.valid;
        let offsets = match layout {
            Layout::Small | Layout::Large => self.buffer(name)?,
            _ => offsets,
        };
        let values = self.buffer(name)?;
        let more = match layout {
            Layout::Views => self.more(name)?,
            _ => Rc::default(),
        };
        let view = View { valid, layout, offsets, values, more };
        self.check(&view).map_err(|what| format!("column {name} {what}"))?;
        // A batch without rows may have no offsets at all; then nothing is ever read.
        Ok(view)
    }

    /// The buffers of the long values of the next column of views.
    fn more(&mut self, name: &str) -> Checked<Rc<[&'a [u8]]>> {
        let count = self.more.next().and_then(|count| usize::try_from(count).ok());
        let count = count.filter(|count| *count <= self.buffers.len());
        let count = count.ok_or_else(|| format!("column {name} lacks its number of buffers"))?;
        Ok(self.buffers.by_ref().take(count).collect())
    }

    /// The next column, if it has no type.
    pub(super) fn nothing(&mut self, name: &str) -> Checked<()> {
        self.node(name).map(drop)
    }

    /// The next column's own part, if it is a struct. Its members are the columns after it.
    pub(super) fn validity(&mut self, name: &str) -> Checked<Validity<'a>> {
        let nulls = self.node(name)?;
        let bits = self.buffer(name)?;
        if nulls == 0 {
            return Ok(Validity { valid: None });
        }
        if bits.len() < self.rows.div_ceil(8) {
            return Err(format!("column {name} has {} validity bytes", bits.len()));
        }
        let valid = Validity { valid: Some(bits) };
        let found = (0..self.rows).filter(|row| !valid.get(*row)).count();
        if found != nulls {
            return Err(format!("column {name} has {found} nulls, and declares {nulls}"));
        }
        Ok(valid)
    }

    /// # Errors
    /// If the batch has more than its schema says.
    pub(super) fn end(mut self) -> Checked<()> {
        match (self.nodes.next(), self.buffers.next()) {
            (None, None) => Ok(()),
            _ => Err("a record batch has more columns than the schema".into()),
        }
    }

    /// The number of nulls of the next column.
    fn node(&mut self, name: &str) -> Checked<usize> {
        let node = self.nodes.next().ok_or_else(|| format!("a batch has no column {name}"))?;
        if usize::try_from(node.length()) != Ok(self.rows) {
            let (len, rows) = (node.length(), self.rows);
            return Err(format!("column {name} has {len} values for {rows} rows"));
        }
        match usize::try_from(node.null_count()) {
            Ok(nulls) if nulls <= self.rows => Ok(nulls),
            _ => Err(format!("column {name} declares {} nulls", node.null_count())),
        }
    }

    fn buffer(&mut self, name: &str) -> Checked<&'a [u8]> {
        self.buffers.next().ok_or_else(|| format!("column {name} lacks a buffer"))
    }

    /// Whether every value lies within the bytes.
    fn check(&self, view: &View<'_>) -> Checked<()> {
        let (rows, len) = (self.rows, view.values.len());
        debug_assert!(len <= self.body.len());
        let width = match view.layout {
            Layout::Null => return Ok(()),
            Layout::Fixed(width) => {
                return match rows.checked_mul(width).is_some_and(|needed| needed <= len) {
                    true => Ok(()),
                    false => Err(format!("has {len} bytes for {rows} values of {width}")),
                };
            }
            Layout::Views => return check_views(view, rows),
            Layout::Small => 4,
            Layout::Large => 8,
        };
        if rows == 0 {
            return Ok(());
        }
        let count = rows.checked_add(1);
        if count.and_then(|count| count.checked_mul(width)).is_none_or(|n| n > view.offsets.len()) {
            return Err(format!("has {} bytes of offsets for {rows} rows", view.offsets.len()));
        }
        let at = |index| match view.layout {
            Layout::Small => small(view.offsets, index),
            _ => large(view.offsets, index),
        };
        let mut last = at(0);
        for index in 1..=rows {
            let next = at(index);
            if next < last {
                return Err("has offsets that go backwards".into());
            }
            last = next;
        }
        if last > len {
            return Err(format!("has values that end at byte {last} of {len}"));
        }
        Ok(())
    }
}

/// Whether there is a view for each row, and every value that is not null lies within its buffer.
fn check_views(view: &View<'_>, rows: usize) -> Checked<()> {
    if rows.checked_mul(VIEW_LEN).is_none_or(|needed| needed > view.values.len()) {
        return Err(format!("has {} bytes of views for {rows} rows", view.values.len()));
    }
    match (0..rows).find(|row| is_valid(view.valid, *row) && view.viewed(*row).is_none()) {
        Some(row) => Err(format!("has a value, in row {row} of a batch, outside of its buffers")),
        None => Ok(()),
    }
}

fn is_valid(bits: Option<&[u8]>, row: usize) -> bool {
    bits.is_none_or(|bits| bits[row / 8] >> (row % 8) & 1 == 1)
}

/// Offset `index`. A negative one is beyond every value.
fn small(offsets: &[u8], index: usize) -> usize {
    let bytes = offsets[4 * index..][..4].try_into().expect("4 bytes");
    usize::try_from(i32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
}

fn large(offsets: &[u8], index: usize) -> usize {
    let bytes = offsets[8 * index..][..8].try_into().expect("8 bytes");
    usize::try_from(i64::from_le_bytes(bytes)).unwrap_or(usize::MAX)
}
