//! Writing a bundle: a folder beside its place, that gets its name when it is whole and checked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use prost::Message;
use unimo::bundle::manifest::{DecodingDefaults, Form, Manifest, Precision, SCHEMA, WEIGHTS};
use unimo::bundle::{Bundle, BundleSource, MANIFEST, pack, sha256_hex};
use unimo::image::ImagePreparation;

use crate::graph::Products;
use crate::graphs::Graphs;

/// A bundle's folder that is being filled.
pub(crate) struct Writing {
    folder: PathBuf,
    /// Hashes of what is in it.
    files: BTreeMap<String, String>,
}

/// What a manifest says beside the files and the graphs.
pub(crate) struct About {
    pub precisions: Vec<Precision>,
    pub image: ImagePreparation,
    pub decoding: DecodingDefaults,
    pub training: toml::Table,
    pub quality: BTreeMap<String, BTreeMap<String, f64>>,
}

impl Writing {
    /// An empty folder, whatever was there before.
    pub fn new(folder: &Path) -> Result<Self> {
        clear(folder)?;
        Ok(Self { folder: folder.to_path_buf(), files: BTreeMap::new() })
    }

    /// The folder of a bundle that is there already, to add to.
    pub fn again(folder: &Path) -> Result<(Self, Manifest)> {
        let path = folder.join(MANIFEST);
        let manifest = Manifest::parse(&fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?)?;
        Ok((Self { folder: folder.to_path_buf(), files: manifest.files.clone() }, manifest))
    }

    /// Writes a file and takes its hash.
    pub fn put(&mut self, name: String, bytes: &[u8]) -> Result<()> {
        let path = self.folder.join(&name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        self.files.insert(name, sha256_hex(bytes));
        Ok(())
    }

    /// The graphs of a precision in one form; `products` gives how each of them is written, by its name.
    pub fn put_graphs<'p>(
        &mut self,
        graphs: &Graphs,
        precision: Precision,
        form: Form,
        products: &dyn Fn(&str) -> Result<Products<'p>>,
    ) -> Result<()> {
        for signature in &graphs.signatures {
            let model =
                graphs.build(signature, products(&signature.name)?).with_context(|| format!("graph {}", signature.name))?;
            self.put(Manifest::form_file(precision, form, &signature.name), &model.encode_to_vec())?;
        }
        Ok(())
    }

    /// The expanded graphs of a precision, and the weights that all its forms read.
    pub fn put_precision(&mut self, graphs: &Graphs, precision: Precision) -> Result<()> {
        self.put_graphs(graphs, precision, Form::Expanded, &|_| Ok(Products::Expanded))?;
        self.put(format!("{precision}/{WEIGHTS}"), graphs.weights.bytes())
    }

    /// Writes the manifest of a new bundle.
    pub fn describe(self, graphs: &Graphs, about: About) -> Result<()> {
        let About { precisions, image, decoding, training, quality } = about;
        let (model, signatures) = (graphs.sizes.clone(), graphs.signatures.clone());
        let manifest = Manifest {
            schema: SCHEMA,
            precisions,
            model,
            image,
            decoding,
            graphs: signatures,
            files: BTreeMap::new(),
            training,
            quality,
        };
        self.describe_again(manifest)
    }

    /// Writes a manifest with what is in the folder now.
    pub fn describe_again(self, mut manifest: Manifest) -> Result<()> {
        manifest.files = self.files;
        fs::write(self.folder.join(MANIFEST), manifest.to_toml()?).context("cannot write the manifest")
    }
}

/// A name beside `out`.
pub(crate) fn sibling(out: &Path, suffix: &str) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(format!(".{suffix}"));
    PathBuf::from(name)
}

pub(crate) fn clear(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot clear {}", folder.display()))?;
    }
    Ok(())
}

/// Gives the checked bundle its name.
pub(crate) fn publish(partial: &Path, out: &Path) -> Result<()> {
    if out.extension().is_some_and(|e| e == "tar") {
        let bundle = Bundle::open(&BundleSource::Path(partial.to_path_buf()))?;
        pack(&bundle, out)?;
        return Ok(());
    }
    let old = sibling(out, "old");
    if out.exists() {
        fs::rename(out, &old).with_context(|| format!("cannot move {} away", out.display()))?;
    }
    fs::rename(partial, out).with_context(|| format!("cannot write {}", out.display()))?;
    if old.exists() {
        fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    Ok(())
}
