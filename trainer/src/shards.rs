//! WebDataset shards: tar files whose adjacent members share a key (`<key>.jpg`, `<key>.json`, …) and make one sample.
//!
//! Reading never stops at a damaged record: a member that cannot be used is reported in [`ShardReport::damaged`] and the
//! rest of the shard is read. A tar file cut in the middle yields every sample before the cut.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A member larger than this is damaged (a broken size field), not a picture.
const MAX_MEMBER_BYTES: u64 = 64 << 20;

/// One sample: the members of a shard that share a key.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// Member name without its extension.
    pub key: String,
    /// Encoded picture (`jpg`, `jpeg`, `png` or `webp` member).
    pub image: Option<Vec<u8>>,
    /// The `captions` array of the `.json` member, or the lines of a `.txt` member.
    pub captions: Vec<String>,
    /// The whole `.json` member.
    pub json: Option<serde_json::Value>,
}

/// A record that was skipped, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Shard file.
    pub shard: PathBuf,
    /// Sample key, or the member's name where no key could be made of it.
    pub key: String,
    /// What is wrong, in words.
    pub reason: String,
}

/// What a reading pass saw.
#[derive(Debug, Clone, Default)]
pub struct ShardReport {
    /// Samples handed to the callback.
    pub samples: usize,
    /// Records that were skipped.
    pub damaged: Vec<Damage>,
}

/// Expands folders to the `.tar` files in them, sorted by name; files are kept as they are.
///
/// # Errors
/// A path that does not exist, or a folder without shards.
pub fn expand(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut shards = Vec::new();
    for path in paths {
        if path.is_dir() {
            let mut found: Vec<PathBuf> = std::fs::read_dir(path)
                .with_context(|| format!("cannot list {}", path.display()))?
                .filter_map(|entry| entry.ok().map(|e| e.path()))
                .filter(|p| p.extension().is_some_and(|e| e == "tar"))
                .collect();
            if found.is_empty() {
                bail!("{} holds no .tar shard", path.display());
            }
            found.sort();
            shards.append(&mut found);
        } else if path.is_file() {
            shards.push(path.clone());
        } else {
            bail!("{} does not exist", path.display());
        }
    }
    Ok(shards)
}

/// Reads every sample of the shards, in order. Folders expand to their `.tar` files.
///
/// # Errors
/// A path that does not exist, and whatever the callback returns. Damage inside a shard is not an error.
pub fn read_shards(paths: &[PathBuf], mut on_sample: impl FnMut(Sample) -> Result<()>) -> Result<ShardReport> {
    let mut report = ShardReport::default();
    for shard in expand(paths)? {
        read_shard(&shard, &mut report, &mut on_sample)?;
    }
    Ok(report)
}

fn read_shard(shard: &Path, report: &mut ShardReport, on_sample: &mut impl FnMut(Sample) -> Result<()>) -> Result<()> {
    let file = File::open(shard).with_context(|| format!("cannot open {}", shard.display()))?;
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, file));
    let mut pending = Pending::default();
    let damage = |key: &str, reason: String| Damage { shard: shard.to_path_buf(), key: key.to_owned(), reason };
    let entries = match archive.entries() {
        Ok(entries) => entries,
        Err(error) => {
            report.damaged.push(damage("", format!("not a tar file: {error}")));
            return Ok(());
        }
    };
    for entry in entries {
        let mut entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                // The position of the next header is unknown from here on.
                // A member cut short has told already that the shard ends here.
                if pending.problem.is_none() {
                    report.damaged.push(damage(&pending.sample.key, format!("the shard is cut or damaged here: {error}")));
                }
                break;
            }
        };
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let (folder, file_name) = name.rsplit_once('/').map_or(("", name.as_str()), |(f, n)| (f, n));
        let Some((stem, extension)) = file_name.split_once('.') else {
            report.damaged.push(damage(&name, "member has no extension".into()));
            continue;
        };
        let key = if folder.is_empty() { stem.to_owned() } else { format!("{folder}/{stem}") };
        if pending.started && pending.sample.key != key {
            pending.flush(report, &damage, on_sample)?;
        }
        pending.started = true;
        pending.sample.key.clone_from(&key);
        if entry.size() > MAX_MEMBER_BYTES {
            pending.problem = Some(format!("{name} claims {} bytes", entry.size()));
            continue;
        }
        let expected = entry.size();
        let mut bytes = Vec::with_capacity(expected as usize);
        match entry.read_to_end(&mut bytes) {
            Ok(read) if read as u64 == expected => pending.take(&name, extension, bytes),
            Ok(read) => pending.problem = Some(format!("{name} is cut: {read} of {expected} bytes")),
            Err(error) => pending.problem = Some(format!("{name} cannot be read: {error}")),
        }
    }
    pending.flush(report, &damage, on_sample)
}

