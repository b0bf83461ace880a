//! Prints the library's warnings, which come by the `log` facade, to standard error.

use log::{LevelFilter, Log, Metadata, Record};

use crate::failure::say;

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn && metadata.target().starts_with("keymill")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            warn(record.args());
        }
    }

    fn flush(&self) {}
}

/// Prints one warning.
pub(crate) fn warn(message: impl std::fmt::Display) {
    say(format_args!("warning: {message}"));
}

/// Routes warnings to standard error from here on.
pub(crate) fn install() {
    // The only logger of the program: setting it cannot fail, and without it a warning is lost and nothing else.
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}
