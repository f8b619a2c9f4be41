//! The TUN device: a network interface whose packets this process reads and writes, each whole, or up to 64 KiB of
//! packets of one flow as a super-packet, through one queue or, for several threads, through many. It is never
//! persistent, so that the kernel removes it, with its addresses and routes, when the process ends.

use std::{
    io::{self, IoSlice},
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use rustix::fs::{Mode, OFlags};

mod sys;

use sys::Queue;

/// Where the kernel offers TUN devices.
const DEVICE: &str = "/dev/net/tun";
/// Longest interface name, in octets (IFNAMSIZ less the terminating zero).
const NAME_MAX: usize = 15;

/// Octets of the header (`virtio_net_hdr`, little-endian) before each packet of an offloading device.
pub const VIRTIO_HEADER: usize = 10;
/// Octets of the largest super-packet, header included.
pub const SUPER_PACKET_MAX: usize = VIRTIO_HEADER + 65_535;

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

/// An open TUN device, or one of its queues, non-blocking. The interface vanishes when its last queue is dropped; what
/// waits in a queue that is dropped before is lost, and its flows come from the others.
///
/// Packets can be written to any queue. The kernel spreads what it hands over by a hash of the addresses and ports that
/// is the same in both directions, so that a flow keeps its order within one queue. If a packet of a flow is written,
/// what follows in the other direction comes from the queue that it was written to, until nothing has been written for
/// some seconds. At most 4,096 flows are remembered in this way.
#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
    device: Arc<Device>,
}

/// What the queues of an interface have in common.
#[derive(Debug)]
struct Device {
    name: String,
    /// [`Offloads`] as bits, so that they can change while in use.
    offloads: AtomicU8,
    /// Held while the kernel's offloads and the ones above are made to differ.
    changing: Mutex<()>,
}

/// What the kernel may leave undone in packets that it hands over. Whoever reads them does it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums of TCP and UDP. Without it, there are no others.
    pub checksum: bool,
    /// Cutting TCP streams into segments, over both families, also with ECN.
    pub tso: bool,
    /// Cutting segmented UDP sends into datagrams, over both families.
    pub uso: bool,
}

impl Offloads {
    /// From the most to nothing, which is asked for in this order until the kernel agrees. Linux has USO since 6.2.
    const TRIED: [Self; 4] = [
        Self { checksum: true, tso: true, uso: true },
        Self { checksum: true, tso: true, uso: false },
        Self { checksum: true, tso: false, uso: false },
        Self { checksum: false, tso: false, uso: false },
    ];

    fn bits(self) -> u8 {
        u8::from(self.checksum) | u8::from(self.tso) << 1 | u8::from(self.uso) << 2
    }

    fn from_bits(bits: u8) -> Self {
        Self { checksum: bits & 1 != 0, tso: bits & 2 != 0, uso: bits & 4 != 0 }
    }
}

impl Tun {
    /// Creates the interface `name`, which must not exist yet, with the most offloads that the kernel has. It is down
    /// and has no address.
    pub fn create(name: &str) -> Result<Self, TunError> {
        Self::create_through(Path::new(DEVICE), name, Queue::Only)
    }

    /// Like [`Self::create`], with `count` queues, at most 256. All behave alike, and all must be read from.
    pub fn create_queues(name: &str, count: NonZeroUsize) -> Result<Vec<Self>, TunError> {
        if count == NonZeroUsize::MIN {
            return Ok(vec![Self::create(name)?]);
        }
        // That this one is new makes the others ours, too.
        let first = Self::create_through(Path::new(DEVICE), name, Queue::First)?;
        let mut queues = vec![first];
        for _ in 1..count.get() {
            let fd = open(Path::new(DEVICE), name, Queue::Another)?;
            queues.extend(queues.first().map(|first| Self { fd, device: Arc::clone(&first.device) }));
        }
        Ok(queues)
    }

    fn create_through(path: &Path, name: &str, queue: Queue) -> Result<Self, TunError> {
        check_name(name)?;
        let fd = open(path, name, queue)?;
        sys::set_header(fd.as_fd()).map_err(|source| explain(name.to_owned(), source))?;
        let device = Device { name: name.to_owned(), offloads: AtomicU8::new(0), changing: Mutex::new(()) };
        let tun = Self { fd, device: Arc::new(device) };
        for offloads in Offloads::TRIED {
            match tun.set_offloads(offloads) {
                Ok(()) => break,
                Err(error) => tracing::debug!(%error, ?offloads, "the TUN device does not take offloads"),
            }
        }
        Ok(tun)
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.device.name
    }

    /// The offloads in use at all queues.
    pub fn offloads(&self) -> Offloads {
        Offloads::from_bits(self.device.offloads.load(Ordering::Relaxed))
    }

    /// Changes the offloads of all queues, also while packets flow: those that wait already stay as they are. An error
    /// leaves what was. `InvalidInput` (EINVAL) if the kernel does not have one of them.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let _changing = self.device.changing.lock().unwrap_or_else(PoisonError::into_inner);
        sys::set_offloads(self.fd.as_fd(), offloads)?;
        self.device.offloads.store(offloads.bits(), Ordering::Relaxed);
        Ok(())
    }

    /// Reads one packet or super-packet, its virtio header first, into `buffer`, which should have room for
    /// [`SUPER_PACKET_MAX`] octets: the rest is cut off. Returns the length. `WouldBlock` when none waits.
    pub fn recv_super(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut *buffer))?)
    }

    /// Hands one packet or super-packet, in 1,024 pieces at most, to the host's network stack. The first begins with
    /// the virtio header. `InvalidInput` (EINVAL) if the kernel refuses it, which some do for super-packets that
    /// others take.
    pub fn send_super(&self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::io::writev(&self.fd, slices))?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open(path: &Path, name: &str, queue: Queue) -> Result<OwnedFd, TunError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let attached = rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from).and_then(|fd| {
        sys::attach(fd.as_fd(), name, queue)?;
        Ok(fd)
    });
    attached.map_err(|source| explain(name.to_owned(), source))
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
        let error = Tun::create_through(Path::new("/nonexistent/tun"), "muster0", Queue::Only)
            .expect_err("no such file");
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
