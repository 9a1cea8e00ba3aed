//! From a file to an upright picture, within limits.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};

use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

/// What a picture may cost before it is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Most pixels (width × height) that the header may declare.
    pub max_pixels: u64,
    /// Most bytes of the encoded file.
    pub max_bytes: u64,
}

impl Default for DecodeLimits {
    /// 64 million pixels and 64 MiB: any phone's or camera's picture, within the memory of a small board.
    fn default() -> Self {
        Self { max_pixels: 64_000_000, max_bytes: 64 << 20 }
    }
}

/// Why a picture could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The encoded file is larger than allowed.
    #[error("the file has more than the {limit} bytes allowed")]
    FileTooLarge {
        /// What is allowed.
        limit: u64,
    },
    /// Nothing to decode.
    #[error("the file is empty")]
    Empty,
    /// Neither JPEG, PNG nor WebP.
    #[error("not a JPEG, PNG or WebP picture")]
    UnknownFormat,
    /// The header declares more pixels than allowed; nothing was decoded.
    #[error("{width}x{height} pixels are more than the limit of {limit}")]
    TooManyPixels {
        /// Declared width.
        width: u32,
        /// Declared height.
        height: u32,
        /// Allowed pixels.
        limit: u64,
    },
    /// The file ends before its picture does.
    #[error("the {format} file is cut short")]
    Truncated {
        /// Name of the format.
        format: &'static str,
    },
    /// The decoder gave up.
    #[error("damaged {format} picture: {source}")]
    Damaged {
        /// Name of the format.
        format: &'static str,
        /// The decoder's reason.
        source: ::image::ImageError,
    },
}

/// Reads and decodes a picture file; see [`decode`].
///
/// # Errors
/// Where the file cannot be read, is larger than the limit (it is then not read on), or does not decode.
pub fn read(path: &Path, limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let file = File::open(path).map_err(|source| unreadable(path, source))?;
    read_from(file, path, limits)
}

/// Reads and decodes a picture from a stream, which errors call by `name`; see [`decode`].
///
/// # Errors
/// Those of [`read`].
pub fn read_from(stream: impl Read, name: &Path, limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let mut bytes = Vec::new();
    // One byte more than allowed: a device or pipe may never end, and has no size to ask for.
    let mut stream = stream.take(limits.max_bytes.saturating_add(1));
    stream.read_to_end(&mut bytes).map_err(|source| unreadable(name, source))?;
    decode(&bytes, limits)
}

fn unreadable(path: &Path, source: io::Error) -> ImageError {
    ImageError::Unreadable { path: path.to_path_buf(), source }
}

/// Decodes a JPEG, PNG or WebP, told apart by content: upright (EXIF orientation applied), transparency over white, 8-bit RGB.
/// Of an animation, the first frame.
///
/// # Errors
/// Where the content is no such picture, its header declares more pixels than `limits` allow (checked before anything is
/// decoded), or the file is damaged or cut short.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    if bytes.is_empty() {
        return Err(ImageError::Empty);
    }
    if bytes.len() as u64 > limits.max_bytes {
        return Err(ImageError::FileTooLarge { limit: limits.max_bytes });
    }
    let kind = ::image::guess_format(bytes).map_err(|_| ImageError::UnknownFormat)?;
    let (format, complete) = match kind {
        ImageFormat::Jpeg => ("JPEG", jpeg_is_complete(bytes)),
        ImageFormat::Png => ("PNG", png_is_complete(bytes)),
        ImageFormat::WebP => ("WebP", webp_is_complete(bytes)),
        _ => return Err(ImageError::UnknownFormat),
    };
    if !complete {
        return Err(ImageError::Truncated { format });
    }
    let damaged = |source| ImageError::Damaged { format, source };
    let mut decoder = ImageReader::with_format(Cursor::new(bytes), kind).into_decoder().map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(ImageError::TooManyPixels { width, height, limit: limits.max_pixels });
    }
    // The header has been believed as far as the pixel limit; metadata and scratch buffers get room in proportion.
    let mut allocation = Limits::no_limits();
    allocation.max_alloc = Some(decoder.total_bytes().saturating_mul(4) + (16 << 20));
    decoder.set_limits(allocation).map_err(damaged)?;
    let orientation = decoder.orientation().map_err(damaged)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    image.apply_orientation(orientation);
    Ok(over_white(image))
}

