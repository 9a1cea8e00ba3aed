//! Raw pictures of cameras to RGB: YUYV (4:2:2, packed) and NV12 (4:2:0, a plane of Y and one of U and V).
//!
//! Fixed-point arithmetic with 16 bits after the point; each chroma sample serves the pixels it was taken for.

/// Which luma and chroma a picture was encoded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct YuvEncoding {
    pub(super) matrix: Matrix,
    pub(super) range: Range,
}

/// Weights of red and blue in luma.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Matrix {
    /// ITU-R BT.601, of standard definition and most webcams.
    #[default]
    Bt601,
    /// ITU-R BT.709, of high definition.
    Bt709,
}

/// Which of the 256 levels are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Range {
    /// Luma 16 to 235, chroma 16 to 240.
    #[default]
    Limited,
    /// All.
    Full,
}

impl Matrix {
    /// Weights of red and blue in luma.
    const fn weights(self) -> (f64, f64) {
        match self {
            Self::Bt601 => (0.299, 0.114),
            Self::Bt709 => (0.2126, 0.0722),
        }
    }
}

/// How a picture lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) width: u32,
    pub(super) height: u32,
    /// Bytes from one row to the next, of the first plane; of NV12 the second plane has the same.
    pub(super) stride: usize,
}

impl Layout {
    /// Rows without padding, of so many bytes a pixel.
    pub(super) fn packed(width: u32, height: u32, pixel_bytes: usize) -> Self {
        Self { width, height, stride: width as usize * pixel_bytes }
    }
}

/// A picture with fewer bytes than its size needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cut short: {found} of {needed} bytes")]
pub(super) struct Short {
    pub(super) found: usize,
    pub(super) needed: usize,
}

/// Multiplication factors with 16 bits after the point.
struct Factors {
    black: i32,
    luma: i32,
    v_to_red: i32,
    u_to_green: i32,
    v_to_green: i32,
    u_to_blue: i32,
}

impl Factors {
    fn new(encoding: YuvEncoding) -> Self {
        let (red, blue) = encoding.matrix.weights();
        let green = 1.0 - red - blue;
        let (black, luma, chroma) = match encoding.range {
            Range::Limited => (16, 255.0 / 219.0, 255.0 / 224.0),
            Range::Full => (0, 1.0, 1.0),
        };
        let fixed = |factor: f64| (factor * 65536.0).round() as i32;
        Self {
            black,
            luma: fixed(luma),
            v_to_red: fixed(2.0 * (1.0 - red) * chroma),
            u_to_green: fixed(2.0 * (1.0 - blue) * blue / green * chroma),
            v_to_green: fixed(2.0 * (1.0 - red) * red / green * chroma),
            u_to_blue: fixed(2.0 * (1.0 - blue) * chroma),
        }
    }

    /// The two pixels of one chroma sample.
    fn pair(&self, y: [u8; 2], u: u8, v: u8, rgb: &mut [u8]) {
        let (u, v) = (i32::from(u) - 128, i32::from(v) - 128);
        let red = self.v_to_red * v + 0x8000;
        let green = 0x8000 - self.u_to_green * u - self.v_to_green * v;
        let blue = self.u_to_blue * u + 0x8000;
        for (y, pixel) in y.into_iter().zip(rgb.chunks_exact_mut(3)) {
            let luma = self.luma * (i32::from(y) - self.black);
            pixel[0] = ((luma + red) >> 16).clamp(0, 255) as u8;
            pixel[1] = ((luma + green) >> 16).clamp(0, 255) as u8;
            pixel[2] = ((luma + blue) >> 16).clamp(0, 255) as u8;
        }
    }
}

/// YUYV (`YUY2`) to RGB. The width must be even.
pub(super) fn yuyv_to_rgb(bytes: &[u8], layout: Layout, encoding: YuvEncoding) -> Result<Vec<u8>, Short> {
    let (width, height) = (layout.width as usize, layout.height as usize);
    let row_bytes = width * 2;
    check(bytes, layout.stride * height.saturating_sub(1) + row_bytes)?;
    let factors = Factors::new(encoding);
    let mut rgb = vec![0; width * height * 3];
    for (row, out) in bytes.chunks(layout.stride.max(1)).zip(rgb.chunks_exact_mut((width * 3).max(1))) {
        for (group, pixels) in row[..row_bytes].chunks_exact(4).zip(out.chunks_exact_mut(6)) {
            factors.pair([group[0], group[2]], group[1], group[3], pixels);
        }
    }
    Ok(rgb)
}

/// NV12 to RGB. Width and height must be even.
pub(super) fn nv12_to_rgb(bytes: &[u8], layout: Layout, encoding: YuvEncoding) -> Result<Vec<u8>, Short> {
    let (width, height) = (layout.width as usize, layout.height as usize);
    let luma_bytes = layout.stride * height;
    check(bytes, luma_bytes + layout.stride * (height / 2).saturating_sub(1) + width)?;
    let (luma, chroma) = bytes.split_at(luma_bytes);
    let factors = Factors::new(encoding);
    let mut rgb = vec![0; width * height * 3];
    for (row, out) in rgb.chunks_exact_mut((width * 3).max(1)).enumerate() {
        let luma = luma[row * layout.stride..][..width].chunks_exact(2);
        let chroma = chroma[row / 2 * layout.stride..][..width].chunks_exact(2);
        for ((y, uv), pixels) in luma.zip(chroma).zip(out.chunks_exact_mut(6)) {
            factors.pair([y[0], y[1]], uv[0], uv[1], pixels);
        }
    }
    Ok(rgb)
}

