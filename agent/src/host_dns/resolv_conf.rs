//! The edit of a resolv.conf as text: our block first, the host's own servers below it set aside, everything else as
//! it was. Only our server remains in force, because musl asks all of them at once and takes the first answer, and
//! glibc takes another server's "no such name" for an answer too. The text itself says how to undo the edit.

use std::net::IpAddr;

/// First line of the block.
const BEGIN: &[u8] =
    b"# BEGIN Muster: muster-agent resolves for this host. The host's own servers are set aside below by \"#muster: \".";
/// Says what to do about it.
const HINT: &[u8] = b"# To undo this: muster-agent doctor --fix";
/// Last line of the block.
const END: &[u8] = b"# END Muster";
/// Before each line that is set aside.
const ASIDE: &[u8] = b"#muster: ";

/// What a text is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// Nothing in it is ours.
    None,
    /// It carries a whole edit, which [`undo`] takes out.
    Edited,
    /// It carries a part of one: somebody has cut into it.
    Damaged,
}

/// What `text` is.
pub fn mark(text: &[u8]) -> Mark {
    let mut begun = false;
    let mut ours = false;
    for line in lines(text) {
        let line = content(line);
        if line == END && begun {
            return Mark::Edited;
        }
        begun |= line == BEGIN;
        ours |= begun || line == END || line == HINT || line.starts_with(ASIDE);
    }
    if ours { Mark::Damaged } else { Mark::None }
}

/// `text`, edited or not, with `server` as the only name server in force.
pub fn edit(text: &[u8], server: IpAddr) -> Vec<u8> {
    let original = undo(text);
    let mut out = Vec::with_capacity(original.len() + 512);
    for line in [BEGIN, HINT, format!("nameserver {server}").as_bytes(), END] {
        out.extend_from_slice(line);
        out.push(b'\n');
    }
    for line in lines(&original) {
        if is_server(line) || line.starts_with(ASIDE) {
            out.extend_from_slice(ASIDE);
        }
        out.extend_from_slice(line);
    }
    out
}

/// The text that was edited; with what others have added since. A text that carries no whole edit is left as it is.
pub fn undo(text: &[u8]) -> Vec<u8> {
    if mark(text) != Mark::Edited {
        return text.to_vec();
    }
    let (mut out, mut inside, mut removed) = (Vec::with_capacity(text.len()), false, false);
    for line in lines(text) {
        if !removed && content(line) == BEGIN {
            inside = true;
        }
        if inside {
            removed = content(line) == END;
            inside = !removed;
            continue;
        }
        out.extend_from_slice(line.strip_prefix(ASIDE).unwrap_or(line));
    }
    out
}

/// What can be saved of a damaged edit where there is no backup: all that is not known to be ours, and the servers.
pub fn salvage(text: &[u8]) -> Vec<u8> {
    let text = undo(text);
    let (mut out, mut inside) = (Vec::with_capacity(text.len()), false);
    for line in lines(&text) {
        let known = content(line);
        // The block's server is its last line but one.
        let server = inside && is_server(line);
        inside |= known == BEGIN || known == HINT;
        if known == BEGIN || known == HINT || known == END || server {
            inside &= !server && known != END;
            continue;
        }
        out.extend_from_slice(line.strip_prefix(ASIDE).unwrap_or(line));
    }
    out
}

/// The addresses that `text` names as servers.
pub fn servers(text: &[u8]) -> Vec<IpAddr> {
    let server = |line| {
        let text = std::str::from_utf8(content(line)).ok()?;
        let mut words = text.split_ascii_whitespace();
        words.next().filter(|word| *word == "nameserver")?;
        words.next()?.parse().ok()
    };
    lines(text).filter_map(server).collect()
}

/// The lines with their ends.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|byte| *byte == b'\n')
}

fn content(line: &[u8]) -> &[u8] {
    line.trim_ascii_end()
}

