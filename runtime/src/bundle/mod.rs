//! Bundles: a model as it goes to the board.
//!
//! ```text
//! manifest.toml              schema, sizes, image preparation, graphs, decoding defaults, training data, quality, SHA-256 of every file
//! tokenizer.json
//! <precision>/{vision,decode,text,match}.onnx
//! <precision>/….dynamic.onnx, ….static.onnx    the same graphs in other forms, where there are such
//! <precision>/weights.bin    the graphs' weights as ONNX external data, each stored once
//! ```
//!
//! A bundle is that folder, a `.tar` of it, or such a `.tar` compiled into the program. Files are memory-mapped, and hashed
//! before they are first used; [`Bundle::verify`] hashes all of them.

mod files;
pub mod manifest;
mod pack;
mod precision;
mod signature;
mod sizes;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

pub use self::files::SharedBytes;
use self::files::{Backing, Files};
use self::manifest::{Form, Manifest, Precision};
pub use self::pack::{PackError, pack};
use crate::map::Mapping;
use crate::tokenizer::{Tokenizer, TokenizerError};

#[cfg(all(feature = "embedded-bundle", has_default_bundle))]
static EMBEDDED: Option<&[u8]> = Some(include_bytes!("../../bundle/default.tar"));
#[cfg(not(all(feature = "embedded-bundle", has_default_bundle)))]
static EMBEDDED: Option<&[u8]> = None;

/// Name of the manifest inside a bundle.
pub const MANIFEST: &str = "manifest.toml";

/// Where a bundle comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BundleSource {
    /// The bundle compiled into this program.
    Embedded,
    /// A folder or a `.tar` file.
    Path(PathBuf),
}

impl fmt::Display for BundleSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("(embedded)"),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// A bundle that was refused, and why.
#[derive(Debug, thiserror::Error)]
#[error("bundle {bundle}: {fault}")]
pub struct BundleError {
    /// The bundle, as the user named it.
    pub bundle: String,
    /// What is wrong with it.
    pub fault: BundleFault,
}

/// What is wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleFault {
    /// The program was built without a default bundle.
    #[error("this build has no embedded bundle; name one with --bundle")]
    NotEmbedded,
    /// Neither a folder nor a file.
    #[error("there is no such folder or file")]
    NotFound,
    /// A file cannot be read.
    #[error("cannot read {file}: {source}")]
    Unreadable {
        /// The file, inside the bundle.
        file: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The `.tar` is damaged.
    #[error("not a whole .tar archive: {0}")]
    Archive(std::io::Error),
    /// A file is not there.
    #[error("{file} is missing")]
    MissingFile {
        /// The file, inside the bundle.
        file: String,
    },
    /// The manifest names a file outside of the bundle.
    #[error("the manifest names {file:?}, which does not lie inside the bundle")]
    UnsafePath {
        /// The path it gives.
        file: String,
    },
    /// The manifest has not the form it should have.
    #[error("malformed manifest: {reason}")]
    Malformed {
        /// What the parser says.
        reason: String,
    },
    /// The bundle was made for a later version of this program.
    #[error("it has schema {found}, this program reads up to {supported}: a newer unimo is needed")]
    NewerSchema {
        /// The bundle's schema.
        found: i64,
        /// The newest that this crate reads.
        supported: u32,
    },
    /// The bundle was made by an earlier version of this program, whose graphs this one does not run.
    #[error(
        "it has schema {found}, this program reads {supported}: `unimo-export upgrade` writes it anew, its weights unchanged"
    )]
    OlderSchema {
        /// The bundle's schema.
        found: i64,
        /// The one that this crate reads.
        supported: u32,
    },
    /// A size that no model has.
    #[error("{name} is {value}, outside {range}")]
    OutOfRange {
        /// Key of the manifest.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        range: String,
    },
    /// One of the four graphs is not described.
    #[error("the manifest lists no graph {graph:?}")]
    MissingGraph {
        /// Its name.
        graph: String,
    },
    /// A graph has other inputs or outputs than models of these sizes have.
    #[error("graph {graph:?} has {reason}")]
    Signature {
        /// The graph.
        graph: String,
        /// What differs.
        reason: String,
    },
    /// A file without a hash.
    #[error("the manifest gives no hash for {file}")]
    Unlisted {
        /// The file.
        file: String,
    },
    /// A file is not what the manifest says.
    #[error("{file} is damaged: its SHA-256 is {found}, the manifest says {expected}")]
    Hash {
        /// The file.
        file: String,
        /// From the manifest.
        expected: String,
        /// Computed.
        found: String,
    },
    /// The tokenizer does not fit any model of this project.
    #[error("tokenizer.json: {0}")]
    Tokenizer(#[from] TokenizerError),
    /// The tokenizer belongs to another model.
    #[error("tokenizer.json has {tokenizer} ids, the model has {model}")]
    Vocabulary {
        /// Ids of the tokenizer.
        tokenizer: usize,
        /// Ids of the model.
        model: usize,
    },
    /// The weights are not there in the precision asked for.
    #[error("it holds no {asked} weights, only {}", present.iter().map(|p| p.name()).collect::<Vec<_>>().join(", "))]
    Precision {
        /// What was asked for.
        asked: Precision,
        /// What is there.
        present: Vec<Precision>,
    },
    /// The graphs are not there in the form asked for.
    #[error("it holds no {form} form of {precision}, only {}", present.iter().map(|f| f.name()).collect::<Vec<_>>().join(", "))]
    Form {
        /// What was asked for.
        form: Form,
        /// The precision.
        precision: Precision,
        /// What is there.
        present: Vec<Form>,
    },
}

