//! Cutting a stream of bytes into JPEGs, by their markers (ITU-T T.81, annex B).
//!
//! Segments are skipped by their lengths, so that a thumbnail inside a picture does not end it. What lies between pictures is
//! passed over: cameras pad with zeros.

use std::ops::Range;

const START: u8 = 0xD8;
const END: u8 = 0xD9;
const SCAN: u8 = 0xDA;

/// A complete JPEG.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Jpeg {
    pub(super) bytes: Vec<u8>,
    pub(super) width: u32,
    pub(super) height: u32,
}

/// Why a picture was thrown away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Damage {
    #[error("cut short: the next picture begins before its end")]
    CutByNext,
    #[error("cut short: the stream ends in it")]
    CutByEnd,
    #[error("not a JPEG: a marker is missing")]
    NoMarker,
    #[error("a JPEG without a picture in it")]
    NoPicture,
    #[error("larger than the {0} bytes allowed")]
    TooLarge(usize),
    #[error("of another size, behind a damaged picture: a thumbnail in it")]
    Stray,
}

/// Collects bytes and gives the JPEGs in them.
#[derive(Debug)]
pub(super) struct JpegSplitter {
    buffer: Vec<u8>,
    /// Where the buffer has been read up to, while looking for a picture or within one.
    at: usize,
    /// Within a picture, which then begins at the buffer's start.
    picture: Option<Walk>,
    max_bytes: usize,
    ended: bool,
    /// Size of the last good picture.
    size: Option<(u32, u32)>,
    after_damage: bool,
    doubtful: Option<(u32, u32)>,
}

/// A walk along the markers of one JPEG.
#[derive(Debug, Default)]
struct Walk {
    in_scan: bool,
    scans: u32,
    size: Option<(u32, u32)>,
}

/// Where a walk has come to.
enum Step {
    /// More bytes are needed.
    Starved,
    /// The picture ends here.
    Complete(usize),
    Damaged(Damage),
}

impl Walk {
    /// Walks on from `at`, which is moved, so that nothing is looked at twice.
    fn on(&mut self, bytes: &[u8], at: &mut usize) -> Step {
        loop {
            if self.in_scan {
                // Entropy-coded data: up to a marker that is neither a stuffed zero, a restart nor filling.
                let Some(found) = find(bytes, *at..bytes.len(), 0xFF) else {
                    *at = bytes.len();
                    return Step::Starved;
                };
                *at = found;
                match bytes.get(found + 1) {
                    None => return Step::Starved,
                    Some(0x00 | 0xD0..=0xD7) => *at += 2,
                    Some(0xFF) => *at += 1,
                    Some(_) => self.in_scan = false,
                }
                continue;
            }
            let (marker, length) = match bytes.get(*at..).unwrap_or_default() {
                [0xFF, 0xFF, ..] => {
                    *at += 1;
                    continue;
                }
                [0xFF, 0x01 | 0xD0..=0xD7, ..] => {
                    *at += 2;
                    continue;
                }
                [0xFF, START, ..] => return Step::Damaged(Damage::CutByNext),
                [0xFF, END, ..] if self.scans == 0 => return Step::Damaged(Damage::NoPicture),
                [0xFF, END, ..] => return Step::Complete(*at + 2),
                [0xFF, 0x00, ..] => return Step::Damaged(Damage::NoMarker),
                [0xFF, marker, high, low, ..] => (*marker, usize::from(u16::from_be_bytes([*high, *low]))),
                [] | [0xFF] | [0xFF, _] | [0xFF, _, _] => return Step::Starved,
                _ => return Step::Damaged(Damage::NoMarker),
            };
            if length < 2 {
                return Step::Damaged(Damage::NoMarker);
            }
            let Some(segment) = bytes.get(*at + 4..*at + 2 + length) else { return Step::Starved };
            match marker {
                // Frame headers: 0xC4, 0xC8 and 0xCC share their range and are none.
                0xC0..=0xCF if !matches!(marker, 0xC4 | 0xC8 | 0xCC) => {
                    let [_, h1, h2, w1, w2, components, ref rest @ ..] = *segment else {
                        return Step::Damaged(Damage::NoMarker);
                    };
                    if self.size.is_some() || rest.len() != 3 * usize::from(components) {
                        return Step::Damaged(Damage::NoMarker);
                    }
                    self.size = Some((u16::from_be_bytes([w1, w2]).into(), u16::from_be_bytes([h1, h2]).into()));
                }
                SCAN if self.size.is_none() => return Step::Damaged(Damage::NoPicture),
                SCAN => {
                    self.scans += 1;
                    self.in_scan = true;
                }
                _ => {}
            }
            *at += 2 + length;
        }
    }
}

