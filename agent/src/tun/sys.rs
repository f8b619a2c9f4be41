//! The system calls that no safe library offers.
#![expect(unsafe_code, reason = "ioctl(2) has no safe wrapper")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::{Offloads, VIRTIO_HEADER};

/// What an open `/dev/net/tun` becomes.
#[derive(Clone, Copy)]
pub(super) enum Queue {
    /// The only queue of a new interface.
    Only,
    /// The first queue of a new interface that may have more.
    First,
    /// One more queue of an interface that began with [`Self::First`].
    Another,
}

/// Turns an open `/dev/net/tun` into a queue of the TUN interface `name`, not persistent: packets with a virtio header
/// before them (see [`set_header`]). `EBUSY` if it should be new and one of this name exists. `name` must be shorter
/// than `IFNAMSIZ`.
pub(super) fn attach(fd: BorrowedFd<'_>, name: &str, queue: Queue) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // IFF_TUN_EXCL refuses a name that exists, instead of joining in with a process that is about to end.
    let queue = match queue {
        Queue::Only => libc::IFF_TUN_EXCL,
        Queue::First => libc::IFF_TUN_EXCL | libc::IFF_MULTI_QUEUE,
        Queue::Another => libc::IFF_MULTI_QUEUE,
    };
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queue;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `fd` is open for the length of the call, and TUNSETIFF reads and writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Settles what the virtio header looks like: [`VIRTIO_HEADER`] octets, little-endian on every processor. Like the
/// offloads, this holds for the interface with all its queues.
pub(super) fn set_header(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_number(fd, libc::TUNSETVNETHDRSZ, VIRTIO_HEADER as libc::c_int)?;
    set_number(fd, libc::TUNSETVNETLE, 1)
}

/// Sets which packets the kernel may hand over unfinished. `EINVAL` if it does not know one of the offloads.
pub(super) fn set_offloads(fd: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let flags = [
        (offloads.checksum, libc::TUN_F_CSUM),
        (offloads.tso, libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN),
        (offloads.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let flags = flags.into_iter().filter(|(is_on, _)| *is_on).fold(0, |sum, (_, flag)| sum | flag);
    // SAFETY: `fd` is open for the length of the call, and TUNSETOFFLOAD takes a number, no pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_number(fd: BorrowedFd<'_>, request: libc::Ioctl, number: libc::c_int) -> io::Result<()> {
    // SAFETY: `fd` is open for the length of the call, and the two requests that this is called with read one `int`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const number) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