/// An opened bundle: its manifest is parsed and checked, every file is there, and none has been trusted yet.
#[derive(Debug)]
pub struct Bundle {
    source: BundleSource,
    manifest: Manifest,
    id: String,
    files: Files,
    hashed: Mutex<BTreeSet<String>>,
}

impl Bundle {
    /// Opens a folder, a `.tar` or the embedded bundle.
    ///
    /// # Errors
    /// Where nothing is there, the manifest is refused, or a file that it lists is missing.
    pub fn open(source: &BundleSource) -> Result<Self, BundleError> {
        Self::open_fault(source).map_err(|fault| BundleError { bundle: source.to_string(), fault })
    }

    fn open_fault(source: &BundleSource) -> Result<Self, BundleFault> {
        let (mut files, root) = match source {
            BundleSource::Embedded => {
                let bytes = EMBEDDED.ok_or(BundleFault::NotEmbedded)?;
                (Files::archive(Backing::Embedded(bytes))?, Path::new(""))
            }
            BundleSource::Path(path) if path.is_dir() => (Files::folder(), path.as_path()),
            BundleSource::Path(path) if path.exists() => {
                let unreadable = |source| BundleFault::Unreadable { file: path.display().to_string(), source };
                let map = Mapping::open(path).map_err(unreadable)?;
                (Files::archive(Backing::Mapped(map))?, Path::new(""))
            }
            BundleSource::Path(_) => return Err(BundleFault::NotFound),
        };
        files.require(root, MANIFEST)?;
        let text = files.get(MANIFEST).unwrap_or_default();
        let manifest = Manifest::parse(text)?;
        let id = sha256_hex(text);
        for file in manifest.files.keys() {
            files.require(root, file)?;
        }
        Ok(Self { source: source.clone(), manifest, id, files, hashed: Mutex::default() })
    }

    /// Where it was opened from.
    #[must_use]
    pub fn source(&self) -> &BundleSource {
        &self.source
    }

    /// What it says about itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the manifest in hex. The manifest holds the hash of every other file, so this names the whole bundle.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A file's bytes, hashed when first asked for.
    ///
    /// # Errors
    /// Where the manifest does not list the file or its hash is another.
    pub fn read(&self, file: &str) -> Result<&[u8], BundleError> {
        self.read_fault(file).map_err(|fault| self.error(fault))
    }

    fn read_fault(&self, file: &str) -> Result<&[u8], BundleFault> {
        let missing = || BundleFault::MissingFile { file: file.to_owned() };
        let expected = self.manifest.files.get(file).ok_or_else(missing)?;
        let bytes = self.files.get(file).ok_or_else(missing)?;
        let mut hashed = self.hashed.lock().unwrap_or_else(PoisonError::into_inner);
        if !hashed.contains(file) {
            let found = sha256_hex(bytes);
            if !found.eq_ignore_ascii_case(expected) {
                return Err(BundleFault::Hash { file: file.to_owned(), expected: expected.clone(), found });
            }
            hashed.insert(file.to_owned());
        }
        Ok(bytes)
    }

    /// The tokenizer, which has as many ids as the model.
    ///
    /// # Errors
    /// Where `tokenizer.json` is damaged, malformed or belongs to another model.
    pub fn tokenizer(&self) -> Result<Tokenizer, BundleError> {
        let read = || {
            let tokenizer = Tokenizer::from_bytes(self.read_fault("tokenizer.json")?)?;
            let (ids, model) = (tokenizer.vocabulary_size(), self.manifest.model.vocabulary);
            if ids != model {
                return Err(BundleFault::Vocabulary { tokenizer: ids, model });
            }
            Ok(tokenizer)
        };
        read().map_err(|fault| self.error(fault))
    }

    /// The precision to run: the one asked for, or the bundle's first.
    ///
    /// # Errors
    /// Where the bundle has no weights of that precision.
    pub fn precision(&self, asked: Option<Precision>) -> Result<Precision, BundleError> {
        let present = &self.manifest.precisions;
        match asked {
            None => Ok(present[0]),
            Some(asked) if present.contains(&asked) => Ok(asked),
            Some(asked) => Err(self.error(BundleFault::Precision { asked, present: present.clone() })),
        }
    }