fn over_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [r, g, b, a] = rgba.get_pixel(x, y).0;
        let blend = |c: u8| {
            let (c, a) = (u32::from(c), u32::from(a));
            ((c * a + 255 * (255 - a) + 127) / 255) as u8
        };
        ::image::Rgb([blend(r), blend(g), blend(b)])
    })
}

/// Whether the end-of-image marker follows the last scan.
///
/// The decoder fills what is missing with grey and reports success, so the markers are walked here. Thumbnails inside
/// metadata segments are skipped with their segment; bytes after the end (phones append some) do not matter.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const END_OF_IMAGE: u8 = 0xD9;
    const START_OF_SCAN: u8 = 0xDA;
    let mut at = 2;
    while let Some(offset) = bytes[at.min(bytes.len())..].iter().position(|&b| b == 0xFF) {
        at += offset + 1;
        match bytes.get(at) {
            None => return false,
            Some(&END_OF_IMAGE) => return true,
            // Fill bytes, stuffed zeros of a scan, restart markers and TEM stand alone.
            Some(0xFF) => {}
            Some(0x00 | 0x01 | 0xD0..=0xD8) => at += 1,
            Some(&marker) => {
                let Some(length) = bytes.get(at + 1..at + 3) else {
                    return false;
                };
                let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
                if length < 2 || (marker == START_OF_SCAN && at + 1 + length >= bytes.len()) {
                    return false;
                }
                at += 1 + length;
            }
        }
    }
    false
}

/// Whether every chunk up to `IEND` is there in full.
fn png_is_complete(bytes: &[u8]) -> bool {
    let mut at = 8;
    while let Some(&[a, b, c, d, ref name @ ..]) = bytes.get(at..at + 8) {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let Some(next) = at.checked_add(12).and_then(|end| end.checked_add(length)) else {
            return false;
        };
        if next > bytes.len() {
            return false;
        }
        if name == b"IEND" {
            return true;
        }
        at = next;
    }
    false
}

