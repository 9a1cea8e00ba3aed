//! Captions as frames on a serial line or pipe, for both ends: no `std`, no allocation.
//!
//! A frame is a message in [postcard](https://postcard.jamesmunns.com/wire-format)'s encoding, a CRC, all of it
//! [COBS](https://doi.org/10.1109/90.769765)-stuffed so that no byte of it is zero, and a zero byte:
//!
//! | bytes | before stuffing |
//! |---|---|
//! | 1 | version of this format, 1 |
//! | 1 | type of the message: 0 hello, 1 caption, 2 stats |
//! | n | the message's fields, in the order of [`Hello`], [`Caption`] or [`Stats`] |
//! | 4 | CRC-32/ISO-HDLC (zlib's) of everything before, lowest byte first |
//!
//! Integers are varints (7 bits a byte, lowest first, the top bit set where more follow), `f32` are 4 bytes, lowest first; a
//! text is its length in bytes as a varint and its UTF-8; an option is 0, or 1 and the value. Zero bytes between frames mean
//! nothing. A sender begins with a zero byte, to end what the line may hold, and a hello; a reader that joins late
//! throws away everything up to the next zero byte.
//!
//! ```
//! use unimo_wire::{Caption, Decoder, MAX_FRAME, Message, encode};
//!
//! let caption = Caption { sequence: 7, captured_ms: 1_700_000_000_000, latency_ms: 132, score: -0.4, text: "a blue heart" };
//! let mut buffer = [0; MAX_FRAME];
//! let frame = encode(&Message::Caption(caption), &mut buffer)?;
//!
//! let mut decoder = Decoder::new();
//! for &byte in frame {
//!     if let Some(Ok(Message::Caption(caption))) = decoder.push(byte) {
//!         assert_eq!(caption.text, "a blue heart");
//!     }
//! }
//! # Ok::<(), unimo_wire::TooLong>(())
//! ```

#![no_std]
#![forbid(unsafe_code)]

mod decoder;
mod encoder;

use crc::{CRC_32_ISO_HDLC, Crc};
use serde::{Deserialize, Serialize};

pub use self::decoder::{Decoder, Fault};
pub use self::encoder::{TooLong, encode};

/// Version of the format, the first byte of every message.
pub const VERSION: u8 = 1;
/// Most bytes of a text; longer ones are cut at the end of a character.
pub const MAX_TEXT: usize = 256;
/// Most bytes of a message with its CRC, before stuffing: the longest is a hello with two texts.
pub const MAX_MESSAGE: usize = 2 + 2 * (2 + MAX_TEXT) + CRC_BYTES;
/// Most bytes of a frame: stuffing adds a byte to each 254, and the zero at the end.
pub const MAX_FRAME: usize = MAX_MESSAGE + MAX_MESSAGE.div_ceil(254) + 1;

const CRC_BYTES: usize = 4;
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// What the line carries. The number of a variant is the type in the frame.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Message<'a> {
    /// The sender began, or began again.
    #[serde(borrow)]
    Hello(Hello<'a>),
    /// A picture was captioned.
    Caption(Caption<'a>),
    /// How the sender is doing, now and then.
    Stats(Stats),
}

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Hello<'a> {
    /// Version of the program that sends.
    pub program: &'a str,
    /// The camera's name.
    pub source: &'a str,
}

/// A captioned picture.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Caption<'a> {
    /// Number of the frame, counted by the camera.
    pub sequence: u64,
    /// When it was captured: milliseconds since 1970, UTC.
    pub captured_ms: u64,
    /// Time from the start of the work on it to its caption.
    pub latency_ms: u32,
    /// Log-probability of the caption, normalised by its length.
    pub score: f32,
    /// The caption.
    pub text: &'a str,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Frames that the camera gave.
    pub frames: u64,
    /// Those captioned.
    pub captioned: u64,
    /// Those passed over because the scene had not changed.
    pub unchanged: u64,
    /// Those dropped because the model was busy.
    pub dropped: u64,
    /// Those that could not be decoded.
    pub corrupt: u64,
    /// Times the camera was lost and found again.
    pub reconnects: u64,
    /// Times the camera was silent for too long.
    pub stalls: u64,
    /// The board's temperature, where it can be read.
    pub temperature_c: Option<f32>,
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn the_crc_is_zlibs() {
        // The check value of the catalogue of CRCs, and of `zlib.crc32(b"123456789")`.
        assert_eq!(CRC.checksum(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn frames_are_those_of_the_reference() {
        // Printed by reference/frames.py, which shares nothing with this crate.
        let reference = include_str!("../reference/frames.txt");
        let text = "\u{e9}".repeat(127);
        let caption = |text| Caption { sequence: 300, captured_ms: 1_732_472_801_123, latency_ms: 132, score: -0.5, text };
        let stats = Stats { frames: 1000, captioned: 24, unchanged: 6, dropped: 970, ..Stats::default() };
        let messages = [
            ("hello", Message::Hello(Hello { program: "0.1.0", source: "v4l2:///dev/video0" })),
            ("caption", Message::Caption(caption("a small blue heart at the top"))),
            ("empty", Message::Caption(Caption { sequence: 0, captured_ms: 0, latency_ms: 0, score: 0.0, text: "" })),
            ("long", Message::Caption(caption(&text))),
            ("stats", Message::Stats(stats)),
            ("warm", Message::Stats(Stats { corrupt: 1, reconnects: 2, stalls: 3, temperature_c: Some(48.25), ..stats })),
        ];
        let mut lines = reference.lines();
        for (name, message) in messages {
            let mut buffer = [0; MAX_FRAME];
            let frame = encode(&message, &mut buffer).unwrap();
            let hex: std::string::String = frame.iter().map(|byte| std::format!("{byte:02x}")).collect();
            assert_eq!(Some(std::format!("{name} {hex}").as_str()), lines.next());
            let mut decoder = Decoder::new();
            let found = frame.iter().filter_map(|&byte| decoder.push(byte).map(|found| found.map(|found| found == message)));
            assert_eq!(found.collect::<std::vec::Vec<_>>(), [Ok(true)], "{name}");
        }
        assert_eq!(lines.next(), None);
    }
}
