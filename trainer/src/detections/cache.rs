//! Tables of detected regions in a form that can be mapped: half the bits, no base64, a place for every picture.
//!
//! One file a table. Pictures follow each other, each with its boxes `[n, 5]` in f32 and then its features and probabilities in
//! f16; a description in JSON comes behind them, its length in eight bytes, and a mark. It is written under another name and
//! renamed when whole.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};
use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::line::{LineError, RegionShapes, parse_line};
use crate::features::{hex, read_halves};
use crate::regions::{Detected, Record};
use crate::shards::Damage;

/// Goes into the stamp: raised when records are written in another way.
const VERSION: u32 = 1;
/// Ends every whole file.
const MARK: &[u8; 8] = b"regions1";
/// Lines parsed at once, in parallel.
const BATCH: usize = 64;

/// What stands behind the pictures.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    stamp: String,
    names: Vec<String>,
    regions: Vec<u32>,
    /// Lines that were skipped, and why.
    damaged: Vec<(String, String)>,
}

/// Makes and finds cached tables.
pub struct DetectionCache<'a> {
    /// Folder of the cache files.
    pub folder: &'a Path,
    /// What the model takes.
    pub shapes: RegionShapes,
}

/// One table, mapped from the cache.
pub struct DetectionFile {
    map: Mmap,
    shapes: RegionShapes,
    /// The table.
    pub table: PathBuf,
    /// Names of the pictures, in the table's order.
    pub names: Vec<String>,
    /// Offset and regions of each picture.
    places: Vec<(usize, usize)>,
    /// Lines of the table that were skipped.
    pub damaged: Vec<Damage>,
}

/// Expands folders to the `.tsv` files in them, sorted by name; files are kept as they are.
pub(crate) fn expand(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut tables = Vec::new();
    for path in paths {
        if !path.is_dir() {
            tables.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
        let mut found: Vec<PathBuf> =
            entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.extension().is_some_and(|e| e == "tsv")).collect();
        if found.is_empty() {
            bail!("{} holds no .tsv table of detected regions", path.display());
        }
        found.sort();
        tables.append(&mut found);
    }
    Ok(tables)
}

/// Bytes of a picture of so many regions.
fn bytes_of(shapes: RegionShapes, regions: usize) -> usize {
    regions * (5 * 4 + (shapes.features + shapes.classes) * 2)
}

impl DetectionCache<'_> {
    /// Every table (or every `.tsv` of a folder), read where the cache lacks it. `progress` is called with the number of lines read.
    ///
    /// # Errors
    /// Tables or cache that cannot be read or written, and a table without a single usable line. Damaged lines are reported in the
    /// files, not errors.
    pub fn open(&self, tables: &[PathBuf], progress: &dyn Fn(u64)) -> Result<Vec<DetectionFile>> {
        std::fs::create_dir_all(self.folder).with_context(|| format!("cannot create {}", self.folder.display()))?;
        expand(tables)?.iter().map(|table| self.table(table, progress)).collect()
    }

    fn table(&self, table: &Path, progress: &dyn Fn(u64)) -> Result<DetectionFile> {
        let metadata = std::fs::metadata(table).with_context(|| format!("cannot read {}", table.display()))?;
        let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let made_of = format!("{VERSION} {} {} {changed:?} {:?}", table.display(), metadata.len(), self.shapes);
        let stamp = hex(&Sha256::digest(made_of.as_bytes())[..8]);
        let name = table.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let path = self.folder.join(format!("{name}-{stamp}.regions"));
        let mut file = DetectionFile::open(&path, table, &stamp, self.shapes)?;
        if file.is_none() {
            self.convert(table, &path, &stamp, progress)?;
            file = DetectionFile::open(&path, table, &stamp, self.shapes)?;
        }
        let file = file.with_context(|| format!("{} cannot be read back", path.display()))?;
        if file.names.is_empty() {
            let why = file.damaged.first().map_or_else(String::new, |first| format!("; {}: {}", first.key, first.reason));
            bail!("{} holds no usable line of detected regions{why}", table.display());
        }
        Ok(file)
    }

    fn convert(&self, table: &Path, path: &Path, stamp: &str, progress: &dyn Fn(u64)) -> Result<()> {
        let file = File::open(table).with_context(|| format!("cannot open {}", table.display()))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let partial = path.with_extension("tmp");
        let unwritten = || format!("cannot write {}", partial.display());
        let mut writer = BufWriter::with_capacity(1 << 20, File::create(&partial).with_context(unwritten)?);
        let mut about = Description { stamp: stamp.to_owned(), names: Vec::new(), regions: Vec::new(), damaged: Vec::new() };
        let (mut known, mut number) = (HashSet::new(), 0usize);
        loop {
            let mut lines = Vec::new();
            while lines.len() < BATCH
                && let Some(line) =
                    next_line(&mut reader, self.shapes).with_context(|| format!("cannot read {}", table.display()))?
            {
                lines.push(line);
            }
            if lines.is_empty() {
                break;
            }
            let parsed: Vec<_> = lines
                .par_iter()
                .map(|line| line.as_ref().map_err(Clone::clone).and_then(|l| parse_line(l, self.shapes)))
                .collect();
            for (line, found) in lines.iter().zip(parsed) {
                number += 1;
                match found {
                    _ if is_blank(line) => {}
                    Ok((name, _)) if known.contains(&name) => {
                        about.damaged.push((format!("line {number}"), format!("the picture {name} was there before")));
                    }
                    Ok((name, record)) => {
                        let regions = write_record(&mut writer, &record).with_context(unwritten)?;
                        known.insert(name.clone());
                        about.names.push(name);
                        about.regions.push(regions as u32);
                    }
                    Err(error) => about.damaged.push((format!("line {number}"), error.to_string())),
                }
            }
            progress(lines.len() as u64);
        }
        let description = serde_json::to_vec(&about)?;
        let finish = |mut writer: BufWriter<File>| -> std::io::Result<()> {
            writer.write_all(&description)?;
            writer.write_all(&(description.len() as u64).to_le_bytes())?;
            writer.write_all(MARK)?;
            writer.flush()?;
            writer.get_ref().sync_all()?;
            std::fs::rename(&partial, path)
        };
        finish(writer).with_context(unwritten)
    }
}

