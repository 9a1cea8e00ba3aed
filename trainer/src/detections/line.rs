//! One line of a table of detected regions.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use half::f16;
use thiserror::Error;

use crate::regions::{Detected, Record};

/// How far a box may reach over the picture's edge, in pixels: detectors round.
const OVERHANG: f32 = 1.0;
/// How far above 1 the probabilities of a region may add up.
const SUM_SLACK: f32 = 0.01;

/// What a model takes of a detector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionShapes {
    /// Width of a region's feature.
    pub features: usize,
    /// Classes of a region's soft label.
    pub classes: usize,
    /// Most regions of a picture.
    pub most: usize,
}

impl RegionShapes {
    /// Bytes that a line of as many regions as are taken can have, with room for its first columns.
    #[must_use]
    pub fn longest_line(&self) -> usize {
        4096 + self.most * (4 + self.features + self.classes) * 4 * 4 / 3
    }
}

/// Why a line cannot be used.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum LineError {
    /// Another number of columns.
    #[error("{found} columns instead of 7: name, width, height, number of regions, boxes, features, class probabilities")]
    Columns {
        /// Columns found.
        found: usize,
    },
    /// More bytes than the largest picture takes.
    #[error("the line is longer than {most} regions make it")]
    TooLong {
        /// Most regions of a picture.
        most: usize,
    },
    /// Not UTF-8.
    #[error("the line is not UTF-8")]
    Encoding,
    /// An empty first column.
    #[error("the picture has no name")]
    NoName,
    /// A column that should hold a number from 1 on.
    #[error("the {what} is `{value}`, not a positive number")]
    Number {
        /// Which column.
        what: &'static str,
        /// What it holds.
        value: String,
    },
    /// More regions than the model takes.
    #[error("{found} regions, and at most {most} are taken")]
    TooManyRegions {
        /// Regions that the line claims.
        found: usize,
        /// Most regions of a picture.
        most: usize,
    },
    /// A column that is not base64.
    #[error("the {what} are not base64: {reason}")]
    Base64 {
        /// Which column.
        what: &'static str,
        /// What the decoder says.
        reason: String,
    },
    /// A column of another length.
    #[error("the {what} of {regions} regions take {expected} bytes, and there are {found}")]
    Length {
        /// Which column.
        what: &'static str,
        /// Regions that the line claims.
        regions: usize,
        /// Bytes that they take.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// A value that is no number, is infinite, or is too large for the 16 bits of the cache.
    #[error("the {what} of region {region} hold {value}")]
    Value {
        /// Which column.
        what: &'static str,
        /// Which region, from 0.
        region: usize,
        /// The value.
        value: f32,
    },
    /// A box outside the picture, or turned inside out.
    #[error("region {region} lies at {place:?} in a picture of {width}×{height} (width and height exchanged?)")]
    Place {
        /// Which region, from 0.
        region: usize,
        /// Its box in pixels.
        place: [f32; 4],
        /// Of the picture.
        width: f32,
        /// Of the picture.
        height: f32,
    },
    /// Probabilities that are none.
    #[error("the class probabilities of region {region} add up to {sum}")]
    Probabilities {
        /// Which region, from 0.
        region: usize,
        /// Their sum.
        sum: f32,
    },
}