/// Whether the RIFF container has as many bytes as it declares.
fn webp_is_complete(bytes: &[u8]) -> bool {
    match bytes.get(4..8) {
        Some(&[a, b, c, d]) => u64::from(u32::from_le_bytes([a, b, c, d])) + 8 <= bytes.len() as u64,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use ::image::codecs::jpeg::JpegEncoder;
    use ::image::{ImageEncoder, Rgb, Rgba, RgbaImage};

    use super::*;

    /// Left half red, right half blue, with enough texture for the JPEG scan to have a length.
    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let noise = (x * 7 + y * 13) as u8 % 24;
            if x < width / 2 { Rgb([220, noise, noise]) } else { Rgb([noise, noise, 220]) }
        })
    }

    fn encode(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Vec::new();
        image.write_to(&mut Cursor::new(&mut bytes), format).unwrap();
        bytes
    }

    /// A minimal little-endian TIFF block with the orientation tag alone.
    fn exif(orientation: u8) -> Vec<u8> {
        let mut block = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
        block.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
        block
    }

    #[test]
    fn decodes_each_format() {
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP] {
            let image = decode(&encode(&picture(40, 20), format), &DecodeLimits::default()).unwrap();
            assert_eq!(image.dimensions(), (40, 20), "{format:?}");
            let Rgb([r, _, b]) = *image.get_pixel(5, 10);
            assert!(r > 180 && b < 70, "{format:?}: left is ({r}, {b})");
        }
    }

    #[test]
    fn applies_the_orientation() {
        // Where the red half of the stored picture (its left) must be seen, as a pixel of the upright picture.
        for (orientation, size, red_at) in [
            (1, (40, 20), (2, 10)),
            (2, (40, 20), (37, 10)),
            (3, (40, 20), (37, 10)),
            (6, (20, 40), (10, 2)),
            (8, (20, 40), (10, 37)),
        ] {
            let image = picture(40, 20);
            let mut bytes = Vec::new();
            let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 90);
            encoder.set_exif_metadata(exif(orientation)).unwrap();
            encoder.encode_image(&image).unwrap();
            let upright = decode(&bytes, &DecodeLimits::default()).unwrap();
            assert_eq!(upright.dimensions(), size, "orientation {orientation}");
            let Rgb([r, _, b]) = *upright.get_pixel(red_at.0, red_at.1);
            assert!(r > 180 && b < 70, "orientation {orientation}");
        }
    }

    #[test]
    fn transparency_lies_over_white() {
        let mut image = RgbaImage::from_pixel(2, 1, Rgba([10, 20, 30, 0]));
        image.put_pixel(1, 0, Rgba([0, 0, 0, 128]));
        let mut bytes = Vec::new();
        image.write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png).unwrap();
        let image = decode(&bytes, &DecodeLimits::default()).unwrap();
        assert_eq!(image.get_pixel(0, 0).0, [255; 3]);
        assert_eq!(image.get_pixel(1, 0).0, [127; 3]);
    }

    #[test]
    fn every_truncation_is_refused() {
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP] {
            let bytes = encode(&picture(64, 64), format);
            for percent in [10, 30, 50, 70, 90, 99] {
                let cut = &bytes[..bytes.len() * percent / 100];
                let error = decode(cut, &DecodeLimits::default());
                assert!(matches!(error, Err(ImageError::Truncated { .. })), "{format:?} at {percent} %: {error:?}");
            }
            decode(&bytes[..bytes.len() - 1], &DecodeLimits::default()).unwrap_err();
        }
    }

    #[test]
    fn refusals() {
        let small = DecodeLimits { max_pixels: 100, max_bytes: 1 << 20 };
        let tiny_file = DecodeLimits { max_bytes: 10, ..DecodeLimits::default() };
        // A PNG header that declares 20,000 × 20,000 pixels over no data.
        let mut bomb = encode(&picture(8, 8), ImageFormat::Png);
        bomb[16..24].copy_from_slice(&[0, 0, 0x4E, 0x20, 0, 0, 0x4E, 0x20]);
        let crc = crc32(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&crc.to_be_bytes());
        let cases: [(&str, Vec<u8>, DecodeLimits, &str); 6] = [
            ("empty", Vec::new(), DecodeLimits::default(), "the file is empty"),
            ("text", b"hello, world".to_vec(), DecodeLimits::default(), "not a JPEG, PNG or WebP picture"),
            ("gif", b"GIF89a\x01\0\x01\0\0\0\0".to_vec(), DecodeLimits::default(), "not a JPEG, PNG or WebP picture"),
            ("pixels", encode(&picture(11, 10), ImageFormat::Jpeg), small, "11x10 pixels are more than the limit of 100"),
            ("bomb", bomb, DecodeLimits::default(), "20000x20000 pixels are more than the limit of 64000000"),
            ("bytes", vec![0; 11], tiny_file, "the file has more than the 10 bytes allowed"),
        ];
        for (name, bytes, limits, message) in cases {
            assert_eq!(decode(&bytes, &limits).unwrap_err().to_string(), message, "{name}");
        }
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 })
        })
    }

    #[test]
    fn noise_never_panics() {
        let mut state = 1u64;
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP] {
            let clean = encode(&picture(48, 48), format);
            for _ in 0..200 {
                let mut bytes = clean.clone();
                for _ in 0..4 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = (state >> 33) as usize % bytes.len();
                    bytes[at] = (state >> 25) as u8;
                }
                let _ = decode(&bytes, &DecodeLimits::default());
            }
        }
    }
}
