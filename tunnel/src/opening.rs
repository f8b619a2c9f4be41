//! Messages on their way in, between the socket and the tunnel's bookkeeping.

use crate::cipher::TransportKey;

/// One transport message on its way in: the key of its session and its counter, apart from the tunnel, so that opening
/// takes no lock. Nothing has come of the message before [`Tunnel::finish_receive`](crate::Tunnel::finish_receive).
#[must_use = "the message is neither taken nor counted before it is finished"]
pub struct Opening {
    pub(crate) key: TransportKey,
    /// This side's index of the session.
    pub(crate) index: u32,
    pub(crate) counter: u64,
    pub(crate) is_authentic: bool,
}

impl Opening {
    /// Opens `datagram`, the one that this was made for, in place, and remembers whether it was authentic. Once: what is
    /// open is no longer authentic.
    pub fn open(&mut self, datagram: &mut [u8]) {
        self.is_authentic = self.key.open(self.counter, datagram);
    }
}