/// Reads a line: the picture's name and its regions, boxes in shares of the picture.
///
/// # Errors
/// What is wrong with the line.
pub fn parse_line(line: &[u8], shapes: RegionShapes) -> Result<(String, Record), LineError> {
    let line = std::str::from_utf8(line).map_err(|_| LineError::Encoding)?.trim_end_matches(['\r', '\n']);
    let columns: Vec<&str> = line.split('\t').collect();
    let [name, width, height, count, boxes, features, probabilities] = columns[..] else {
        return Err(LineError::Columns { found: columns.len() });
    };
    if name.is_empty() {
        return Err(LineError::NoName);
    }
    let (width, height) = (length("width", width)?, length("height", height)?);
    let regions = match count.trim().parse::<usize>() {
        Ok(0) | Err(_) => return Err(LineError::Number { what: "number of regions", value: shortened(count) }),
        Ok(found) if found > shapes.most => return Err(LineError::TooManyRegions { found, most: shapes.most }),
        Ok(count) => count,
    };
    let pixels = values("boxes", boxes, regions, 4)?;
    let features = values("features", features, regions, shapes.features)?;
    let probabilities = values("class probabilities", probabilities, regions, shapes.classes)?;
    let mut boxes = Vec::with_capacity(regions * 5);
    for (region, place) in pixels.chunks_exact(4).enumerate() {
        let [x1, y1, x2, y2] = [place[0], place[1], place[2], place[3]];
        let inside = |from: f32, to: f32, side: f32| -OVERHANG <= from && from <= to && to <= side + OVERHANG;
        if !inside(x1, x2, width) || !inside(y1, y2, height) {
            return Err(LineError::Place { region, place: [x1, y1, x2, y2], width, height });
        }
        let shares = [x1 / width, y1 / height, x2 / width, y2 / height].map(|share| share.clamp(0.0, 1.0));
        boxes.extend(shares);
        boxes.push((shares[2] - shares[0]) * (shares[3] - shares[1]));
    }
    for (region, row) in probabilities.chunks_exact(shapes.classes).enumerate() {
        let sum: f32 = row.iter().sum();
        if row.iter().any(|&p| p < 0.0) || !(sum > 0.0 && sum <= 1.0 + SUM_SLACK) {
            return Err(LineError::Probabilities { region, sum });
        }
    }
    let probabilities = probabilities.into_iter().map(f16::from_f32).collect();
    Ok((name.to_owned(), Record { values: features, detected: Some(Detected { boxes, probabilities }) }))
}