#[derive(Default)]
struct Pending {
    started: bool,
    sample: Sample,
    problem: Option<String>,
}

impl Pending {
    fn take(&mut self, name: &str, extension: &str, bytes: Vec<u8>) {
        match extension.to_ascii_lowercase().as_str() {
            "jpg" | "jpeg" | "png" | "webp" => self.sample.image = Some(bytes),
            "json" => match serde_json::from_slice::<serde_json::Value>(&bytes) {
                Ok(value) => {
                    match value.get("captions") {
                        None => {}
                        Some(serde_json::Value::Array(list)) if list.iter().all(serde_json::Value::is_string) => {
                            self.sample.captions = list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect();
                        }
                        Some(_) => self.problem = Some(format!("{name}: `captions` is not a list of strings")),
                    }
                    self.sample.json = Some(value);
                }
                Err(error) => self.problem = Some(format!("{name} is not JSON: {error}")),
            },
            "txt" => match String::from_utf8(bytes) {
                Ok(text) => self.sample.captions = text.lines().map(str::to_owned).filter(|l| !l.trim().is_empty()).collect(),
                Err(_) => self.problem = Some(format!("{name} is not UTF-8")),
            },
            // Members of other tools (features, masks) are allowed to lie beside ours.
            _ => {}
        }
    }

    fn flush(
        &mut self,
        report: &mut ShardReport,
        damage: &impl Fn(&str, String) -> Damage,
        on_sample: &mut impl FnMut(Sample) -> Result<()>,
    ) -> Result<()> {
        let Self { started, sample, problem } = std::mem::take(self);
        if !started {
            return Ok(());
        }
        if let Some(reason) = problem {
            report.damaged.push(damage(&sample.key, reason));
        } else if sample.image.is_none() && sample.captions.is_empty() {
            report.damaged.push(damage(&sample.key, "neither a picture nor captions".into()));
        } else {
            report.samples += 1;
            on_sample(sample)?;
        }
        Ok(())
    }
}

/// Writes samples to `<prefix>-0000.tar`, `<prefix>-0001.tar`, …; a shard appears under its name only when it is whole.
pub struct ShardWriter {
    folder: PathBuf,
    prefix: String,
    samples_per_shard: usize,
    written: usize,
    current: Option<(PathBuf, PathBuf, tar::Builder<BufWriter<File>>)>,
    paths: Vec<PathBuf>,
}

