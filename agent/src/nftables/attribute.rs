//! Messages of netlink and their attributes, written and read.

/// Marks an attribute that consists of attributes.
const NESTED: u16 = 0x8000;

/// Begins a message, with the header of nfnetlink; returns where. [`end_message`] ends it.
pub fn begin(bytes: &mut Vec<u8>, kind: i32, flags: i32, family: u8, resource: u16) -> usize {
    let start = bytes.len();
    bytes.extend([0; 4]);
    bytes.extend((kind as u16).to_ne_bytes());
    bytes.extend((flags as u16).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    start
}

/// Ends a message.
pub fn end_message(bytes: &mut [u8], start: usize) {
    let length = u32::try_from(bytes.len() - start).unwrap_or(u32::MAX);
    put(bytes, start, &length.to_ne_bytes());
}

/// Asks for an acknowledgement of the message that begins at `start`, by `sequence`.
pub fn acknowledge(bytes: &mut [u8], start: usize, sequence: u32) {
    let flags = bytes.get(start + 6..start + 8).and_then(|flags| flags.first_chunk()).copied();
    let flags = u16::from_ne_bytes(flags.unwrap_or_default()) | libc::NLM_F_ACK as u16;
    put(bytes, start + 6, &flags.to_ne_bytes());
    put(bytes, start + 8, &sequence.to_ne_bytes());
}

/// Begins an attribute that consists of attributes; returns where. [`end`] ends it.
pub fn open_nested(bytes: &mut Vec<u8>, kind: u16) -> usize {
    let start = bytes.len();
    bytes.extend([0; 2]);
    bytes.extend((kind | NESTED).to_ne_bytes());
    start
}

/// Ends an attribute.
pub fn end(bytes: &mut [u8], start: usize) {
    let length = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
    put(bytes, start, &length.to_ne_bytes());
}

/// Writes an attribute that consists of attributes.
pub fn nested(bytes: &mut Vec<u8>, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
    let start = open_nested(bytes, kind);
    write(bytes);
    end(bytes, start);
}

/// Writes an attribute, padded to a multiple of 4 bytes.
pub fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let start = bytes.len();
    bytes.extend([0; 2]);
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    end(bytes, start);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Writes a text, which ends with a zero.
pub fn text(bytes: &mut Vec<u8>, kind: u16, value: &str) {
    let start = bytes.len();
    bytes.extend([0; 2]);
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value.as_bytes());
    bytes.push(0);
    end(bytes, start);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Writes a number of 32 bits, in network order.
pub fn number(bytes: &mut Vec<u8>, kind: u16, value: u32) {
    attribute(bytes, kind, &value.to_be_bytes());
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// A message as it was received.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Which one it is, its subsystem included.
    pub kind: u16,
    /// Names the request that it answers.
    pub sequence: u32,
    /// The socket that caused it.
    pub port: u32,
    /// What follows netlink's own header.
    pub body: &'a [u8],
}

/// The messages in what was received; it ends where that makes no sense.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<16>()?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
        let length = usize::try_from(length).ok()?;
        let body = bytes.get(16..length)?;
        let message = Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            port: u32::from_ne_bytes([header[12], header[13], header[14], header[15]]),
            body,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`, each with its kind; they end where that makes no sense.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = bytes.get(4..length)?;
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The attribute of one kind.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        for kind in [7, 8] {
            let start = begin(&mut bytes, kind, 1, 2, 3);
            nested(&mut bytes, 4, |bytes| {
                text(bytes, 1, "ab");
                number(bytes, 2, 0x0102_0304);
            });
            end_message(&mut bytes, start);
        }
        let read: Vec<_> = messages(&bytes).collect();
        assert_eq!(read.iter().map(|message| message.kind).collect::<Vec<_>>(), [7, 8]);
        for message in read {
            let inner = find(&message.body[4..], 4).unwrap();
            assert_eq!(find(inner, 1), Some(&b"ab\0"[..]));
            assert_eq!(find(inner, 2), Some(&[1, 2, 3, 4][..]));
            assert_eq!(find(inner, 3), None);
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_received_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                attributes(message.body).for_each(drop);
            }
            attributes(&bytes).for_each(drop);
        }
    }
}
