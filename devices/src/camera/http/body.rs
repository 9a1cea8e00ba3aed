//! The body of an HTTP answer: as it is, or in chunks (RFC 9112, section 7.1).

/// What is wrong with a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BodyError {
    #[error("the server's chunk begins with no size")]
    NoSize,
    #[error("the server's chunk is larger than any may be")]
    TooLarge,
    #[error("the server's chunk does not end where it says")]
    NoEnd,
}

/// Most digits of a chunk's size, and most bytes of the line that holds it.
const MAX_DIGITS: u32 = 8;
const MAX_LINE: u32 = 1024;

/// Where the decoder stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The body is not chunked.
    Plain,
    /// In the line of a size: the size so far, its digits, and the line's bytes.
    Size { size: u64, digits: u32, length: u32 },
    /// In a chunk: bytes that are left of it.
    Data { left: u64 },
    /// Behind a chunk: whether its CR has come.
    End { after_cr: bool },
    /// Behind the last chunk.
    Complete,
    /// Behind what is no chunk.
    Broken(BodyError),
}

/// Takes the chunks off a body.
#[derive(Debug)]
pub(super) struct Body(State);

impl Body {
    pub(super) fn new(chunked: bool) -> Self {
        Self(if chunked { NEXT_CHUNK } else { State::Plain })
    }

    /// Whether the last chunk has come.
    ///
    /// # Errors
    /// Where what came is not chunked as it should be.
    pub(super) fn is_complete(&self) -> Result<bool, BodyError> {
        match self.0 {
            State::Broken(error) => Err(error),
            state => Ok(state == State::Complete),
        }
    }

    /// The contents in the next bytes, up to the body's end or the first fault in it.
    pub(super) fn decode(&mut self, mut bytes: &[u8]) -> Vec<u8> {
        let mut contents = Vec::with_capacity(bytes.len());
        while let Some((&byte, rest)) = bytes.split_first() {
            self.0 = match self.0 {
                State::Plain => {
                    contents.extend_from_slice(bytes);
                    return contents;
                }
                State::Complete | State::Broken(_) => return contents,
                State::Data { left } => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    contents.extend_from_slice(&bytes[..taken]);
                    bytes = &bytes[taken..];
                    let left = left - taken as u64;
                    self.0 = if left == 0 { State::End { after_cr: false } } else { State::Data { left } };
                    continue;
                }
                State::Size { digits: 0, .. } if !byte.is_ascii_hexdigit() => State::Broken(BodyError::NoSize),
                State::Size { length: MAX_LINE, .. } => State::Broken(BodyError::NoSize),
                State::Size { size: 0, .. } if byte == b'\n' => State::Complete,
                State::Size { size, .. } if byte == b'\n' => State::Data { left: size },
                State::Size { size, digits, length } => match char::from(byte).to_digit(16) {
                    // Behind the size there may be an extension, whose letters are no digits of it.
                    Some(digit) if digits == length => {
                        if digits == MAX_DIGITS {
                            State::Broken(BodyError::TooLarge)
                        } else {
                            State::Size { size: size * 16 + u64::from(digit), digits: digits + 1, length: length + 1 }
                        }
                    }
                    _ => State::Size { size, digits, length: length + 1 },
                },
                State::End { after_cr: false } if byte == b'\r' => State::End { after_cr: true },
                State::End { .. } if byte == b'\n' => NEXT_CHUNK,
                State::End { .. } => State::Broken(BodyError::NoEnd),
            };
            bytes = rest;
        }
        contents
    }
}

const NEXT_CHUNK: State = State::Size { size: 0, digits: 0, length: 0 };

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(pieces: &[&[u8]]) -> Result<(Vec<u8>, bool), BodyError> {
        let mut body = Body::new(true);
        let mut contents = Vec::new();
        for piece in pieces {
            contents.extend(body.decode(piece));
        }
        body.is_complete().map(|complete| (contents, complete))
    }

    #[test]
    fn chunks_cut_anywhere_give_the_same_contents() {
        let body = b"4\r\nWiki\r\n6;name=\"abc\"\r\npedia \r\n00E\nin \r\n\r\nchunks.\n0\r\n\r\nbeyond";
        let expected = Ok((b"Wikipedia in \r\n\r\nchunks.".to_vec(), true));
        for cut in 0..body.len() {
            let (head, tail) = body.split_at(cut);
            assert_eq!(decode(&[head, tail]), expected, "{cut}");
        }
        let bytes: Vec<&[u8]> = body.chunks(1).collect();
        assert_eq!(decode(&bytes), expected);
        assert_eq!(decode(&[b"A\r\n12345"]), Ok((b"12345".to_vec(), false)));
    }

    #[test]
    fn malformed_chunks_are_refused() {
        assert_eq!(decode(&[b"\r\nabc"]), Err(BodyError::NoSize));
        assert_eq!(decode(&[b"xyz\r\n"]), Err(BodyError::NoSize));
        assert_eq!(decode(&[b"123456789\r\n"]), Err(BodyError::TooLarge));
        assert_eq!(decode(&[b"1\r\nab"]), Err(BodyError::NoEnd));
        assert_eq!(decode(&[b"1\r\na\r\r"]), Err(BodyError::NoEnd));
        assert_eq!(decode(&[b"1;", &[b'x'; 2000]]), Err(BodyError::NoSize));
        // What came before the fault is not lost.
        assert_eq!(Body::new(true).decode(b"2\r\nab\r\nwhat?"), b"ab");
    }

    #[test]
    fn a_plain_body_is_itself() {
        let mut body = Body::new(false);
        assert_eq!(body.decode(b"0\r\n\r\nabc"), b"0\r\n\r\nabc");
        assert_eq!(body.is_complete(), Ok(false));
    }
}
