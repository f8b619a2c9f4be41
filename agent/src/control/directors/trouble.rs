//! What goes wrong with directors, counted for metrics.

/// A kind of trouble with a director.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It refuses this device.
    Refused,
    /// It could not be attached to.
    Unavailable,
    /// The attachment has ended.
    Lost,
    /// It does not answer over UDP.
    UdpUnanswered,
    /// It does not know the session any more.
    UnknownSession,
    /// The stream that frames were to go over is closed.
    StreamClosed,
}

const ALL: [(Trouble, &str); 6] = [
    (Trouble::Refused, "refused"),
    (Trouble::Unavailable, "unavailable"),
    (Trouble::Lost, "lost"),
    (Trouble::UdpUnanswered, "udp_unanswered"),
    (Trouble::UnknownSession, "unknown_session"),
    (Trouble::StreamClosed, "stream_closed"),
];

/// How often there was each.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Troubles([u64; ALL.len()]);

impl Troubles {
    pub(super) fn count(&mut self, trouble: Trouble) {
        if let Some(number) = self.0.get_mut(trouble as usize) {
            *number += 1;
        }
    }

    /// All kinds, by the name that metrics use.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ALL.iter().zip(self.0).map(|((_, name), number)| (*name, number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_name() {
        for (trouble, name) in ALL {
            let mut troubles = Troubles::default();
            troubles.count(trouble);
            let counted: Vec<_> = troubles.named().filter(|(_, number)| *number == 1).collect();
            assert_eq!(counted, [(name, 1)]);
        }
    }
}
