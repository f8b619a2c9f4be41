//! The TUN device: a network interface whose packets this process reads and writes, one whole IP packet at a time.
//! It is never persistent, so that the kernel removes it, with its addresses and routes, when the process ends.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::fs::{Mode, OFlags};

use crate::datapath::batch::Batch;

mod sys;

/// Where the kernel offers TUN devices.
const DEVICE: &str = "/dev/net/tun";
/// Longest interface name, in octets (IFNAMSIZ less the terminating zero).
const NAME_MAX: usize = 15;

/// Why a TUN device could not be created.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// No name for an interface.
    #[error(
        "cannot create interface {0:?}: an interface name has 1 to {NAME_MAX} letters, digits, `-`, `_` or `.`; choose another name"
    )]
    Name(String),
    /// The kernel has no TUN support, or the file is missing from /dev.
    #[error(
        "cannot create interface {name}: {DEVICE} is missing; load the kernel module with `modprobe tun`, or in a container pass the device in (`--device {DEVICE}`)"
    )]
    NoDevice {
        /// Name of the interface.
        name: String,
    },
    /// Not enough privilege.
    #[error("cannot create interface {name}: permission denied; run the agent as root or with CAP_NET_ADMIN")]
    Permission {
        /// Name of the interface.
        name: String,
    },
    /// There is an interface of this name.
    #[error(
        "cannot create interface {name}: there is one of that name already; stop the other agent that holds it (see `ip -details link show {name}`), or configure another name"
    )]
    Busy {
        /// Name of the interface.
        name: String,
    },
    /// Anything else.
    #[error("cannot create interface {name} through {DEVICE}: {source}")]
    System {
        /// Name of the interface.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// An open TUN device, non-blocking. The interface vanishes when this is dropped.
#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
    name: String,
}

impl Tun {
    /// Creates the interface `name`, which must not exist yet. It is down and has no address.
    pub fn create(name: &str) -> Result<Self, TunError> {
        Self::create_through(Path::new(DEVICE), name)
    }

    fn create_through(device: &Path, name: &str) -> Result<Self, TunError> {
        check_name(name)?;
        let open = || {
            let fd =
                rustix::fs::open(device, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
            sys::attach(fd.as_fd(), name)?;
            Ok(fd)
        };
        match open() {
            Ok(fd) => Ok(Self { fd, name: name.to_owned() }),
            Err(source) => Err(explain(name.to_owned(), source)),
        }
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads one packet into `buffer` and returns its length. `WouldBlock` when none waits. A packet longer than
    /// `buffer` is cut off, so `buffer` should hold the interface's MTU.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    /// Replaces the contents of `batch` by packets that wait.
    pub(crate) fn recv_batch(&self, batch: &mut Batch<()>) -> io::Result<()> {
        batch.fill(|slot| self.recv(slot).map(|length| (length, ())))
    }

    /// Hands one packet to the host's network stack.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.fd, packet)?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The kernel takes more names than this, but `%` would make it choose a number, and the rest is unreadable.
fn check_name(name: &str) -> Result<(), TunError> {
    let good = (1..=NAME_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && name != "."
        && name != "..";
    if good { Ok(()) } else { Err(TunError::Name(name.to_owned())) }
}

fn explain(name: String, source: io::Error) -> TunError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::NoDevice { name },
        Some(libc::EPERM | libc::EACCES) => TunError::Permission { name },
        Some(libc::EBUSY) => TunError::Busy { name },
        _ => TunError::System { name, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["muster0", "a", "mesh-1.2_x", "exactly15octets"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "sixteen-octets-x", "muster%d", "a b", "a/b", "..", ".", "müster"] {
            assert!(matches!(check_name(bad), Err(TunError::Name(_))), "{bad}");
        }
    }

    #[test]
    fn a_missing_device_file_is_named_with_its_remedy() {
        let error = Tun::create_through(Path::new("/nonexistent/tun"), "muster0").expect_err("no such file");
        assert!(matches!(error, TunError::NoDevice { .. }), "{error}");
        assert!(error.to_string().contains("modprobe tun"), "{error}");
    }

    #[test]
    fn errors_of_the_system_are_explained() {
        let explained = |errno| explain("muster0".into(), io::Error::from_raw_os_error(errno));
        assert!(matches!(explained(libc::EPERM), TunError::Permission { .. }));
        assert!(matches!(explained(libc::EBUSY), TunError::Busy { .. }));
        assert!(matches!(explained(libc::EINVAL), TunError::System { .. }));
    }
}
