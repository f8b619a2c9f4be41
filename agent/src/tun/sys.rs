//! The system calls that no safe library offers.
#![expect(unsafe_code, reason = "ioctl(2) with a struct has no safe wrapper")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Turns an open `/dev/net/tun` into the TUN interface `name`: packets without any header before them, not persistent.
/// `EBUSY` if an interface of this name exists. `name` must be shorter than `IFNAMSIZ`.
pub(super) fn attach(fd: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // IFF_TUN_EXCL refuses a name that exists, instead of joining in with a process that is about to end.
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `fd` is open for the length of the call, and TUNSETIFF reads and writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