fn check(bytes: &[u8], needed: usize) -> Result<(), Short> {
    if bytes.len() < needed { Err(Short { found: bytes.len(), needed }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ITU-R BT.601-7, section 2.5, and BT.709-6, section 3, solved for red, green and blue in floating point.
    fn reference(encoding: YuvEncoding, y: u8, u: u8, v: u8) -> [f64; 3] {
        let (kr, kg, kb) = match encoding.matrix {
            Matrix::Bt601 => (0.299, 0.587, 0.114),
            Matrix::Bt709 => (0.2126, 0.7152, 0.0722),
        };
        let (y, u, v) = (f64::from(y), f64::from(u), f64::from(v));
        let (y, pb, pr) = match encoding.range {
            Range::Limited => ((y - 16.0) / 219.0, (u - 128.0) / 224.0, (v - 128.0) / 224.0),
            Range::Full => (y / 255.0, (u - 128.0) / 255.0, (v - 128.0) / 255.0),
        };
        let red = y + 2.0 * (1.0 - kr) * pr;
        let blue = y + 2.0 * (1.0 - kb) * pb;
        let green = (y - kr * red - kb * blue) / kg;
        [red, green, blue].map(|level| (level * 255.0).clamp(0.0, 255.0))
    }

    const ENCODINGS: [(Matrix, Range); 4] = [
        (Matrix::Bt601, Range::Limited),
        (Matrix::Bt601, Range::Full),
        (Matrix::Bt709, Range::Limited),
        (Matrix::Bt709, Range::Full),
    ];

    #[test]
    fn every_colour_agrees_with_the_floating_point_formula() {
        for (matrix, range) in ENCODINGS {
            let encoding = YuvEncoding { matrix, range };
            for (u, v) in (0..=255).step_by(3).flat_map(|u| (0..=255).step_by(3).map(move |v| (u, v))) {
                let bytes: Vec<u8> = (0..=255).step_by(2).flat_map(|y| [y, u, y + 1, v]).collect();
                let rgb = yuyv_to_rgb(&bytes, Layout::packed(256, 1, 2), encoding).unwrap();
                for (y, pixel) in (0..=255).zip(rgb.chunks(3)) {
                    for (found, expected) in pixel.iter().zip(reference(encoding, y, u, v)) {
                        // Rounding to the nearest, and at most 128 * 3 factors that are each off by half of 2^-16.
                        assert!((f64::from(*found) - expected).abs() < 0.51, "{encoding:?} {y} {u} {v}: {pixel:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn known_colours() {
        // The 75 % colour bars of BT.601, 8 bits: white, yellow, cyan, green, magenta, red, blue, black.
        let bars = [
            ([180, 128, 128], [191, 191, 191]),
            ([162, 44, 142], [191, 191, 0]),
            ([131, 156, 44], [0, 191, 191]),
            ([112, 72, 58], [0, 191, 0]),
            ([84, 184, 198], [191, 0, 191]),
            ([65, 100, 212], [191, 0, 0]),
            ([35, 212, 114], [0, 0, 191]),
            ([16, 128, 128], [0, 0, 0]),
        ];
        for ([y, u, v], expected) in bars {
            let rgb = yuyv_to_rgb(&[y, u, y, v], Layout::packed(2, 1, 2), YuvEncoding::default()).unwrap();
            for (found, expected) in rgb.iter().zip([expected, expected].concat()) {
                assert!(found.abs_diff(expected) <= 1, "{y} {u} {v}: {rgb:?}");
            }
        }
    }

    #[test]
    fn rows_are_found_by_their_stride() {
        let (grey, white) = ([126, 128], [235, 128]);
        // Two rows of two pixels, four bytes of padding after the first only.
        let yuyv = [grey, grey, [9, 9], [9, 9], white, white].concat();
        let layout = Layout { width: 2, height: 2, stride: 8 };
        let rgb = yuyv_to_rgb(&yuyv, layout, YuvEncoding::default()).unwrap();
        assert_eq!(rgb, [[128; 6], [255; 6]].concat());

        // NV12: luma of four rows, then chroma of two; one blue column pair below.
        let luma = [[126, 126, 0], [235, 235, 0], [126, 126, 0], [126, 126, 0]].concat();
        let nv12 = [luma, vec![128, 128, 0, 255, 128]].concat();
        let layout = Layout { width: 2, height: 4, stride: 3 };
        let rgb = nv12_to_rgb(&nv12, layout, YuvEncoding::default()).unwrap();
        assert_eq!(rgb[..12], [[128; 6], [255; 6]].concat());
        let [red, green, blue] = reference(YuvEncoding::default(), 126, 255, 128).map(|level| level.round() as u8);
        assert_eq!(rgb[12..], [red, green, blue].repeat(4));
    }

    #[test]
    fn short_pictures_are_refused() {
        let layout = Layout::packed(4, 2, 2);
        assert_eq!(yuyv_to_rgb(&[0; 15], layout, YuvEncoding::default()), Err(Short { found: 15, needed: 16 }));
        let layout = Layout::packed(4, 2, 1);
        assert_eq!(nv12_to_rgb(&[0; 11], layout, YuvEncoding::default()), Err(Short { found: 11, needed: 12 }));
        assert!(nv12_to_rgb(&[0; 12], layout, YuvEncoding::default()).is_ok());
    }
}
