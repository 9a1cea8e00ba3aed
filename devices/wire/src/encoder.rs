//! From a message to the bytes of its frame.

use postcard::ser_flavors::crc::CrcModifier;
use postcard::ser_flavors::{Cobs, Slice};

use crate::{CRC, MAX_FRAME, MAX_TEXT, Message, VERSION};

/// The frame has no room in the buffer, which [`MAX_FRAME`] bytes always have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong;

impl core::fmt::Display for TooLong {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "the message has no room in a frame of {MAX_FRAME} bytes")
    }
}

impl core::error::Error for TooLong {}

/// Writes a message's frame, its zero byte included, to the front of `buffer`, and gives that part of it. Texts longer than
/// [`MAX_TEXT`] bytes are cut.
///
/// # Errors
/// A buffer that is too small; one of [`MAX_FRAME`] bytes never is.
pub fn encode<'b>(message: &Message<'_>, buffer: &'b mut [u8]) -> Result<&'b [u8], TooLong> {
    let message = match *message {
        Message::Hello(mut hello) => {
            (hello.program, hello.source) = (cut(hello.program), cut(hello.source));
            Message::Hello(hello)
        }
        Message::Caption(mut caption) => {
            caption.text = cut(caption.text);
            Message::Caption(caption)
        }
        stats @ Message::Stats(_) => stats,
    };
    // What is pushed passes the CRC first and is stuffed then.
    Cobs::try_new(Slice::new(buffer))
        .and_then(|stuffed| postcard::serialize_with_flavor(&(VERSION, message), CrcModifier::new(stuffed, CRC.digest())))
        .map(|frame| &*frame)
        .map_err(|_| TooLong)
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT)]
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::*;
    use crate::{Caption, Decoder, Hello, MAX_MESSAGE, Stats};

    /// All that a decoder makes of the bytes, with the text that is looked at.
    fn texts(bytes: &[u8]) -> Vec<std::string::String> {
        let mut decoder = Decoder::new();
        let mut texts = Vec::new();
        for &byte in bytes {
            match decoder.push(byte) {
                Some(Ok(Message::Hello(hello))) => texts.push(hello.source.into()),
                Some(Ok(Message::Caption(caption))) => texts.push(caption.text.into()),
                Some(other) => panic!("{other:?}"),
                None => {}
            }
        }
        texts
    }

    #[test]
    fn the_longest_messages_fit_and_longer_texts_are_cut_between_characters() {
        let (long, wide) = ("x".repeat(1000), "\u{1f600}".repeat(100));
        let odd = std::format!("x{wide}");
        let caption = |text| Caption { sequence: u64::MAX, captured_ms: u64::MAX, latency_ms: u32::MAX, score: f32::MAX, text };
        let n = u64::MAX;
        let (frames, captioned, unchanged, dropped, corrupt, reconnects, stalls) = (n, n, n, n, n, n, n);
        let temperature_c = Some(f32::MAX);
        let stats = Stats { frames, captioned, unchanged, dropped, corrupt, reconnects, stalls, temperature_c };
        let mut buffer = [0; MAX_FRAME];
        assert_eq!(texts(encode(&Message::Caption(caption(&long)), &mut buffer).unwrap()), [&long[..256]]);
        assert_eq!(texts(encode(&Message::Caption(caption(&wide)), &mut buffer).unwrap()), [&wide[..256]]);
        assert_eq!(texts(encode(&Message::Caption(caption(&odd)), &mut buffer).unwrap()), [&odd[..253]]);
        let hello = encode(&Message::Hello(Hello { program: &long, source: &long }), &mut buffer).unwrap();
        assert_eq!(hello.len(), MAX_FRAME, "the longest frame has no zero to save a byte by");
        assert_eq!(texts(hello), [&long[..256]]);
        assert!(encode(&Message::Stats(stats), &mut buffer).unwrap().len() < MAX_MESSAGE);
        assert_eq!(encode(&Message::Caption(caption("words")), &mut [0; 20]), Err(TooLong));
    }

    #[test]
    fn a_frame_holds_one_zero_at_its_end() {
        for length in 0..=MAX_TEXT {
            for filler in ["\0", "\u{1}", "\u{7f}"] {
                let text = filler.repeat(length);
                let caption = Caption { sequence: 0, captured_ms: 256, latency_ms: 0, score: 0.0, text: &text };
                let mut buffer = [0xAA; MAX_FRAME];
                let frame = encode(&Message::Caption(caption), &mut buffer).unwrap();
                assert_eq!(frame.iter().position(|&byte| byte == 0), Some(frame.len() - 1), "{length} of {filler:?}");
                assert_eq!(texts(frame), [text]);
            }
        }
    }
}