impl JpegSplitter {
    /// A splitter that throws larger pictures away.
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            buffer: Vec::new(),
            at: 0,
            picture: None,
            max_bytes,
            ended: false,
            size: None,
            after_damage: false,
            doubtful: None,
        }
    }

    /// Adds bytes. Call [`next`](Self::next) until it gives nothing before adding more: that bounds the memory.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next picture in the bytes so far, or the next damaged one; `None` where more bytes are needed.
    pub(super) fn next(&mut self) -> Option<Result<Jpeg, Damage>> {
        loop {
            let Some(walk) = &mut self.picture else {
                if self.seek() {
                    continue;
                }
                return None;
            };
            let step = walk.on(&self.buffer, &mut self.at);
            let size = walk.size.unwrap_or_default();
            match step {
                Step::Complete(end) if end > self.max_bytes => return Some(Err(self.damaged(Damage::TooLarge(self.max_bytes)))),
                Step::Complete(end) => {
                    let bytes = self.buffer.drain(..end).collect();
                    self.picture = None;
                    self.at = 0;
                    if !self.is_trusted(size) {
                        return Some(Err(Damage::Stray));
                    }
                    return Some(Ok(Jpeg { bytes, width: size.0, height: size.1 }));
                }
                Step::Starved if self.buffer.len() > self.max_bytes => {
                    return Some(Err(self.damaged(Damage::TooLarge(self.max_bytes))));
                }
                Step::Starved if self.ended => return Some(Err(self.damaged(Damage::CutByEnd))),
                Step::Starved => return None,
                Step::Damaged(damage) => return Some(Err(self.damaged(damage))),
            }
        }
    }

    /// Says that no bytes will follow: [`next`](Self::next) then tells what is cut short.
    pub(super) fn finish(&mut self) {
        self.ended = true;
    }

    /// Looks for the start of a picture, and moves it to the buffer's start.
    fn seek(&mut self) -> bool {
        while let Some(found) = find(&self.buffer, self.at..self.buffer.len(), 0xFF) {
            self.at = found;
            match self.buffer.get(found + 1..) {
                Some([START, 0xFF, ..]) => {
                    self.buffer.drain(..found);
                    self.at = 2;
                    self.picture = Some(Walk::default());
                    return true;
                }
                Some([] | [START]) | None => {
                    self.buffer.drain(..found);
                    self.at = 0;
                    return false;
                }
                Some(_) => self.at += 1,
            }
        }
        self.buffer.clear();
        self.at = 0;
        false
    }

    /// Gives a picture up. The search goes on right behind its start, since a wrong length may have led past the next picture.
    fn damaged(&mut self, damage: Damage) -> Damage {
        self.picture = None;
        self.at = 2;
        self.after_damage = true;
        damage
    }

    /// Whether what was found after damage is a picture, and not a thumbnail inside the damaged one: its size is that of the
    /// last good picture, or of the last doubtful one, so that a change of size is lost once and not for ever.
    fn is_trusted(&mut self, size: (u32, u32)) -> bool {
        let trusted = !self.after_damage || self.size == Some(size) || self.doubtful == Some(size);
        if trusted {
            self.size = Some(size);
            self.after_damage = false;
        }
        self.doubtful = (!trusted).then_some(size);
        trusted
    }
}

/// Checks that bytes hold one JPEG, perhaps with padding behind it, and gives it.
pub(super) fn single(bytes: Vec<u8>) -> Result<Jpeg, Damage> {
    if !bytes.starts_with(&[0xFF, START]) {
        return Err(Damage::NoMarker);
    }
    let (mut walk, mut at) = (Walk::default(), 2);
    match walk.on(&bytes, &mut at) {
        Step::Complete(end) => {
            let (width, height) = walk.size.unwrap_or_default();
            let mut bytes = bytes;
            bytes.truncate(end);
            Ok(Jpeg { bytes, width, height })
        }
        Step::Starved => Err(Damage::CutByEnd),
        Step::Damaged(damage) => Err(damage),
    }
}

/// Width and height that a JPEG's header tells, where it has got that far.
pub(super) fn size(bytes: &[u8]) -> Option<(u32, u32)> {
    let (mut walk, mut at) = (Walk::default(), 2);
    if bytes.starts_with(&[0xFF, START]) {
        walk.on(bytes, &mut at);
    }
    walk.size
}

