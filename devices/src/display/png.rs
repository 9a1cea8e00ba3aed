//! A picture file in place of a screen.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use png::{BitDepth, ColorType, Compression, Encoder, EncodingError};

use super::address::Address;
use super::{Canvas, Colours, Display, DisplayError, Geometry, check_size, is_bright};

/// A PNG file that is replaced as a whole by every picture: who reads it never sees half of one.
pub struct PngFile {
    path: PathBuf,
    /// Where the next picture is written before it takes the place of the last.
    beside: PathBuf,
    geometry: Geometry,
}

impl PngFile {
    /// A file of that size; nothing is written yet.
    ///
    /// # Errors
    /// A folder that is not there.
    pub fn new(path: &Path, geometry: Geometry) -> Result<Self, DisplayError> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            return Err(DisplayError::unavailable(path, format!("there is no folder {}", folder.display())));
        }
        if path.is_dir() {
            return Err(DisplayError::unavailable(path, "it is a folder"));
        }
        Ok(Self { path: path.to_path_buf(), beside: beside(path), geometry })
    }
}

/// Where a picture is written before it takes the place of what `path` holds.
fn beside(path: &Path) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.part", std::process::id()));
    beside.into()
}

/// Writes a picture beside a file, and puts it in the file's place.
fn replace(path: &Path, beside: &Path, canvas: &Canvas, colours: Colours) -> Result<(), EncodingError> {
    let written = encode(beside, canvas, colours).and_then(|()| Ok(fs::rename(beside, path)?));
    if written.is_err() {
        // A half-written picture helps nobody; what stood there before still does.
        let _ = fs::remove_file(beside);
    }
    written
}

fn encode(path: &Path, canvas: &Canvas, colours: Colours) -> Result<(), EncodingError> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut encoder = Encoder::new(&mut file, canvas.width(), canvas.height());
    encoder.set_depth(BitDepth::Eight);
    encoder.set_compression(Compression::Fast);
    match colours {
        Colours::Many => {
            encoder.set_color(ColorType::Rgb);
            encoder.write_header()?.write_image_data(canvas.pixels())?;
        }
        Colours::Two => {
            encoder.set_color(ColorType::Grayscale);
            let grey: Vec<u8> = canvas.colours().map(|colour| if is_bright(colour) { 255 } else { 0 }).collect();
            encoder.write_header()?.write_image_data(&grey)?;
        }
    }
    Ok(file.flush()?)
}

impl Canvas {
    /// Writes the picture to a PNG file, which is replaced as a whole.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write_png(&self, path: &Path) -> io::Result<()> {
        replace(path, &beside(path), self, Colours::Many).map_err(|error| match error {
            EncodingError::IoError(error) => error,
            error => io::Error::other(error),
        })
    }
}

impl Display for PngFile {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn present(&mut self, canvas: &Canvas) -> Result<(), DisplayError> {
        check_size(canvas, self.geometry)?;
        replace(&self.path, &self.beside, canvas, self.geometry.colours).map_err(|error| DisplayError::write(&self.path, error))
    }
}

pub(super) fn open(address: &mut Address<'_>) -> Result<PngFile, DisplayError> {
    let (width, height) = address.size()?.unwrap_or((320, 240));
    let colours = if address.switch("mono")?.unwrap_or(false) { Colours::Two } else { Colours::Many };
    address.finish()?;
    let path = address.path_or("");
    if path.as_os_str().is_empty() {
        return Err(address.fault("no file is named".to_owned()));
    }
    PngFile::new(&path, Geometry { width, height, colours })
}

#[cfg(test)]
pub(super) fn read(path: &Path) -> (ColorType, u32, u32, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::BufReader::new(File::open(path).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    pixels.truncate(info.buffer_size());
    (info.color_type, info.width, info.height, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canvas(seed: u8) -> Canvas {
        let mut canvas = Canvas::new(5, 3);
        for y in 0..3u8 {
            for x in 0..5u8 {
                canvas.row_mut(y.into())[usize::from(x)] = [40 * x + seed, 80 * y, 200];
            }
        }
        canvas
    }

    #[test]
    fn pictures_are_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.png");
        let uri = format!("png://{}?size=5x3", path.display());
        let mut display = super::super::open(&uri).unwrap();
        assert!(!path.exists());
        for seed in [0, 9] {
            display.present(&canvas(seed)).unwrap();
            assert_eq!(read(&path), (ColorType::Rgb, 5, 3, canvas(seed).pixels().to_vec()));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");

        // The picture that is there outlives one that cannot be written.
        fs::create_dir(folder.path().join(format!("out.png.{}.part", std::process::id()))).unwrap();
        let said = display.present(&canvas(20)).unwrap_err().to_string();
        assert!(said.contains("cannot show a picture on") && said.contains("out.png"), "{said}");
        assert_eq!(read(&path).3, canvas(9).pixels());
    }

    #[test]
    fn nothing_is_left_of_a_picture_that_has_no_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.png");
        canvas(3).write_png(&path).unwrap();
        assert_eq!(read(&path), (ColorType::Rgb, 5, 3, canvas(3).pixels().to_vec()));
        fs::create_dir(beside(&path)).unwrap();
        assert!(canvas(4).write_png(&path).is_err());
        assert_eq!(read(&path).3, canvas(3).pixels(), "the picture that was there");
        fs::remove_dir(beside(&path)).unwrap();

        let mut display = PngFile::new(&path, Geometry { width: 5, height: 3, colours: Colours::Many }).unwrap();
        // A folder with something in it takes the place of the file.
        fs::remove_file(&path).unwrap();
        fs::create_dir_all(path.join("inner")).unwrap();
        assert!(display.present(&canvas(4)).is_err() && canvas(4).write_png(&path).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a part of the picture is left");
        let said = PngFile::new(&path, display.geometry()).err().unwrap().to_string();
        assert!(said.ends_with("out.png is not available: it is a folder"), "{said}");
        assert!(canvas(5).write_png(&folder.path().join("nowhere/out.png")).is_err());
    }

    #[test]
    fn two_colours_are_black_and_white() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.png");
        let mut display = super::super::open(&format!("png://{}?size=2x1&mono=on&rotate=180", path.display())).unwrap();
        assert_eq!(display.geometry(), Geometry { width: 2, height: 1, colours: Colours::Two });
        let mut canvas = Canvas::new(2, 1);
        canvas.row_mut(0)[0] = [140; 3];
        display.present(&canvas).unwrap();
        assert_eq!(read(&path), (ColorType::Grayscale, 2, 1, vec![0, 255]));
    }
}
