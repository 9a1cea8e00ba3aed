//! What goes over a connection between two ranks: a hello, then frames.

use std::io::{self, Read, Write};

/// Goes first over every connection; its number is raised when what follows changes.
pub(super) const MAGIC: [u8; 16] = *b"unimo-ranks  1\r\n";

/// What the magics of all versions start with.
pub(super) const PROGRAM: &[u8] = b"unimo-ranks ";

/// No frame is longer: a length above it is a stranger's.
pub(super) const LONGEST: usize = 256 << 20;

/// Bytes of a frame's head: its kind, three of nothing, its tag, its length.
const HEAD: usize = 12;

/// Frames up to this length go out in one piece with their heads.
const SMALL: usize = 1 << 14;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A part of an exchange, of which the tag is the number.
    Data = 1,
    /// The sender lives.
    Beat = 2,
    /// The sender leaves; with a text, because of it.
    Left = 3,
    /// Who the sender is.
    Hello = 4,
    /// Where all ranks listen.
    Table = 5,
    /// The receiver is not wanted, and why.
    Refused = 6,
}

/// A frame as received.
#[derive(Debug)]
pub(super) struct Frame {
    pub kind: Kind,
    pub tag: u32,
    pub bytes: Vec<u8>,
}

pub(super) fn write(to: &mut impl Write, kind: Kind, tag: u32, bytes: &[u8]) -> io::Result<()> {
    let mut head = Vec::with_capacity(HEAD + SMALL);
    head.extend([kind as u8, 0, 0, 0]);
    head.extend(tag.to_le_bytes());
    head.extend((bytes.len() as u32).to_le_bytes());
    if bytes.len() <= SMALL {
        head.extend(bytes);
        return to.write_all(&head);
    }
    to.write_all(&head)?;
    to.write_all(bytes)
}

/// The next frame, or nothing where the connection was closed after the last one.
pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut head = [0; HEAD];
    let mut filled = 0;
    while filled < HEAD {
        match from.read(&mut head[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let kind = match head[0] {
        1 => Kind::Data,
        2 => Kind::Beat,
        3 => Kind::Left,
        4 => Kind::Hello,
        5 => Kind::Table,
        6 => Kind::Refused,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "what came is not a frame")),
    };
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (tag, length) = (number(4), number(8) as usize);
    if length > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "what came is not a frame"));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok(Some(Frame { kind, tag, bytes }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in_and_damage_is_an_error() {
        let mut sent = Vec::new();
        let long = vec![7; SMALL + 1];
        for (kind, tag, bytes) in [(Kind::Data, 9, &long[..]), (Kind::Beat, 0, &[]), (Kind::Left, u32::MAX, b"why")] {
            write(&mut sent, kind, tag, bytes).unwrap();
        }
        let mut from = sent.as_slice();
        for (kind, tag, bytes) in [(Kind::Data, 9, &long[..]), (Kind::Beat, 0, &[]), (Kind::Left, u32::MAX, b"why")] {
            let frame = read(&mut from).unwrap().unwrap();
            assert_eq!((frame.kind, frame.tag, frame.bytes.as_slice()), (kind, tag, bytes));
        }
        assert!(read(&mut from).unwrap().is_none());
        // Cut in the head, cut in the body, of no kind, too long.
        assert!(read(&mut &sent[..5]).is_err() && read(&mut &sent[..100]).is_err());
        assert!(read(&mut &b"GET / HTTP/1.1\r\n"[..]).is_err());
        let too_long = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &u32::MAX.to_le_bytes()].concat();
        assert_eq!(read(&mut too_long.as_slice()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