fn find(bytes: &[u8], range: Range<usize>, wanted: u8) -> Option<usize> {
    let start = range.start;
    bytes.get(range)?.iter().position(|byte| *byte == wanted).map(|index| start + index)
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    fn split(chunks: &[&[u8]], max_bytes: usize) -> Vec<Result<Jpeg, Damage>> {
        let mut splitter = JpegSplitter::new(max_bytes);
        let mut found = Vec::new();
        for chunk in chunks {
            splitter.push(chunk);
            found.extend(std::iter::from_fn(|| splitter.next()));
        }
        splitter.finish();
        found.extend(std::iter::from_fn(|| splitter.next()));
        found
    }

    fn whole(width: u16, height: u16, tag: u8) -> Result<Jpeg, Damage> {
        Ok(Jpeg { bytes: samples::jpeg(width, height, tag), width: width.into(), height: height.into() })
    }

    #[test]
    fn a_stream_cut_into_chunks_anywhere_gives_the_same_pictures() {
        let (a, b) = (samples::jpeg(640, 480, 1), samples::jpeg(320, 200, 2));
        let stream = [b"\r\n--junk\xFF", a.as_slice(), &[0; 9], &b, &[0xFF, 0xD8]].concat();
        let expected = vec![whole(640, 480, 1), whole(320, 200, 2)];
        for cut in 0..=stream.len() {
            let (head, tail) = stream.split_at(cut);
            assert_eq!(split(&[head, tail], 1000), expected, "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(split(&bytes, 1000), expected);
    }

    #[test]
    fn a_picture_cut_short_anywhere_costs_itself() {
        let (cut, next) = (samples::jpeg(64, 48, 1), samples::jpeg(32, 24, 2));
        let end_of_metadata = 4 + usize::from(cut[5]);
        for length in 3..cut.len() {
            let stream = [&next, &cut[..length], &next, &next].concat();
            let found = split(&[&stream], 1000);
            let good: Vec<_> = found.iter().filter(|piece| piece.is_ok()).cloned().collect();
            let expected = whole(32, 24, 2);
            assert!(found.first() == Some(&expected) && found.last() == Some(&expected), "{length}: {found:?}");
            // A cut thumbnail may be completed by the next picture's.
            if length >= end_of_metadata {
                assert_eq!(good, [expected.clone(), expected.clone(), expected], "{length}: {found:?}");
                assert!(found.len() > 3, "{length}: {found:?}");
            }
        }
        for length in 3..cut.len() {
            assert_eq!(split(&[&cut[..length]], 1000).first(), Some(&Err(Damage::CutByEnd)), "{length}");
        }
    }

    #[test]
    fn thumbnails_of_damaged_pictures_are_not_taken_for_pictures() {
        let (picture, thumbnail) = (samples::jpeg(64, 48, 1), samples::jpeg(8, 6, 2));
        let mut damaged = picture.clone();
        damaged[5] = 0;
        let stray = || Err(Damage::Stray);
        let stream = [&picture, &damaged[..6], &thumbnail, &picture, &thumbnail].concat();
        let expected = [whole(64, 48, 1), Err(Damage::NoMarker), stray(), whole(64, 48, 1), whole(8, 6, 2)];
        assert_eq!(split(&[&stream], 1000), expected);
        // A camera that was set to another size meanwhile.
        let stream = [&picture, &damaged[..6], &thumbnail, &thumbnail, &picture].concat();
        let expected = [whole(64, 48, 1), Err(Damage::NoMarker), stray(), whole(8, 6, 2), whole(64, 48, 1)];
        assert_eq!(split(&[&stream], 1000), expected);
    }

    #[test]
    fn damage_is_told() {
        let picture = samples::jpeg(8, 8, 3);
        let with = |at: usize, byte: u8| {
            let mut bytes = picture.clone();
            bytes[at] = byte;
            bytes
        };
        let scan = picture.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap();
        let cases = [
            (vec![0xFF, 0xD8, 0xFF, 0xD9], Damage::NoPicture),
            // The first segment one byte longer than it is.
            (with(5, picture[5] + 1), Damage::NoMarker),
            (with(5, 1), Damage::NoMarker),
            (with(scan + 1, 0xD8), Damage::CutByNext),
            (vec![0xFF, 0xD8, 0xFF, 0xDA, 0, 2, 0, 0xFF, 0xD9], Damage::NoPicture),
            (vec![0xFF, 0xD8, 0xFF, 0xC0, 0, 4, 0, 0, 0xFF, 0xD9], Damage::NoMarker),
        ];
        for (bytes, damage) in cases {
            assert_eq!(split(&[&bytes], 1000)[0], Err(damage), "{bytes:02X?}");
            assert_eq!(single(bytes), Err(damage));
        }
        assert_eq!(single(picture[..20].to_vec()), Err(Damage::CutByEnd));
        assert_eq!(single(b"PNG".to_vec()), Err(Damage::NoMarker));
        assert_eq!(single([picture.as_slice(), &[0; 5]].concat()), whole(8, 8, 3));
        assert_eq!((size(&picture), size(&picture[..20]), size(b"GIF")), (Some((8, 8)), None, None));
    }

    #[test]
    fn memory_is_bounded() {
        let picture = samples::jpeg(8, 8, 3);
        assert_eq!(split(&[&picture], picture.len()), [whole(8, 8, 3)]);
        assert_eq!(split(&[&picture], picture.len() - 1)[0], Err(Damage::TooLarge(picture.len() - 1)));

        let mut splitter = JpegSplitter::new(1000);
        splitter.push(&picture);
        assert_eq!(splitter.next(), Some(whole(8, 8, 3)));
        splitter.push(&picture[..picture.len() - 3]);
        let mut too_large = 0;
        for _ in 0..100 {
            splitter.push(&[1; 500]);
            too_large += std::iter::from_fn(|| splitter.next()).filter(|piece| *piece == Err(Damage::TooLarge(1000))).count();
            assert!(splitter.buffer.len() <= 1500);
        }
        assert_eq!(too_large, 1);
        splitter.push(&picture);
        assert_eq!(splitter.next(), Some(whole(8, 8, 3)));
    }
}
