//! The operations by their names on the wire, and what each asks of a client.

use crate::{clients::Permission, limits::SERVER_BODY_LEN_MAX, request::Operation};

/// An operation of the instance API, or one of our batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    /// One data key, or a batch.
    Generate { advance: bool, batch: bool },
    /// Data of the caller's.
    Encrypt { advance: bool },
    /// One blob, or a batch.
    Decrypt { advance: bool, batch: bool },
    /// Random bytes.
    Random,
}

/// Every operation, in the order of [`Api::index`].
pub(super) const ALL: [(Api, &str); 11] = [
    (Api::Generate { advance: false, batch: false }, "GenerateDataKey"),
    (Api::Generate { advance: true, batch: false }, "AdvanceGenerateDataKey"),
    (Api::Encrypt { advance: false }, "Encrypt"),
    (Api::Encrypt { advance: true }, "AdvanceEncrypt"),
    (Api::Decrypt { advance: false, batch: false }, "Decrypt"),
    (Api::Decrypt { advance: true, batch: false }, "AdvanceDecrypt"),
    (Api::Random, "GenerateRandom"),
    (Api::Generate { advance: false, batch: true }, "BatchGenerateDataKey"),
    (Api::Generate { advance: true, batch: true }, "BatchAdvanceGenerateDataKey"),
    (Api::Decrypt { advance: false, batch: true }, "BatchDecrypt"),
    (Api::Decrypt { advance: true, batch: true }, "BatchAdvanceDecrypt"),
];

impl Api {
    /// The operation with this name.
    pub(super) fn parse(name: &[u8]) -> Option<Self> {
        ALL.iter().find(|(_, known)| known.as_bytes() == name).map(|(api, _)| *api)
    }

    /// Its place in [`ALL`].
    pub(super) fn index(self) -> usize {
        ALL.iter().position(|(api, _)| *api == self).expect("ALL has all")
    }

    /// Its name.
    pub(super) fn as_str(self) -> &'static str {
        ALL[self.index()].1
    }

    /// What a client needs to be allowed.
    pub(super) fn permission(self) -> Permission {
        match self {
            Self::Generate { .. } => Permission::Generate,
            Self::Encrypt { .. } => Permission::Encrypt,
            Self::Decrypt { .. } => Permission::Decrypt,
            Self::Random => Permission::Random,
        }
    }

    /// Whether it is one of ours, with items.
    pub(super) fn is_batch(self) -> bool {
        matches!(self, Self::Generate { batch: true, .. } | Self::Decrypt { batch: true, .. })
    }

    /// Most bytes of a body. `batch_max` is what is configured for batches.
    pub(super) fn body_max(self, batch_max: usize) -> usize {
        if self.is_batch() { batch_max } else { SERVER_BODY_LEN_MAX }
    }

    /// Whether the response names the key version in a header, which transfer clients send back with `Decrypt`.
    pub(super) fn names_version(self) -> bool {
        matches!(
            self,
            Self::Generate { advance: false, batch: false }
                | Self::Encrypt { advance: false }
                | Self::Decrypt { advance: false, batch: false }
        )
    }
}

/// The engine's operation.
pub(super) fn generating(advance: bool) -> Operation {
    if advance { Operation::AdvanceGenerateDataKey } else { Operation::GenerateDataKey }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_operations_and_back() {
        for (index, (api, name)) in ALL.into_iter().enumerate() {
            assert_eq!((Api::parse(name.as_bytes()), api.index()), (Some(api), index));
            assert_eq!(api.as_str(), name);
        }
        for other in ["", "generatedatakey", "GenerateDataKey ", "Sign", "BatchEncrypt"] {
            assert_eq!(Api::parse(other.as_bytes()), None);
        }
    }
}
