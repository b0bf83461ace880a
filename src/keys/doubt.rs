//! Doubts about dates: what a clock that was wrong, or is wrong, leaves in a store, and what must not follow from it.

use super::{KeyRecord, KeyState, UnixSeconds, date, system_time};
use crate::limits::{CLOCK_SLACK, DELETION_DAYS_MAX, DELETION_DAYS_MIN, DELETION_OVERDUE_MAX};

const DAY: u64 = 86_400;

impl KeyRecord {
    /// Whether the key's last version is dated after `now`, by more than clocks differ: a clock was, or is, wrong.
    pub(crate) fn is_of_the_future(&self, now: UnixSeconds) -> bool {
        self.last_rotation > now.saturating_add(CLOCK_SLACK.as_secs())
    }

    /// Why the date of the key's deletion, or the clock that says `now`, is likely to be wrong, if it is. A deletion is
    /// for good, so it waits for somebody who says that the clock is right.
    pub(crate) fn deletion_doubt(&self, now: UnixSeconds) -> Option<String> {
        let KeyState::PendingDeletion { due } = self.state else { return None };
        let slack = CLOCK_SLACK.as_secs();
        let [due_date, now_date] = [due, now].map(|time| date(system_time(time)));
        let earliest = self.last_rotation.saturating_add(u64::from(DELETION_DAYS_MIN) * DAY);
        if due.saturating_add(slack) < earliest {
            let newest = date(system_time(self.last_rotation));
            return Some(format!(
                "its deletion is dated {due_date}, within {DELETION_DAYS_MIN} days of its newest \
                 version ({newest}), so one of them was dated by a wrong clock"
            ));
        }
        let latest = now.saturating_add(u64::from(DELETION_DAYS_MAX) * DAY);
        if due > latest.saturating_add(slack) {
            return Some(format!(
                "its deletion is dated {due_date}, more than {DELETION_DAYS_MAX} days after this \
                 clock's {now_date}: it was dated by a wrong clock, or this clock is behind"
            ));
        }
        (now > due.saturating_add(DELETION_OVERDUE_MAX.as_secs())).then(|| {
            format!(
                "its deletion was due on {due_date}, and this clock says {now_date}, which may be \
                 wrong"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cpu::Tier,
        keys::{KeyId, KeySpec, Origin, RotationPeriod},
        rng::Rng,
        wrap::Scheme,
    };

    fn key(last_rotation: u64, state: KeyState) -> KeyRecord {
        KeyRecord {
            id: KeyId::generate(&Rng::Os(Tier::PORTABLE)).unwrap(),
            spec: KeySpec::Aes256,
            scheme: Scheme::Derived,
            origin: Origin::Generated,
            description: String::new(),
            created: last_rotation,
            state,
            rotation: Some(RotationPeriod::parse("7d").unwrap()),
            last_rotation,
            version_count: 1,
        }
    }

    #[test]
    fn a_deletion_is_in_doubt_unless_its_date_fits_the_key_and_the_clock() {
        for (made, due, now, doubtful) in [
            (1000, 1007, 1007, false),
            (1000, 1366, 1366, false),
            (1000, 1007, 1373, false),
            // A clock far ahead, ...
            (1000, 1007, 1374, true),
            (1000, 1007, 20_000, true),
            // ... a date set by one that was behind, ...
            (1000, 1005, 1010, true),
            (1000, 20, 1010, true),
            // ... or far ahead.
            (1000, 40_000, 1010, true),
            (1000, 1376, 1010, false),
        ] {
            let key = key(made * DAY, KeyState::PendingDeletion { due: due * DAY });
            let doubt = key.deletion_doubt(now * DAY);
            assert_eq!(doubt.is_some(), doubtful, "{made} {due} {now}: {doubt:?}");
        }
        assert_eq!(key(0, KeyState::Enabled).deletion_doubt(u64::MAX), None);
    }

    #[test]
    fn a_date_in_the_future_does_not_stop_rotation() {
        let now = 20_000 * DAY;
        // Machines whose clocks differ by hours are no reason to rotate.
        for (made, due) in [
            (now, now + 7 * DAY),
            (now + DAY, now + 8 * DAY),
            (now + DAY + 1, now),
            (u64::MAX, now),
            (now - 7 * DAY, now),
        ] {
            let key = key(made, KeyState::Enabled);
            assert_eq!(key.next_rotation(now), Some(due), "{made}");
            assert_eq!(key.rotation_due(now), due <= now, "{made}");
            assert_eq!(key.is_of_the_future(now), made > now + DAY);
        }
        assert_eq!(key(u64::MAX, KeyState::Disabled).next_rotation(now), None);
    }
}