/// The next line, without more memory than the longest good one takes; nothing at the end.
fn next_line(reader: &mut impl BufRead, shapes: RegionShapes) -> std::io::Result<Option<Result<Vec<u8>, LineError>>> {
    let longest = shapes.longest_line();
    let mut line = Vec::new();
    if reader.by_ref().take(longest as u64 + 1).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.len() > longest && line.last() != Some(&b'\n') {
        reader.skip_until(b'\n')?;
        return Ok(Some(Err(LineError::TooLong { most: shapes.most })));
    }
    Ok(Some(Ok(line)))
}

fn is_blank(line: &Result<Vec<u8>, LineError>) -> bool {
    line.as_ref().is_ok_and(|line| line.iter().all(u8::is_ascii_whitespace))
}

/// Writes a picture and gives the number of its regions.
fn write_record(writer: &mut impl Write, record: &Record) -> std::io::Result<usize> {
    let Some(detected) = &record.detected else { return Ok(0) };
    for value in &detected.boxes {
        writer.write_all(&value.to_le_bytes())?;
    }
    let mut features = vec![f16::ZERO; record.values.len()];
    features.convert_from_f32_slice(&record.values);
    for halves in [&features, &detected.probabilities] {
        writer.write_all(&halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<u8>>())?;
    }
    Ok(detected.boxes.len() / 5)
}