    /// A file's bytes like [`Self::read`], to be held for longer than the bundle is.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub fn share(&self, file: &str) -> Result<SharedBytes, BundleError> {
        self.read(file)?;
        self.files.share(file).ok_or_else(|| self.error(BundleFault::MissingFile { file: file.to_owned() }))
    }

    /// Hashes every file and opens the tokenizer; gives the number of bytes read.
    ///
    /// # Errors
    /// The first fault found.
    pub fn verify(&self) -> Result<u64, BundleError> {
        let mut bytes = self.files.get(MANIFEST).map_or(0, <[u8]>::len) as u64;
        for file in self.manifest.files.keys() {
            bytes += self.read(file)?.len() as u64;
        }
        self.tokenizer()?;
        Ok(bytes)
    }

    /// A file's length in bytes, without hashing it.
    #[must_use]
    pub fn length(&self, file: &str) -> Option<usize> {
        Some(self.files.get(file)?.len())
    }

    /// Wraps a fault found by whoever reads this bundle.
    #[must_use]
    pub fn error(&self, fault: BundleFault) -> BundleError {
        BundleError { bundle: self.source.to_string(), fault }
    }
}

/// SHA-256 of bytes, in lower-case hex: how a manifest names files.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A bundle folder whose graphs are a few bytes each: enough for everything but running it.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = manifest::tests::tiny();
        for (file, hash) in &mut manifest.files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, file).unwrap();
            *hash = sha256_hex(file.as_bytes());
        }
        fs::write(folder.path().join(MANIFEST), manifest.to_toml().unwrap()).unwrap();
        folder
    }

    fn open(path: &Path) -> Result<Bundle, BundleError> {
        Bundle::open(&BundleSource::Path(path.to_path_buf()))
    }

    #[test]
    fn known_digest() {
        // FIPS 180-2, appendix B.1.
        assert_eq!(sha256_hex(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn a_folder_and_its_archive_are_the_same_bundle() {
        let folder = folder();
        let unpacked = open(folder.path()).unwrap();
        let tar = folder.path().join("packed.tar");
        pack(&unpacked, &tar).unwrap_err();
        let out = tempfile::tempdir().unwrap();
        let tar = out.path().join("bundle.tar");
        // The graphs are no graphs, but hashes hold; only the tokenizer is refused, by verify.
        assert!(matches!(unpacked.verify().unwrap_err().fault, BundleFault::Tokenizer(_)));
        pack::write_archive(&unpacked, &tar).unwrap();
        let packed = open(&tar).unwrap();
        assert_eq!(packed.id(), unpacked.id());
        assert_eq!(packed.read("f16/text.onnx").unwrap(), b"f16/text.onnx");
    }

    #[test]
    fn shared_bytes_outlive_the_bundle() {
        let (folder, out) = (folder(), tempfile::tempdir().unwrap());
        let tar = out.path().join("bundle.tar");
        pack::write_archive(&open(folder.path()).unwrap(), &tar).unwrap();
        for path in [folder.path(), &tar] {
            let bundle = open(path).unwrap();
            let shared = bundle.share("f16/text.onnx").unwrap();
            // The same bytes, not others alike.
            assert_eq!(shared.as_ptr(), bundle.read("f16/text.onnx").unwrap().as_ptr());
            drop(bundle);
            assert_eq!(&*shared, b"f16/text.onnx");
        }
        fs::write(folder.path().join("f16/text.onnx"), "f16/text.onnY").unwrap();
        assert!(open(folder.path()).unwrap().share("f16/text.onnx").unwrap_err().to_string().contains("is damaged"));
    }

    #[test]
    fn refusals() {
        let missing = tempfile::tempdir().unwrap();
        let message = |path: &Path| open(path).unwrap_err().to_string();
        assert!(message(missing.path()).ends_with("manifest.toml is missing"));
        assert!(message(&missing.path().join("none")).ends_with("there is no such folder or file"));
        fs::write(missing.path().join("x.tar"), vec![b'x'; 2048]).unwrap();
        assert!(message(&missing.path().join("x.tar")).contains("not a whole .tar archive"));

        let folder = folder();
        fs::remove_file(folder.path().join("f16/decode.onnx")).unwrap();
        assert!(message(folder.path()).ends_with("f16/decode.onnx is missing"));
    }

    #[test]
    fn a_flipped_byte_is_found_when_the_file_is_read() {
        let folder = folder();
        fs::write(folder.path().join("f16/match.onnx"), "f16/match.onnY").unwrap();
        let bundle = open(folder.path()).unwrap();
        bundle.read("f16/text.onnx").unwrap();
        let error = bundle.read("f16/match.onnx").unwrap_err().to_string();
        assert!(error.contains("f16/match.onnx is damaged"), "{error}");
        bundle.read("f16/match.onnx").unwrap_err();
    }

    #[test]
    fn a_manifest_cannot_name_files_outside() {
        let folder = folder();
        let mut manifest = manifest::tests::tiny();
        manifest.files.insert("../x".to_owned(), sha256_hex(b""));
        fs::write(folder.path().join(MANIFEST), manifest.to_toml().unwrap()).unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(error.ends_with("the manifest names \"../x\", which does not lie inside the bundle"), "{error}");
    }
}
