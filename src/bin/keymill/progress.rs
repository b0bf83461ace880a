//! The progress bar: on standard error, for people only.

use std::{
    fmt,
    io::{self, IsTerminal},
    thread,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::output::Output;

/// What the whole of a run is counted in.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Total {
    /// Data keys, known beforehand.
    Keys(u64),
    /// Bytes of an input file.
    Bytes(u64),
    /// Input lines of a pipe.
    Unknown,
}

/// Makes the bar; a hidden one when nobody would see it, or when it would be mixed with rows on the same terminal.
pub(crate) fn bar(total: Total, output: &Output) -> ProgressBar {
    if !io::stderr().is_terminal() || output.is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total {
        Total::Keys(keys) => (
            ProgressBar::new(keys),
            "{bar:30} {human_pos} of {human_len} keys, {rate}/s, {eta} left",
        ),
        Total::Bytes(bytes) => (
            ProgressBar::new(bytes),
            "{bar:30} {binary_bytes} of {binary_total_bytes} read, {eta} left",
        ),
        Total::Unknown => (ProgressBar::new_spinner(), "{spinner} {binary_bytes} read"),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        // indicatif's own `per_sec` has four decimals.
        bar.set_style(style.with_key("rate", |state: &ProgressState, out: &mut dyn fmt::Write| {
            let _ = write!(out, "{:.0}", state.per_sec());
        }));
    }
    // A first frame at once would flicker in the many runs that take a few milliseconds.
    // The tick is a thread's, and indicatif panics if there is none. Without it the bar moves with the work.
    let probe = thread::Builder::new().spawn(|| ());
    if probe.is_ok_and(|probe| probe.join().is_ok()) {
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}

/// A bar of so many steps of a measurement, each of which takes seconds. Hidden when nobody would see it.
#[cfg(all(feature = "bench", feature = "server"))]
pub(crate) fn steps(count: u64, what: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(count);
    let template = "{bar:30} {pos} of {len} {msg}, {elapsed} gone, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
