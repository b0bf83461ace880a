//! File descriptors at the start of a server: its connections are held against the limit of the process, so that they
//! cannot take what the audit log, TLS files, the key store and those who watch the server need.

use super::ServerConfig;
use crate::{
    limits::{SERVER_FILES_PER_THREAD, SERVER_SPARE_FILES, SERVER_WATCHERS_MAX},
    os::descriptors::{open_files, open_files_max},
};

/// Connections at once, of clients and of those who watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Connections {
    pub(super) clients: usize,
    pub(super) watchers: usize,
}

/// Descriptors of a process that cannot count its own.
const OPEN_FILES_GUESSED: usize = 32;
/// Fewest of either kind, however few descriptors there are.
const CONNECTIONS_MIN: usize = 4;

impl Connections {
    /// As many as are configured, or as the process may have after its soft limit was raised. Fewer are told of.
    pub(super) fn within_limit(config: &ServerConfig) -> Self {
        let threads = config.threads.get() * SERVER_FILES_PER_THREAD;
        let others = open_files().unwrap_or(OPEN_FILES_GUESSED) + SERVER_SPARE_FILES + threads;
        let wanted = Self {
            clients: config.connections_max,
            watchers: if config.metrics.is_some() { SERVER_WATCHERS_MAX } else { 0 },
        };
        let needed = others.saturating_add(wanted.clients).saturating_add(wanted.watchers);
        let max = open_files_max(needed);
        if needed <= max {
            return wanted;
        }
        let fewer = wanted.fewer(max.saturating_sub(others));
        tracing::warn!(
            configured = wanted.clients,
            connections = fewer.clients,
            open_files_max = max,
            open_files_needed = needed,
            "fewer connections than configured: the limit of open files (RLIMIT_NOFILE) is too \
             low; raise it with LimitNOFILE=, --ulimit nofile= or `ulimit -Hn`"
        );
        fewer
    }

    /// What fits `free` descriptors. Those who watch get an eighth at most.
    fn fewer(self, free: usize) -> Self {
        let min = |max: usize| max.min(CONNECTIONS_MIN);
        let watchers = self.watchers.min(free / 8).max(min(self.watchers));
        let clients = self.clients.min(free.saturating_sub(watchers)).max(min(self.clients));
        Self { clients, watchers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_descriptors_are_shared_out_and_nobody_gets_none() {
        let wanted = Connections { clients: 4096, watchers: 64 };
        for (free, clients, watchers) in
            [(0, 4, 4), (20, 16, 4), (80, 70, 10), (1000, 936, 64), (4160, 4096, 64)]
        {
            assert_eq!(wanted.fewer(free), Connections { clients, watchers }, "{free}");
        }
        let few = Connections { clients: 1, watchers: 0 };
        assert_eq!(few.fewer(0), few);
    }
}
