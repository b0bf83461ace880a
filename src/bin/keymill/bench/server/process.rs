//! What Linux tells of a process: the CPU time that it has used, and the memory that it has.

use std::{fs, time::Duration};

use crate::failure::{Failure, Result};

/// A process by its number, or this one.
pub(super) struct Process(String);

/// Ticks of `/proc/PID/stat` in a second: 100 for every program, whatever the kernel counts by.
const TICKS_PER_SECOND: u32 = 100;

impl Process {
    pub(super) fn this() -> Self {
        Self("self".into())
    }

    /// The process with this number, which `--server-pid` gave.
    pub(super) fn of(pid: u32) -> Result<Self> {
        let process = Self(pid.to_string());
        process.cpu()?;
        process.resident_mib()?;
        Ok(process)
    }

    /// CPU time of all its threads, those that have ended included. Counted by hundredths of a second.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let stat = self.file("stat")?;
        // The name, in parentheses, may hold anything. Behind it the fields are numbers, from the third on.
        let fields = stat.rsplit_once(") ").map(|(_, fields)| fields.split(' '));
        let mut times = fields.into_iter().flatten().skip(11).map(str::parse::<u64>);
        match (times.next(), times.next()) {
            (Some(Ok(user)), Some(Ok(system))) => {
                Ok(Duration::from_secs(user + system) / TICKS_PER_SECOND)
            }
            _ => Err(self.unreadable()),
        }
    }

    /// Memory that it has in RAM.
    pub(super) fn resident_mib(&self) -> Result<f64> {
        let status = self.file("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib = kib.and_then(|kib| kib.trim().parse::<f64>().ok());
        kib.map(|kib| kib / 1024.0).ok_or_else(|| self.unreadable())
    }

    fn file(&self, name: &str) -> Result<String> {
        fs::read_to_string(format!("/proc/{}/{name}", self.0)).map_err(|_| self.unreadable())
    }

    fn unreadable(&self) -> Failure {
        Failure::refused(
            format!("nothing can be read about process {} in /proc", self.0),
            "--server-pid is the number of the server's process on this machine; leave it out for \
             a server elsewhere",
        )
    }
}

/// Asks the kernel to wake this program's new threads when they asked for it, not up to 50 microseconds later: arrivals
/// of an open loop come that close. Without it, answers only seem a little later than they were.
pub(super) fn wake_in_time() {
    let _ = fs::write("/proc/self/timerslack_ns", "1");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_uses_time() {
        let process = Process::this();
        assert!(process.resident_mib().unwrap() > 0.5);
        let (start, before) = (std::time::Instant::now(), process.cpu().unwrap());
        while process.cpu().unwrap() == before {
            assert!(start.elapsed() < Duration::from_secs(60), "no tick in a minute");
        }
        assert!(Process::of(u32::MAX).is_err());
    }
}