impl DetectionFile {
    /// Nothing where there is no whole file of this stamp.
    fn open(path: &Path, table: &Path, stamp: &str, shapes: RegionShapes) -> Result<Option<Self>> {
        let Ok(file) = File::open(path) else { return Ok(None) };
        // SAFETY: cache files are written under another name and renamed when whole; nothing rewrites one in place.
        let map = unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))?;
        let Some((rest, length)) = map.strip_suffix(MARK).and_then(<[u8]>::split_last_chunk::<8>) else { return Ok(None) };
        let body = usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|length| rest.len().checked_sub(length));
        let Some(body) = body else { return Ok(None) };
        let Ok(about) = serde_json::from_slice::<Description>(&rest[body..]) else { return Ok(None) };
        let mut places = Vec::with_capacity(about.regions.len());
        let mut at = 0;
        for &regions in &about.regions {
            places.push((at, regions as usize));
            at += bytes_of(shapes, regions as usize);
        }
        if about.stamp != stamp || at != body || places.len() != about.names.len() {
            return Ok(None);
        }
        let damage = |(key, reason)| Damage { shard: table.to_path_buf(), key, reason };
        let damaged = about.damaged.into_iter().map(damage).collect();
        Ok(Some(Self { map, shapes, table: table.to_path_buf(), names: about.names, places, damaged }))
    }

    /// Regions of picture `index`.
    #[must_use]
    pub fn get(&self, index: usize) -> Record {
        let (at, regions) = self.places[index];
        let bytes = &self.map[at..at + bytes_of(self.shapes, regions)];
        let (boxes, halves) = bytes.split_at(regions * 20);
        let (features, probabilities) = halves.split_at(regions * self.shapes.features * 2);
        let boxes = boxes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let count = features.len() / 2;
        let mut values = vec![0f32; count];
        read_halves(features, &mut vec![0; count], &mut values);
        let probabilities = probabilities.chunks_exact(2).map(|half| f16::from_le_bytes([half[0], half[1]])).collect();
        Record { values, detected: Some(Detected { boxes, probabilities }) }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::write_line;
    use super::*;

    const SHAPES: RegionShapes = RegionShapes { features: 3, classes: 2, most: 4 };

    fn picture(name: &str, regions: usize) -> String {
        let boxes: Vec<f32> = (0..regions).flat_map(|r| [r as f32, 0.0, r as f32 + 5.0, 10.0]).collect();
        let features: Vec<f32> = (0..3 * regions).map(|v| v as f32 / 3.0).collect();
        write_line(name, [20, 10], &boxes, &features, &vec![0.5; 2 * regions])
    }

    #[test]
    fn good_lines_are_kept_and_damaged_ones_counted_with_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let (table, cached) = (folder.path().join("a.tsv"), folder.path().join("cache"));
        let long = format!("long\t{}", "x".repeat(SHAPES.longest_line()));
        let cut = picture("cut", 4);
        let lines =
            [&picture("one", 1), "", &long, &picture("many", 5), &picture("four", 4), &picture("one", 2), &cut[..cut.len() - 9]];
        std::fs::write(&table, lines.join("\n")).unwrap();
        let read = Cell::new(0);
        let open = |shapes: RegionShapes| {
            read.set(0);
            let cache = DetectionCache { folder: &cached, shapes };
            cache.open(std::slice::from_ref(&table), &|n| read.set(read.get() + n)).map(|mut files| files.remove(0))
        };
        let file = open(SHAPES).unwrap();
        assert_eq!((file.names.as_slice(), read.get()), (&["one".to_owned(), "four".to_owned()][..], 7));
        let said: Vec<String> = file.damaged.iter().map(|d| format!("{}: {}", d.key, d.reason)).collect();
        for (said, expected) in said.iter().zip([
            "line 3: the line is longer than 4 regions make it",
            "line 4: 5 regions, and at most 4 are taken",
            "line 6: the picture one was there before",
            "line 7: the class probabilities",
        ]) {
            assert!(said.starts_with(expected), "{said} is not {expected}");
        }
        assert_eq!(said.len(), 4);
        let four = file.get(1);
        let exact = parse_line(picture("four", 4).as_bytes(), SHAPES).unwrap().1;
        assert_eq!(four.detected, exact.detected);
        // 11 bits of mantissa.
        assert!(four.values.iter().zip(&exact.values).all(|(a, b)| (a - b).abs() <= b.abs() / 2048.0), "{:?}", four.values);

        // Read once; what was skipped is told again. A cut cache, other shapes, another table: read again.
        let again = open(SHAPES).unwrap();
        assert_eq!((again.damaged.len(), again.get(1), read.get()), (4, four, 0));
        for entry in std::fs::read_dir(&cached).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() - 40]).unwrap();
        }
        assert_eq!((open(SHAPES).unwrap().names.len(), read.get()), (2, 7));
        assert_eq!((open(RegionShapes { most: 5, ..SHAPES }).unwrap().names.len(), read.get()), (3, 7));
        let other = open(RegionShapes { features: 4, ..SHAPES });
        let error = format!("{:#}", other.err().unwrap());
        assert!(error.contains("no usable line") && error.contains("the features of 1 regions take 16 bytes"), "{error}");
        std::fs::write(&table, picture("new", 2)).unwrap();
        assert_eq!(open(SHAPES).unwrap().names, ["new"]);
    }
}