/// The line of a picture, without its end; boxes are `[regions, 4]`, in pixels.
#[must_use]
pub fn write_line(name: &str, size: [u32; 2], boxes: &[f32], features: &[f32], probabilities: &[f32]) -> String {
    let encode = |values: &[f32]| STANDARD.encode(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    let (boxes_text, features, probabilities) = (encode(boxes), encode(features), encode(probabilities));
    format!("{name}\t{}\t{}\t{}\t{boxes_text}\t{features}\t{probabilities}", size[0], size[1], boxes.len() / 4)
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

fn length(what: &'static str, text: &str) -> Result<f32, LineError> {
    match text.trim().parse::<f32>() {
        Ok(value) if value.is_finite() && value >= 1.0 => Ok(value),
        _ => Err(LineError::Number { what, value: shortened(text) }),
    }
}

/// The values of one column, `[regions, width]`.
fn values(what: &'static str, text: &str, regions: usize, width: usize) -> Result<Vec<f32>, LineError> {
    let bytes = STANDARD.decode(text.trim()).map_err(|error| LineError::Base64 { what, reason: error.to_string() })?;
    let expected = regions * width * 4;
    if bytes.len() != expected {
        return Err(LineError::Length { what, regions, expected, found: bytes.len() });
    }
    let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let largest = half::f16::MAX.to_f32();
    match values.iter().position(|value| !value.is_finite() || value.abs() > largest) {
        Some(at) => Err(LineError::Value { what, region: at / width, value: values[at] }),
        None => Ok(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: RegionShapes = RegionShapes { features: 3, classes: 2, most: 2 };

    fn columns(line: &str, number: usize, value: &str) -> String {
        let mut columns: Vec<&str> = line.split('\t').collect();
        columns[number] = value;
        columns.join("\t")
    }

    fn good() -> String {
        write_line("42", [200, 100], &[10.0, 20.0, 60.0, 100.5], &[1.0, -2.0, 3.0], &[0.25, 0.5])
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn a_line_is_read_with_its_boxes_in_shares() {
        let (name, record) = parse_line(format!("{}\r\n", good()).as_bytes(), SHAPES).unwrap();
        assert_eq!((name.as_str(), record.values.as_slice()), ("42", &[1.0, -2.0, 3.0][..]));
        let detected = record.detected.unwrap();
        // Half a pixel over the edge is cut off.
        let expected = [0.05, 0.2, 0.3, 1.0, 0.25 * 0.8];
        assert!(detected.boxes.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{:?}", detected.boxes);
        assert_eq!(detected.probabilities, [0.25, 0.5].map(f16::from_f32));
    }

    /// Made by NumPy: `base64.b64encode(numpy.array([[1.5, 0, 2, 4]], "<f4"))` and so on.
    #[test]
    fn a_line_made_by_numpy_is_read() {
        let line = "7\t4\t4\t1\tAADAPwAAAAAAAABAAACAQA==\tAACAPwAAAMAAAEBA\tAACAPgAAAD8=";
        let (name, record) = parse_line(line.as_bytes(), SHAPES).unwrap();
        assert_eq!((name.as_str(), record.values.as_slice()), ("7", &[1.0, -2.0, 3.0][..]));
        let detected = record.detected.unwrap();
        assert_eq!(detected.boxes, [0.375, 0.0, 0.5, 1.0, 0.125]);
        assert_eq!(detected.probabilities, [0.25, 0.5].map(f16::from_f32));
    }

    #[test]
    fn damage_is_told_apart() {
        let line = good();
        let encode = |values: &[f32]| STANDARD.encode(bytes(values));
        let cut = |at: usize| line[..line.len() - at].to_owned();
        let cases = [
            (String::new(), "1 columns instead of 7"),
            (line.rsplit_once('\t').unwrap().0.to_owned(), "6 columns instead of 7"),
            (columns(&line, 0, ""), "no name"),
            (columns(&line, 1, "0"), "the width is `0`"),
            (columns(&line, 2, "high"), "the height is `high`"),
            (columns(&line, 1, "NaN"), "the width is `NaN`"),
            (columns(&line, 3, "0"), "the number of regions is `0`"),
            (columns(&line, 3, "-1"), "the number of regions is `-1`"),
            (columns(&line, 3, "3"), "3 regions, and at most 2"),
            (columns(&line, 3, "2"), "the boxes of 2 regions take 32 bytes, and there are 16"),
            (columns(&line, 4, "####"), "the boxes are not base64"),
            (cut(1), "the class probabilities are not base64"),
            (cut(4), "the class probabilities of 1 regions take 8 bytes, and there are 6"),
            (columns(&line, 5, &encode(&[1.0; 4])), "the features of 1 regions take 12 bytes, and there are 16"),
            (columns(&line, 5, &encode(&[1.0, f32::NAN, 3.0])), "the features of region 0 hold NaN"),
            (columns(&line, 5, &encode(&[1.0, 2.0, 7e4])), "the features of region 0 hold 70000"),
            (columns(&line, 6, &encode(&[0.5, f32::INFINITY])), "the class probabilities of region 0 hold inf"),
            (columns(&line, 6, &encode(&[0.9, 0.9])), "add up to 1.8"),
            (columns(&line, 6, &encode(&[1.5, -0.6])), "add up to 0.9"),
            (columns(&line, 6, &encode(&[0.0, 0.0])), "add up to 0"),
            (columns(&line, 4, &encode(&[10.0, 20.0, 9.0, 30.0])), "region 0 lies at [10.0, 20.0, 9.0, 30.0]"),
            (columns(&line, 4, &encode(&[10.0, 20.0, 60.0, 150.0])), "exchanged?"),
            (columns(&line, 4, &encode(&[-5.0, 20.0, 60.0, 50.0])), "exchanged?"),
        ];
        for (line, says) in cases {
            let error = parse_line(line.as_bytes(), SHAPES).unwrap_err().to_string();
            assert!(error.contains(says), "{error} does not say {says}");
        }
        assert_eq!(parse_line(&[0xff, b'\t'], SHAPES).unwrap_err(), LineError::Encoding);
    }

    #[test]
    fn the_longest_line_that_is_taken_fits() {
        let shapes = RegionShapes { features: 2048, classes: 1601, most: 100 };
        let line = write_line("x", [9, 9], &[1.0; 400], &vec![1.0; 204_800], &vec![1e-4; 160_100]);
        assert!(line.len() <= shapes.longest_line() && line.len() + 8192 > shapes.longest_line(), "{}", line.len());
    }
}
