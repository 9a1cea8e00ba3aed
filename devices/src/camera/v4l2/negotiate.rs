//! Which of the formats and sizes of a camera is taken.

use std::fmt;

/// A pixel format: four characters, the first in the lowest byte.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FourCc(pub(super) u32);

impl FourCc {
    pub(super) const MJPEG: Self = Self::new(*b"MJPG");
    pub(super) const JPEG: Self = Self::new(*b"JPEG");
    pub(super) const YUYV: Self = Self::new(*b"YUYV");
    pub(super) const NV12: Self = Self::new(*b"NV12");

    pub(super) const fn new(characters: [u8; 4]) -> Self {
        Self(u32::from_le_bytes(characters))
    }

    /// JPEGs, with their tables or without.
    pub(super) fn is_jpeg(self) -> bool {
        self == Self::MJPEG || self == Self::JPEG
    }

    pub(super) fn is_known(self) -> bool {
        PREFERENCE.contains(&self)
    }
}

impl fmt::Display for FourCc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.to_le_bytes().escape_ascii().to_string().trim_end())
    }
}

impl fmt::Debug for FourCc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Compressed first: over USB 2 it comes at full rate in every size, and only the pictures that are used are decoded.
const PREFERENCE: [FourCc; 4] = [FourCc::MJPEG, FourCc::JPEG, FourCc::YUYV, FourCc::NV12];

/// Sizes that a camera has, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sizes {
    One(u32, u32),
    /// All from the smallest to the largest, in steps.
    Range {
        smallest: (u32, u32),
        largest: (u32, u32),
        step: (u32, u32),
    },
}

impl Sizes {
    /// The smallest size that holds `wish`, or the largest there is.
    fn nearest(self, wish: (u32, u32)) -> (u32, u32) {
        let fit = |wish: u32, smallest: u32, largest: u32, step: u32| {
            let largest = largest.max(smallest);
            let steps = wish.clamp(smallest, largest).saturating_sub(smallest).div_ceil(step.max(1));
            let over = smallest.saturating_add(steps.saturating_mul(step.max(1)));
            if over > largest { over - step.max(1) } else { over }
        };
        match self {
            Self::One(width, height) => (width, height),
            Self::Range { smallest, largest, step } => {
                (fit(wish.0, smallest.0, largest.0, step.0), fit(wish.1, smallest.1, largest.1, step.1))
            }
        }
    }
}

/// The format and size to take: the smallest size that holds `wish`, or else the largest; of the formats that have it, the first
/// by preference.
pub(super) fn choose(offered: &[(FourCc, Vec<Sizes>)], only: Option<FourCc>, wish: (u32, u32)) -> Option<(FourCc, (u32, u32))> {
    let wanted = |fourcc: &FourCc| match only {
        Some(FourCc::MJPEG) => fourcc.is_jpeg(),
        Some(only) => *fourcc == only,
        None => fourcc.is_known(),
    };
    let sized = offered.iter().filter(|(fourcc, _)| wanted(fourcc)).flat_map(|(fourcc, sizes)| {
        // A driver that lists no sizes is asked for the wish itself.
        let unlisted = sizes.is_empty().then_some(wish);
        sizes.iter().map(move |sizes| sizes.nearest(wish)).chain(unlisted).map(move |size| (*fourcc, size))
    });
    sized.min_by_key(|(fourcc, (width, height))| {
        let holds = *width >= wish.0 && *height >= wish.1;
        let area = i64::from(*width) * i64::from(*height);
        let preference = PREFERENCE.iter().position(|known| known == fourcc);
        (!holds, if holds { area } else { -area }, preference)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEBCAM: [Sizes; 4] = [Sizes::One(1280, 720), Sizes::One(640, 480), Sizes::One(320, 240), Sizes::One(640, 360)];

    #[test]
    fn the_smallest_size_that_holds_the_wish() {
        let offered = [
            (FourCc::new(*b"H264"), WEBCAM.to_vec()),
            (FourCc::YUYV, WEBCAM.to_vec()),
            (FourCc::MJPEG, WEBCAM.to_vec()),
            (FourCc::NV12, vec![Sizes::One(1920, 1080)]),
        ];
        let cases = [
            (None, (640, 480), Some((FourCc::MJPEG, (640, 480)))),
            (None, (641, 100), Some((FourCc::MJPEG, (1280, 720)))),
            (None, (1, 1), Some((FourCc::MJPEG, (320, 240)))),
            (None, (400, 300), Some((FourCc::MJPEG, (640, 360)))),
            (None, (1600, 900), Some((FourCc::NV12, (1920, 1080)))),
            (None, (4000, 3000), Some((FourCc::NV12, (1920, 1080)))),
            (Some(FourCc::YUYV), (4000, 3000), Some((FourCc::YUYV, (1280, 720)))),
            (Some(FourCc::MJPEG), (640, 480), Some((FourCc::MJPEG, (640, 480)))),
        ];
        for (only, wish, expected) in cases {
            assert_eq!(choose(&offered, only, wish), expected, "{only:?} {wish:?}");
        }
        assert_eq!(choose(&offered[..2], Some(FourCc::MJPEG), (1, 1)), None);
        assert_eq!(choose(&offered[..1], None, (1, 1)), None);
        assert_eq!(choose(&[(FourCc::JPEG, Vec::new())], Some(FourCc::MJPEG), (3, 5)), Some((FourCc::JPEG, (3, 5))));
    }

    #[test]
    fn ranges_of_sizes() {
        let range = |smallest, largest, step| Sizes::Range { smallest, largest, step };
        let cases = [
            (range((2, 1), (3840, 2160), (2, 1)), (641, 480), (642, 480)),
            (range((32, 32), (2592, 1944), (2, 2)), (8, 8), (32, 32)),
            (range((32, 32), (2592, 1944), (2, 2)), (4000, 4000), (2592, 1944)),
            (range((16, 16), (99, 99), (16, 16)), (98, 98), (96, 96)),
            (range((640, 480), (640, 480), (0, 0)), (1, 9999), (640, 480)),
            (range((9, 9), (3, 3), (1, 1)), (5, 5), (9, 9)),
            (range((0, 0), (u32::MAX, u32::MAX), (u32::MAX, 1)), (u32::MAX, u32::MAX), (u32::MAX, u32::MAX)),
        ];
        for (sizes, wish, expected) in cases {
            assert_eq!(sizes.nearest(wish), expected, "{sizes:?} {wish:?}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(FourCc::MJPEG.to_string(), "MJPG");
        assert_eq!(FourCc(0x2020_4752).to_string(), "RG");
        assert_eq!(FourCc(0xFF).to_string(), "\\xff\\x00\\x00\\x00");
    }
}
