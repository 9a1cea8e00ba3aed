//! From the bytes of a line to messages.

use crate::{CRC, CRC_BYTES, MAX_MESSAGE, Message, VERSION};

/// Why a frame was thrown away. The next one is read as if this one had not been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Cut short, or its CRC is wrong: noise, or bytes that were lost.
    Damaged,
    /// Longer than any message: no frame of this format.
    TooLong,
    /// A whole frame of another version of the format.
    Version(u8),
    /// A whole frame with a message that this version does not know.
    Unknown,
}

impl core::fmt::Display for Fault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Damaged => write!(f, "a frame is damaged"),
            Self::TooLong => write!(f, "a frame is longer than any message"),
            Self::Version(version) => write!(f, "a frame has version {version} of the format, this program reads {VERSION}"),
            Self::Unknown => write!(f, "a frame holds a message that this program does not know"),
        }
    }
}

impl core::error::Error for Fault {}

/// Takes the bytes of a line, one by one or as they come, and gives the messages in them.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// The frame so far, without its stuffing.
    message: [u8; MAX_MESSAGE],
    length: usize,
    /// The last code byte, 0 before the first.
    code: u8,
    /// Bytes until the next code byte.
    until_code: u8,
    overflowed: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder at the beginning of a frame.
    #[must_use]
    pub const fn new() -> Self {
        Self { message: [0; MAX_MESSAGE], length: 0, code: 0, until_code: 0, overflowed: false }
    }

    /// Takes a byte; a message where it ends a frame. Texts borrow from the decoder.
    pub fn push(&mut self, byte: u8) -> Option<Result<Message<'_>, Fault>> {
        if byte == 0 {
            return self.end();
        }
        if self.until_code > 0 {
            self.until_code -= 1;
            self.keep(byte);
        } else {
            // A run of 254 bytes has no zero behind it, nor does the last of a frame: another code must follow.
            if self.code != 0 && self.code != 0xFF {
                self.keep(0);
            }
            (self.code, self.until_code) = (byte, byte - 1);
        }
        None
    }

    fn keep(&mut self, byte: u8) {
        match self.message.get_mut(self.length) {
            Some(place) => {
                *place = byte;
                self.length += 1;
            }
            None => self.overflowed = true,
        }
    }

    fn end(&mut self) -> Option<Result<Message<'_>, Fault>> {
        let (length, code, until_code, overflowed) = (self.length, self.code, self.until_code, self.overflowed);
        (self.length, self.code, self.until_code, self.overflowed) = (0, 0, 0, false);
        if code == 0 {
            return None;
        }
        if overflowed {
            return Some(Err(Fault::TooLong));
        }
        if until_code > 0 {
            return Some(Err(Fault::Damaged));
        }
        Some(message(&self.message[..length]))
    }
}

