//! What streaming commands share: the rows, the progress bar, and the count of refusals that decides how a run ends.

use indicatif::ProgressBar;
use keymill::{Error, ErrorKind, RequestId};

use crate::{
    failure::{Failure, Result, Status, hint},
    output::Output,
    progress::{self, Total},
    rows::{Fields, Format, Row, Rows},
};

/// A run of a streaming command.
pub(crate) struct Stream {
    pub(crate) rows: Rows,
    pub(crate) progress: ProgressBar,
    total: u64,
    refused: u64,
    /// The refusal that is reported at the end: the first of the gravest status.
    reported: Option<Refusal>,
    /// Whether every refusal reads the same.
    same: bool,
}

struct Refusal {
    status: Status,
    number: u64,
    message: String,
    hint: &'static str,
}

impl Stream {
    pub(crate) fn new(format: Format, fields: Fields, out: Output, total: Total) -> Result<Self> {
        let progress = progress::bar(total, &out);
        let rows = Rows::new(format, fields, out)?;
        Ok(Self { rows, progress, total: 0, refused: 0, reported: None, same: true })
    }

    /// Counts the row of an item that was made.
    pub(crate) fn made<'a>(&mut self, row: Row<'a>) -> Row<'a> {
        self.total += 1;
        row
    }

    /// Counts items that were made.
    pub(crate) fn made_many(&mut self, count: u64) {
        self.total += count;
    }

    /// Counts item `number` (counted from 1), which the engine refused, and returns its row.
    pub(crate) fn refused(&mut self, number: u64, error: &Error, id: RequestId) -> Row<'static> {
        self.refused_with(number, error, id, hint(error.kind()))
    }

    /// As `refused`, with another hint than the error's own.
    pub(crate) fn refused_with(
        &mut self,
        number: u64,
        error: &Error,
        id: RequestId,
        hint: &'static str,
    ) -> Row<'static> {
        let (status, message) = (Status::of(error), error.to_string());
        self.count(Refusal { status, number, message, hint });
        Row::of_error(error, id)
    }

    /// The row of line `number`, which is no record. It never reached the engine, and has a random id of its own.
    pub(crate) fn malformed(&mut self, number: u64, why: &str) -> Result<Row<'static>> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| {
            Failure::broke(
                format!("the operating system gave no random bytes: {error}"),
                hint(ErrorKind::Machine),
            )
        })?;
        let id = uuid::Builder::from_random_bytes(id).into_uuid().into_bytes();
        let code = ErrorKind::InvalidParameter.code();
        let message = format!("The specified parameter is not valid. {why}");
        self.count(Refusal {
            status: Status::Refused,
            number,
            message: format!("{code}: {message}"),
            hint: "correct the line; its row in the output is an Error row",
        });
        Ok(Row::Refused { code, message, id })
    }

    /// Counts the row of line `number`, which says that no key was generated.
    pub(crate) fn passed_on<'a>(&mut self, number: u64, row: Row<'a>) -> Row<'a> {
        self.count(Refusal {
            status: Status::Refused,
            number,
            message: "an Error line of `generate`, passed on as it is".to_owned(),
            hint: "these requests had failed already; generate them again",
        });
        row
    }

    /// Completes the output, and fails if any item was refused. `items` names them in messages.
    pub(crate) fn finish(self, items: &str) -> Result<()> {
        self.progress.finish_and_clear();
        self.rows.finish()?;
        let Some(reported) = self.reported else { return Ok(()) };
        let Refusal { status, number, message, hint } = reported;
        let (refused, total) = (self.refused, self.total);
        let message = if total == 1 {
            message
        } else if refused == total && self.same {
            format!("all {total} {items} were refused: {message}")
        } else {
            format!("{refused} of {total} {items} were refused; number {number}: {message}")
        };
        Err(Failure::new(status, message, hint))
    }

    fn count(&mut self, refusal: Refusal) {
        self.total += 1;
        self.refused += 1;
        match &self.reported {
            None => self.reported = Some(refusal),
            Some(reported) => {
                self.same &= reported.message == refusal.message;
                if reported.status < refusal.status {
                    self.reported = Some(refusal);
                }
            }
        }
    }
}
