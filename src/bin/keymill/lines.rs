//! Reads lines in windows of bounded size from one fixed buffer, which is wiped at the end: lines may hold keys.
//!
//! A window is handed out when it is full, at the end of the input, and also when the source has nothing more at the
//! moment: a program on the other side of a pipe may send one request and wait for its answer. A line over
//! [`LINE_LEN_MAX`] is reported as such and skipped without being held.

use std::{
    io::{BufRead, Read},
    ops::Range,
    path::Path,
};

use zeroize::Zeroizing;

use crate::{
    failure::{Failure, Result},
    forms::{self, BYTE_ORDER_MARK, Form},
    input::Input,
    interrupt,
    progress::Total,
};

/// Most bytes of a line, its end not counted.
pub(crate) const LINE_LEN_MAX: usize = 64 << 10;
/// Most lines of a window: enough for the engine to fan out over many cores.
pub(crate) const WINDOW_LINES_MAX: usize = 16_384;
/// Bytes of the buffer, and so the most bytes of a window.
const BUFFER_LEN: usize = 4 << 20;

const _: () = assert!(BUFFER_LEN > 2 * LINE_LEN_MAX);

/// One line, without its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// Its bytes.
    Bytes(&'a [u8]),
    /// Longer than [`LINE_LEN_MAX`].
    TooLong,
}

/// Consecutive lines.
pub(crate) struct Window<'a> {
    buffer: &'a [u8],
    ranges: &'a [Option<Range<usize>>],
    /// The number of the first line, counted from 1.
    pub(crate) first_number: u64,
    /// Bytes of input that were read for this window.
    pub(crate) bytes_read: u64,
}

impl<'a> Window<'a> {
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = Line<'a>> + use<'a> {
        let buffer = self.buffer;
        self.ranges.iter().map(move |range| match range {
            Some(range) => Line::Bytes(&buffer[range.clone()]),
            None => Line::TooLong,
        })
    }
}

/// The lines of a source.
pub(crate) struct Lines {
    source: Box<dyn Read>,
    /// For messages.
    name: String,
    /// Always `BUFFER_LEN` bytes.
    buffer: Zeroizing<Vec<u8>>,
    /// Where the bytes begin that no line was made of yet.
    start: usize,
    /// Where the bytes end that were read.
    end: usize,
    /// The lines of the window. `None` is one that was too long.
    ranges: Vec<Option<Range<usize>>>,
    lines_before: u64,
    /// Bytes that were read before the first window.
    peeked: u64,
    /// In the middle of a line that is too long.
    skipping: bool,
    /// The source has ended.
    ended: bool,
}

impl Lines {
    /// Opens what `option` names, or standard input for `-`. Also returns what is known of its size. Reads nothing.
    pub(crate) fn open(option: &str, path: &Path) -> Result<(Self, Total)> {
        let input = Input::open(option, path)?;
        let (name, total) = (input.name().to_owned(), input.total);
        Ok((Self::new(Box::new(input), &name), total))
    }

    fn new(source: Box<dyn Read>, name: &str) -> Self {
        Self {
            source,
            name: name.to_owned(),
            buffer: Zeroizing::new(vec![0; BUFFER_LEN]),
            start: 0,
            end: 0,
            ranges: Vec::new(),
            lines_before: 0,
            peeked: 0,
            skipping: false,
            ended: false,
        }
    }

    /// The next window; `None` at the end. A last line without a line end counts.
    pub(crate) fn next_window(&mut self) -> Result<Option<Window<'_>>> {
        self.lines_before += self.ranges.len() as u64;
        self.ranges.clear();
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let peeked = std::mem::take(&mut self.peeked);
        let mut bytes_read = peeked;
        loop {
            self.cut_lines();
            if self.ranges.len() == WINDOW_LINES_MAX || self.end == BUFFER_LEN || self.ended {
                break;
            }
            // Whole lines that were looked at before have waited already.
            if peeked > 0 && !self.ranges.is_empty() && self.start == self.end {
                break;
            }
            let room = BUFFER_LEN - self.end;
            let read = self.read()?;
            bytes_read += read as u64;
            if 0 < read && read < room {
                // Nothing more at the moment: what is complete should not wait for what is not.
                self.cut_lines();
                if !self.ranges.is_empty() {
                    break;
                }
            }
        }
        if self.ranges.is_empty() {
            return Ok(None);
        }
        Ok(Some(Window {
            buffer: &self.buffer,
            ranges: &self.ranges,
            first_number: self.lines_before + 1,
            bytes_read,
        }))
    }

    /// Makes lines of what is there, up to the limit of a window. Afterwards the buffer has room, or at least one line
    /// was made.
    fn cut_lines(&mut self) {
        while self.ranges.len() < WINDOW_LINES_MAX && self.start < self.end {
            // `skip_until` searches by `memchr`.
            let mut rest = &self.buffer[self.start..self.end];
            let Ok(len) = rest.skip_until(b'\n') else { return };
            let next = self.start + len;
            if self.buffer[next - 1] == b'\n' {
                self.push(self.start..next - 1);
            } else if self.ended {
                self.push(self.start..next);
            } else {
                // The beginning of a line. What is too long already is let go, so that the buffer never fills with it.
                if len > LINE_LEN_MAX || self.skipping {
                    self.skipping = true;
                    self.end = self.start;
                }
                return;
            }
            self.start = next;
        }
        if self.ended && self.skipping && self.ranges.len() < WINDOW_LINES_MAX {
            self.push(self.start..self.start);
        }
    }

    fn push(&mut self, range: Range<usize>) {
        let fits = !self.skipping && range.len() <= LINE_LEN_MAX;
        self.ranges.push(fits.then_some(range));
        self.skipping = false;
    }

    /// Reads once. Returns the number of bytes; none at the end, which is noted.
    fn read(&mut self) -> Result<usize> {
        let read = read(&mut *self.source, &self.name, &mut self.buffer[self.end..])?;
        self.end += read;
        self.ended = read == 0;
        Ok(read)
    }

    /// What the source is by its first bytes; refuses what is known to be something else. Reads no more than it takes
    /// to see that, and nothing is lost but a mark of UTF-8.
    pub(crate) fn form(&mut self) -> Result<Form> {
        let form = loop {
            match forms::form(&self.buffer[..self.end], self.ended) {
                Some(form) => break form,
                None => self.peeked += self.read()? as u64,
            }
        };
        if let Form::Foreign(what, next) = form {
            return Err(Failure::refused(format!("{} is {what}", self.name), next));
        }
        if self.buffer[..self.end].starts_with(&BYTE_ORDER_MARK) {
            self.start = BYTE_ORDER_MARK.len();
        }
        Ok(form)
    }

    /// As `form`, for a source that can be lines alone.
    pub(crate) fn must_be_lines(&mut self) -> Result<()> {
        match self.form()? {
            Form::Arrow => Err(Failure::refused(
                format!("{} is an Arrow stream, and requests are JSON Lines", self.name),
                "write it again with one object a line; --help has an example",
            )),
            _ => Ok(()),
        }
    }

    /// Fills `out` with what comes next, lines or not, and returns how many bytes there were: fewer at the end alone.
    #[cfg(feature = "arrow")]
    pub(crate) fn take(&mut self, out: &mut [u8]) -> Result<usize> {
        let mut filled = out.len().min(self.end - self.start);
        out[..filled].copy_from_slice(&self.buffer[self.start..self.start + filled]);
        self.start += filled;
        while filled < out.len() && !self.ended {
            let read = read(&mut *self.source, &self.name, &mut out[filled..])?;
            filled += read;
            self.ended = read == 0;
        }
        Ok(filled)
    }

    /// What the source is called in messages.
    #[cfg(feature = "arrow")]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