impl ShardWriter {
    /// Creates the folder where needed.
    ///
    /// # Errors
    /// The folder cannot be made, or `samples_per_shard` is 0.
    pub fn create(folder: &Path, prefix: &str, samples_per_shard: usize) -> Result<Self> {
        if samples_per_shard == 0 {
            bail!("a shard must hold at least one sample");
        }
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self {
            folder: folder.to_path_buf(),
            prefix: prefix.to_owned(),
            samples_per_shard,
            written: 0,
            current: None,
            paths: Vec::new(),
        })
    }

    /// Appends one sample: its members as `(extension, bytes)`.
    ///
    /// # Errors
    /// A key with a dot (it could not be told from its extension), or a failed write.
    pub fn write(&mut self, key: &str, members: &[(&str, &[u8])]) -> Result<()> {
        if key.is_empty() || key.contains('.') {
            bail!("`{key}` cannot be a key: keys are not empty and hold no dot");
        }
        if self.written > 0 && self.written.is_multiple_of(self.samples_per_shard) {
            self.close()?;
        }
        if self.current.is_none() {
            let path = self.folder.join(format!("{}-{:04}.tar", self.prefix, self.paths.len()));
            let partial = path.with_extension("tar.tmp");
            let file = File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
            self.current = Some((path, partial, tar::Builder::new(BufWriter::new(file))));
        }
        if let Some((_, partial, builder)) = &mut self.current {
            for (extension, bytes) in members {
                let mut header = tar::Header::new_gnu();
                header.set_size(bytes.len() as u64);
                header.set_mode(0o644);
                header.set_mtime(0);
                builder
                    .append_data(&mut header, format!("{key}.{extension}"), *bytes)
                    .with_context(|| format!("cannot write {}", partial.display()))?;
            }
        }
        self.written += 1;
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        if let Some((path, partial, builder)) = self.current.take() {
            let write = || -> std::io::Result<()> {
                let mut writer = builder.into_inner()?;
                writer.flush()?;
                writer.get_ref().sync_all()?;
                std::fs::rename(&partial, &path)
            };
            write().with_context(|| format!("cannot finish {}", path.display()))?;
            self.paths.push(path);
        }
        Ok(())
    }

    /// Closes the last shard and returns all of them, in order.
    ///
    /// # Errors
    /// A failed write; the unfinished shard then keeps its `.tmp` name.
    pub fn finish(mut self) -> Result<Vec<PathBuf>> {
        self.close()?;
        Ok(std::mem::take(&mut self.paths))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(paths: &[PathBuf]) -> (Vec<Sample>, ShardReport) {
        let mut samples = Vec::new();
        let report = read_shards(paths, |s| {
            samples.push(s);
            Ok(())
        })
        .unwrap();
        (samples, report)
    }

    #[test]
    fn what_is_written_is_read_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(folder.path(), "pairs", 2).unwrap();
        for i in 0..5 {
            let json = format!(r#"{{"captions":["caption {i}"]}}"#);
            writer.write(&format!("k{i}"), &[("jpg", &[i as u8; 9]), ("json", json.as_bytes())]).unwrap();
        }
        let paths = writer.finish().unwrap();
        assert_eq!(paths.len(), 3);
        let (samples, report) = collect(&[folder.path().to_path_buf()]);
        assert_eq!((report.samples, report.damaged.len()), (5, 0));
        assert_eq!(samples[3].key, "k3");
        assert_eq!(samples[3].captions, ["caption 3"]);
        assert_eq!(samples[3].image.as_deref(), Some(&[3u8; 9][..]));
    }

    #[test]
    fn damage_is_reported_and_the_rest_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(folder.path(), "pairs", 100).unwrap();
        writer.write("good", &[("jpg", b"x"), ("json", br#"{"captions":["a"]}"#)]).unwrap();
        writer.write("badjson", &[("jpg", b"x"), ("json", b"{")]).unwrap();
        writer.write("badlist", &[("json", br#"{"captions":[1]}"#)]).unwrap();
        writer.write("badutf8", &[("txt", &[0xff, 0xfe])]).unwrap();
        writer.write("nothing", &[("xyz", b"")]).unwrap();
        writer.write("last", &[("jpg", &[7u8; 4000])]).unwrap();
        let path = writer.finish().unwrap().remove(0);
        let (samples, report) = collect(std::slice::from_ref(&path));
        assert_eq!(samples.iter().map(|s| s.key.as_str()).collect::<Vec<_>>(), ["good", "last"]);
        let keys: Vec<_> = report.damaged.iter().map(|d| d.key.as_str()).collect();
        assert_eq!(keys, ["badjson", "badlist", "badutf8", "nothing"]);

        // Cut inside the last member: what lies before the cut is still there.
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1024 - 3000]).unwrap();
        let (samples, report) = collect(&[path]);
        assert_eq!(samples.len(), 1);
        assert_eq!(report.damaged.len(), 5);
        assert_eq!(report.damaged[4].key, "last");
    }
}
