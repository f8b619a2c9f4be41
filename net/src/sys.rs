//! The system calls that no safe library offers, or not without an allocation for every message.
#![expect(
    unsafe_code,
    reason = "sendmmsg(2) and recvmmsg(2) with control messages, and UDP's own socket options"
)]

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::abi::{Address, Control};

/// Most messages in one system call.
pub(super) const MESSAGES: usize = 64;

/// A message to send.
#[derive(Clone, Copy)]
pub(super) struct Outbound<'a> {
    pub(super) address: Address,
    pub(super) control: Control,
    pub(super) octets: &'a [u8],
}

/// What is known of a received message beside its octets.
#[derive(Clone, Copy)]
pub(super) struct Inbound {
    pub(super) address: Address,
    pub(super) control: Control,
    pub(super) len: usize,
    /// It did not fit its slot.
    pub(super) is_truncated: bool,
}

impl Inbound {
    pub(super) const EMPTY: Self =
        Self { address: Address::EMPTY, control: Control::EMPTY, len: 0, is_truncated: false };
}

/// Sends messages, [`MESSAGES`] at most, in their order, and returns how many. Fewer than there are means that the
/// next one failed; sending from there on says how. `WouldBlock` when the socket's buffer is full.
pub(super) fn send<'a, 'b: 'a>(
    socket: BorrowedFd<'_>,
    messages: impl Iterator<Item = &'a Outbound<'b>>,
) -> io::Result<usize> {
    let mut headers = [const { MaybeUninit::uninit() }; MESSAGES];
    let mut vectors = [const { MaybeUninit::uninit() }; MESSAGES];
    let mut count = 0;
    for ((message, header), vector) in messages.zip(&mut headers).zip(&mut vectors) {
        // The kernel only reads through these pointers.
        let vector = vector.write(libc::iovec {
            iov_base: message.octets.as_ptr().cast_mut().cast(),
            iov_len: message.octets.len(),
        });
        let (address, control) = (&message.address, &message.control);
        header.write(mmsghdr(
            (address.as_ptr().cast_mut(), address.len()),
            vector,
            (control.as_ptr().cast_mut(), control.len()),
        ));
        count += 1;
    }
    retry(|| {
        // SAFETY: the first `count` headers are initialised. Their pointers lead to addresses, vectors, control
        // messages and octets of the lengths that stand beside them, all of which outlive the call: `messages` are
        // borrowed for 'a, `vectors` is a local.
        unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr().cast(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT as _,
            )
        }
    })
}

/// Receives messages that wait, [`MESSAGES`] at most, each into a slot of its own, and returns how many.
/// `WouldBlock` when none waits.
pub(super) fn receive<'a>(
    socket: BorrowedFd<'_>,
    slots: impl Iterator<Item = &'a mut [u8]>,
    messages: &mut [Inbound],
) -> io::Result<usize> {
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; MESSAGES];
    let mut vectors = [const { MaybeUninit::uninit() }; MESSAGES];
    let mut count = 0;
    for (((message, slot), header), vector) in
        messages.iter_mut().zip(slots).zip(&mut headers).zip(&mut vectors)
    {
        let vector = vector.write(libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() });
        header.write(mmsghdr(
            (message.address.as_mut_ptr(), Address::ROOM as u32),
            vector,
            (message.control.as_mut_ptr(), Control::ROOM),
        ));
        count += 1;
    }
    let count = retry(|| {
        // SAFETY: the first `count` headers are initialised. Their pointers lead to room of the lengths that stand
        // beside them, borrowed mutably beyond the call (`messages`, the slots for 'a) or local (`vectors`), and any
        // octets are valid in them. No timeout is given.
        unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr().cast(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        }
    })?;
    for (message, header) in messages.iter_mut().zip(&headers).take(count) {
        // SAFETY: the kernel has filled in `count` headers, which is at most as many as were initialised above.
        let header = unsafe { header.assume_init_ref() };
        message.address.set_len(header.msg_hdr.msg_namelen);
        message.control.set_len(header.msg_hdr.msg_controllen as _);
        message.len = header.msg_len as usize;
        message.is_truncated = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
    }
    Ok(count)
}

/// A header that refers to an address, one vector and control messages, each given by where it is and its length.
fn mmsghdr(address: (*mut u8, u32), vector: &mut libc::iovec, control: (*mut u8, usize)) -> libc::mmsghdr {
    // SAFETY: `mmsghdr` is plain data (numbers and pointers), for which all zeroes is a valid value.
    let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
    header.msg_hdr.msg_name = address.0.cast();
    header.msg_hdr.msg_namelen = address.1;
    header.msg_hdr.msg_iov = vector;
    header.msg_hdr.msg_iovlen = 1;
    header.msg_hdr.msg_control = control.0.cast();
    header.msg_hdr.msg_controllen = control.1 as _;
    header
}

/// Sets an option of the level `SOL_UDP` to a number.
pub(super) fn set_udp_option(
    socket: BorrowedFd<'_>,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_option(socket, libc::SOL_UDP, option, value)
}

/// Leaves out the checksums of datagrams, with which the kernel refuses to send segments.
#[cfg(test)]
pub(super) fn omit_checksums(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)
}

fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: `socket` is open for the length of the call, which reads one `int` from `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The number that a system call returns, which is repeated when a signal has interrupted it.
fn retry(mut call: impl FnMut() -> libc::c_int) -> io::Result<usize> {
    loop {
        if let Ok(number) = usize::try_from(call()) {
            return Ok(number);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