fn message(bytes: &[u8]) -> Result<Message<'_>, Fault> {
    let (body, crc) = bytes.split_last_chunk::<CRC_BYTES>().ok_or(Fault::Damaged)?;
    if CRC.checksum(body) != u32::from_le_bytes(*crc) {
        return Err(Fault::Damaged);
    }
    match body.split_first() {
        Some((&VERSION, fields)) => match postcard::take_from_bytes(fields) {
            Ok((message, [])) => Ok(message),
            _ => Err(Fault::Unknown),
        },
        Some((&version, _)) => Err(Fault::Version(version)),
        None => Err(Fault::Damaged),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::format;
    use std::string::String;
    use std::vec::Vec;

    use super::*;
    use crate::{Caption, Hello, MAX_FRAME, Stats, encode};

    const CAPTION: Message<'_> = Message::Caption(Caption {
        sequence: 41,
        captured_ms: 1_732_472_801_123,
        latency_ms: 132,
        score: -0.25,
        text: "zwei Hunde laufen \u{fc}ber den Strand",
    });

    fn frame(message: &Message<'_>) -> Vec<u8> {
        encode(message, &mut [0; MAX_FRAME]).unwrap().to_vec()
    }

    /// Everything that a decoder gives, in words.
    fn given(bytes: impl IntoIterator<Item = u8>) -> Vec<String> {
        let mut decoder = Decoder::new();
        bytes.into_iter().filter_map(|byte| decoder.push(byte).map(|given| format!("{given:?}"))).collect()
    }

    fn said(message: &Message<'_>) -> String {
        format!("{:?}", Ok::<_, Fault>(message))
    }

    /// A frame as another sender would write it: right CRC and stuffing around any bytes without zeros.
    fn foreign(body: &[u8]) -> Vec<u8> {
        let mut raw = body.to_vec();
        raw.extend(CRC.checksum(body).to_le_bytes());
        let mut frame = Vec::new();
        for run in raw.split(|&byte| byte == 0) {
            assert!(run.len() < 254);
            frame.push(run.len() as u8 + 1);
            frame.extend(run);
        }
        frame.push(0);
        frame
    }

    #[test]
    fn every_flipped_bit_is_noticed_and_the_next_frame_read() {
        let next = Message::Stats(Stats { frames: 3, temperature_c: Some(51.5), ..Stats::default() });
        let (clean, next_frame) = (frame(&CAPTION), frame(&next));
        for at in 0..clean.len() {
            for bit in 0..8 {
                let mut line = clean.clone();
                line[at] ^= 1 << bit;
                line.extend(&next_frame);
                // Where the closing zero is hit, the frame behind is swallowed too: no sender can help that.
                let swallowed = at == clean.len() - 1;
                let found = given(line);
                let good: Vec<String> = found.iter().filter(|said| said.starts_with("Ok")).cloned().collect();
                assert_eq!(good, if swallowed { Vec::new() } else { Vec::from([said(&next)]) }, "bit {bit} of byte {at}");
                assert!(found.len() > good.len(), "bit {bit} of byte {at} went unnoticed");
            }
        }
    }

    #[test]
    fn whatever_lies_between_frames_is_thrown_away() {
        let hello = Message::Hello(Hello { program: "0.1.0", source: "rpicam://0" });
        let whole = frame(&hello);
        // A line joined at any place within a frame.
        for from in 1..whole.len() {
            let mut line = whole[from..].to_vec();
            line.extend(frame(&CAPTION));
            let found = given(line);
            assert_eq!(found.last(), Some(&said(&CAPTION)), "joined at byte {from}");
            assert!(found[..found.len() - 1].iter().all(|said| said.starts_with("Err")), "joined at byte {from}: {found:?}");
        }
        // Zeros alone are no frame.
        let mut line = Vec::from([0; 9]);
        line.extend(&whole);
        line.extend([0, 0]);
        assert_eq!(given(line), [said(&hello)]);
        // Text of a boot loader, then a frame without a zero before it is lost; the one behind it is not.
        let mut line = b"U-Boot 2024.01\r\n".to_vec();
        line.extend(&whole);
        line.extend(frame(&CAPTION));
        assert_eq!(given(line), [String::from("Err(Damaged)"), said(&CAPTION)]);
    }

    #[test]
    fn a_frame_cut_anywhere_is_damaged() {
        let whole = frame(&CAPTION);
        for length in 1..whole.len() - 1 {
            let mut line = whole[..length].to_vec();
            line.push(0);
            line.extend(&whole);
            assert_eq!(given(line), [String::from("Err(Damaged)"), said(&CAPTION)], "cut to {length} bytes");
        }
    }

    #[test]
    fn bytes_lost_or_doubled_are_noticed() {
        let whole = frame(&CAPTION);
        for at in 0..whole.len() - 1 {
            let mut lost = whole.clone();
            lost.remove(at);
            let mut doubled = whole.clone();
            doubled.insert(at, whole[at]);
            for line in [lost, doubled] {
                // Where two equal bytes follow each other inside the CRC or the text, the frame is another one all the same.
                assert_eq!(given(line), ["Err(Damaged)"], "at byte {at}");
            }
        }
    }

    #[test]
    fn whole_frames_of_others_are_named() {
        let cases: [(&[u8], Fault); 6] = [
            (&[2, 1, 5, 5], Fault::Version(2)),
            (&[VERSION, 9], Fault::Unknown),
            (&[VERSION], Fault::Unknown),
            // A text that is not UTF-8, one longer than the frame, and a byte too many.
            (&[VERSION, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0xC3, 0x28], Fault::Unknown),
            (&[VERSION, 1, 1, 1, 1, 1, 1, 1, 1, 9, 0x41], Fault::Unknown),
            (&[VERSION, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0x41, 7], Fault::Unknown),
        ];
        for (body, fault) in cases {
            assert_eq!(given(foreign(body)), [format!("Err({fault:?})")], "{body:?}");
        }
        assert_eq!(given(foreign(&[])), ["Err(Damaged)"]);
        assert_eq!(given(foreign(&[VERSION, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0x41])).len(), 1);
    }

    #[test]
    fn frames_without_an_end_take_no_memory() {
        let mut line: Vec<u8> = core::iter::repeat_n(b'x', 3 * MAX_FRAME).collect();
        line.push(0);
        line.extend(frame(&CAPTION));
        assert_eq!(given(line), [String::from("Err(TooLong)"), said(&CAPTION)]);
    }

    #[test]
    fn noise_never_panics_and_never_passes() {
        let mut state = 7u64;
        let mut decoder = Decoder::new();
        let mut frames = 0;
        for _ in 0..400_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Zeros are more frequent than in noise, so that there are more frames.
            let byte = if state >> 60 == 0 { 0 } else { (state >> 33) as u8 };
            match decoder.push(byte) {
                Some(Ok(message)) => panic!("{message:?}"),
                Some(Err(_)) => frames += 1,
                None => {}
            }
        }
        assert!(frames > 10_000, "{frames}");
    }
}