/// Reads once. No bytes are the end.
fn read(source: &mut dyn Read, name: &str, out: &mut [u8]) -> Result<usize> {
    interrupt::check()?;
    source.read(out).map_err(|error| {
        Failure::broke(
            format!("cannot read {name}: {error}"),
            "name a file that can be read, or `-` for standard input",
        )
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// Gives at most `step` bytes at a time.
    struct Stepwise {
        bytes: Vec<u8>,
        at: usize,
        step: usize,
    }

    impl Read for Stepwise {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let len = self.step.min(out.len()).min(self.bytes.len() - self.at);
            out[..len].copy_from_slice(&self.bytes[self.at..self.at + len]);
            self.at += len;
            Ok(len)
        }
    }

    /// Every line; `None` for those that were too long.
    fn all_lines(bytes: &[u8], step: usize) -> Vec<Option<Vec<u8>>> {
        let source = Stepwise { bytes: bytes.to_vec(), at: 0, step };
        let mut lines = Lines::new(Box::new(source), "test");
        let mut all = Vec::new();
        while let Some(window) = lines.next_window().unwrap() {
            assert_eq!(window.first_number, all.len() as u64 + 1);
            all.extend(window.iter().map(|line| match line {
                Line::Bytes(bytes) => Some(bytes.to_vec()),
                Line::TooLong => None,
            }));
        }
        all
    }

    #[test]
    fn lines_are_the_same_however_the_source_gives_them() {
        let text = b"one\n\ntwo\r\n\nlast";
        let expected: Vec<_> =
            ["one", "", "two\r", "", "last"].map(|line| Some(line.as_bytes().to_vec())).into();
        for step in [1, 2, 3, 7, 100] {
            assert_eq!(all_lines(text, step), expected, "{step}");
            assert_eq!(all_lines(&[text, &b"\n"[..]].concat(), step), expected, "{step}");
        }
        assert_eq!(all_lines(b"", 10), Vec::<Option<Vec<u8>>>::new());
        assert_eq!(all_lines(b"\n", 10), [Some(Vec::new())]);
    }

    #[test]
    fn a_line_that_is_too_long_is_one_line() {
        let just = vec![b'x'; LINE_LEN_MAX];
        let over = vec![b'x'; LINE_LEN_MAX + 1];
        let huge = vec![b'x'; 3 * BUFFER_LEN + 5];
        for step in [60_000, usize::MAX] {
            for long in [&over, &huge] {
                let text = [&just[..], b"\n", long, b"\nok\n", long].concat();
                let lines = all_lines(&text, step);
                assert_eq!(
                    lines,
                    [Some(just.clone()), None, Some(b"ok".to_vec()), None],
                    "{step} {}",
                    long.len()
                );
            }
        }
    }

    #[test]
    fn many_short_lines_come_in_several_windows() {
        let text = b"a\n".repeat(3 * WINDOW_LINES_MAX + 1);
        assert_eq!(all_lines(&text, usize::MAX).len(), 3 * WINDOW_LINES_MAX + 1);
    }

    #[test]
    fn what_is_complete_does_not_wait() {
        let source = |step| Stepwise { bytes: b"one\ntwo".to_vec(), at: 0, step };
        let mut lines = Lines::new(Box::new(source(6)), "test");
        assert_eq!(lines.next_window().unwrap().unwrap().iter().len(), 1);
        // Nor when it was looked at before.
        let mut lines = Lines::new(Box::new(source(4)), "test");
        assert_eq!(lines.form().unwrap(), Form::Lines);
        assert_eq!(lines.next_window().unwrap().unwrap().iter().len(), 1);
        assert_eq!(lines.next_window().unwrap().unwrap().iter().len(), 1);
    }
}