/// Whether any resolver might take `line` for a server, address or not.
fn is_server(line: &[u8]) -> bool {
    line.trim_ascii_start()
        .strip_prefix(b"nameserver")
        .is_some_and(|rest| rest.first().is_none_or(u8::is_ascii_whitespace))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const SERVER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 20, 10));

    fn edited(text: &str) -> String {
        String::from_utf8(edit(text.as_bytes(), SERVER)).unwrap()
    }

    /// Texts made of lines that matter, and of anything.
    fn text() -> impl Strategy<Value = Vec<u8>> {
        let known: Vec<Vec<u8>> =
            [BEGIN, HINT, END, ASIDE, b"nameserver 192.0.2.53", b"nameserver", b"#muster: x"]
                .map(<[u8]>::to_vec)
                .into();
        let line = prop_oneof![
            3 => proptest::sample::select(known),
            1 => Just(b"search a b\r".to_vec()),
            2 => vec(any::<u8>(), 0..20),
        ];
        let end = prop_oneof![Just(b"\n".to_vec()), Just(b"".to_vec()), Just(b" \n".to_vec())];
        vec((line, end), 0..12)
            .prop_map(|lines| lines.into_iter().flat_map(|(l, e)| [l, e].concat()).collect())
    }

    #[test]
    fn our_server_is_alone_in_force_and_the_rest_is_kept() {
        let text = "# ours\nsearch corp.example\nnameserver 192.0.2.53\n\tnameserver ::1\noptions timeout:1";
        let edited = edited(text);
        assert_eq!(servers(edited.as_bytes()), [SERVER]);
        assert!(edited.contains("doctor --fix"), "{edited}");
        for kept in [
            "\n# ours\n",
            "\nsearch corp.example\n",
            "\noptions timeout:1",
            "#muster: nameserver 192.0.2.53\n",
        ] {
            assert!(edited.contains(kept), "{kept}: {edited}");
        }
        assert_eq!(undo(edited.as_bytes()), text.as_bytes());
    }

    #[test]
    fn what_others_add_to_the_edit_outlives_it() {
        let grown = edited("nameserver 192.0.2.53\n") + "options edns0\n";
        assert_eq!(undo(grown.as_bytes()), b"nameserver 192.0.2.53\noptions edns0\n");
        let headed = format!("# Generated\n{}", edited("nameserver 192.0.2.53\n"));
        assert_eq!(undo(headed.as_bytes()), b"# Generated\nnameserver 192.0.2.53\n");
    }

    #[test]
    fn a_damaged_edit_gives_the_servers_back() {
        let text = "search a\nnameserver 192.0.2.53\n";
        for cut in ["# END Muster\n", "# BEGIN Muster"] {
            let damaged = edited(text).replace(cut, "");
            assert_eq!(mark(damaged.as_bytes()), Mark::Damaged);
            let salvaged = salvage(damaged.as_bytes());
            assert!(servers(&salvaged).contains(&"192.0.2.53".parse().unwrap()), "{cut}");
        }
        let cut = edited(text).replace("# END Muster\n", "");
        assert_eq!(salvage(cut.as_bytes()), text.as_bytes());
    }

    proptest! {
        #[test]
        fn undo_gives_back_what_was_edited(text in text()) {
            let before = undo(&text);
            let edited = edit(&text, SERVER);
            prop_assert_eq!(mark(&edited), Mark::Edited);
            prop_assert_eq!(&undo(&edited), &before);
            prop_assert_eq!(servers(&edited), vec![SERVER]);
            if mark(&text) == Mark::None {
                prop_assert_eq!(&before, &text);
            }
        }

        #[test]
        fn editing_twice_is_editing_once(text in text()) {
            let once = edit(&text, SERVER);
            prop_assert_eq!(edit(&once, SERVER), once);
        }

        #[test]
        fn anything_can_be_read(text in vec(any::<u8>(), 0..300)) {
            let _ = (mark(&text), salvage(&text), servers(&text));
            prop_assert_eq!(undo(&edit(&text, SERVER)), undo(&text));
        }
    }
}
