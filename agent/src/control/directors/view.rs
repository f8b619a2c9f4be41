//! What is told of directors: for status output, for metrics, and for choosing what to report.

use std::{net::SocketAddr, time::Duration};

use muster_tunnel::DirectorId;

use super::{DirectorTarget, Directors};

/// What can be told of a director.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectorView<'a> {
    /// Its number, as the data plane has it.
    pub id: DirectorId,
    /// Its uid, name, region and addresses.
    pub target: &'a DirectorTarget,
    /// What it is to this device.
    pub role: Role,
    /// What frames go by; `None` while it cannot be used.
    pub way: Option<Way>,
    /// Median of the last measurements.
    pub round_trip: Option<Duration>,
    /// This device as the director sees it.
    pub reflexive: Option<SocketAddr>,
    /// Where frames go; `None` unless they go over UDP.
    pub udp: Option<SocketAddr>,
    /// Why it cannot be used; empty while it can.
    pub last_error: &'a str,
}

/// What a director is to this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Peers reach this device through it.
    Home,
    /// Peers use it if the home does not answer.
    Second,
    /// Known, and perhaps used to reach peers.
    Other,
}

impl Role {
    /// The word that status output uses.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Home => "home",
            Self::Second => "second",
            Self::Other => "other",
        }
    }
}

/// What frames to a director go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Over UDP, beside the tunnel's other datagrams.
    Udp,
    /// In a stream, where UDP is blocked.
    Tcp,
}

impl Way {
    /// The word that status output uses.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

impl Directors {
    /// Uids of home and second.
    pub(in crate::control) fn chosen(&self) -> (Option<&str>, Option<&str>) {
        let uid = |id: Option<DirectorId>| Some(self.known.get(&id?)?.target.uid.as_str());
        (uid(self.home), uid(self.second))
    }

    /// This device as directors see it, each address once, what the home sees first.
    pub(in crate::control) fn reflexive(&self) -> Vec<SocketAddr> {
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for view in self.views() {
            addresses.extend(view.reflexive.filter(|address| !addresses.contains(address)));
        }
        addresses
    }

    /// All of them, home and second first.
    pub(in crate::control) fn views(&self) -> Vec<DirectorView<'_>> {
        let mut views: Vec<_> = self
            .known
            .iter()
            .map(|(id, director)| DirectorView {
                id: *id,
                target: &director.target,
                role: match Some(*id) {
                    id if id == self.home => Role::Home,
                    id if id == self.second => Role::Second,
                    _ => Role::Other,
                },
                way: director.way,
                round_trip: director.distance.median(),
                reflexive: director.reflexive,
                udp: director.udp,
                last_error: if director.way.is_some() { "" } else { &director.last_error },
            })
            .collect();
        views.sort_by_key(|view| (view.role, view.id));
        views
    }

    /// What has gone wrong so far, all kinds, by the name that metrics use.
    pub(in crate::control) fn troubles(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.troubles.named()
    }

    /// How often the home has become another.
    pub(in crate::control) const fn home_changes(&self) -> u64 {
        self.home_changes
    }
}
